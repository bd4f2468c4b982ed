"""GGUF: what gguf's own dequantiser reads are the student's weights, and transformers' reader gives its logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from distill.compress.factors import multiplied_out
from distill.compress.ptq import ptq
from distill.export.driver import export, parse
from distill.export.gguf_tokens import vocabulary
from distill.types import ConfigError
from tests import models
from tests.export.sources import byte_bpe, llama, low_rank, source

gguf: Any = pytest.importorskip("gguf", reason="the format needs gguf")
LAYERS = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_v": "self_attn.v_proj"}
LAYERS |= {"attn_output": "self_attn.o_proj", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}


def tensors(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Kind and values by name, as the gguf package reads them."""
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {
        each.name: (each.tensor_type.name, torch.from_numpy(gguf.dequantize(each.data, each.tensor_type).copy())) for each in reader.tensors
    }


def rotated_pairs_together(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates rows 2i and 2i + 1 of a head, transformers i and i + d/2."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def expected(model: Any, name: str) -> torch.Tensor:
    _, block, kind, _ = name.split(".")
    weight = model.get_submodule(f"model.layers.{block}.{LAYERS[kind]}").weight
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}.get(kind)
    return rotated_pairs_together(weight, heads) if heads else weight


@pytest.mark.parametrize(("precision", "error", "kl"), [("f16", 2**-11, 1e-5), ("q8_0", 0.6 / 127, 1e-3), ("q4_0", 1.01 / 8, 0.05)])
def test_a_float_student(tmp_path: Path, precision: str, error: float, kl: float) -> None:
    model = llama()
    (done,) = export(source(model), parse([f"gguf:{precision}"], None), tmp_path)
    assert done.gap.kl < kl
    found = tensors(tmp_path / f"gguf-{precision}")
    assert {name for name in found if "blk" not in name} == {"token_embd.weight", "output.weight", "output_norm.weight"}
    assert len(found) == 3 + 2 * 9
    for name, (kind, values) in found.items():
        if name.startswith("blk") and "norm" not in name:
            weight = expected(model, name)
            assert kind == precision.upper()
            assert (values - weight).abs().max() <= error * weight.abs().max()
    assert torch.equal(found["blk.1.attn_norm.weight"][1], model.get_submodule("model.layers.1.input_layernorm").weight)  # type: ignore[arg-type]
    assert found["output.weight"][0] == ("Q8_0" if precision != "f16" else "F16")


@pytest.mark.parametrize(("scheme", "precision"), [("int4", "q4_0"), ("int2", "q4_0"), ("int8", "q8_0"), ("ternary", "q4_0")])
def test_what_was_quantised_keeps_its_integers(tmp_path: Path, scheme: str, precision: str) -> None:
    model = ptq(llama(), scheme)
    export(source(model), parse([f"gguf:{precision}"], None), tmp_path)
    for name, (_, values) in tensors(tmp_path / f"gguf-{precision}").items():
        if name.startswith("blk") and "norm" not in name:
            # the scale alone is rounded, to float16
            torch.testing.assert_close(values, expected(model, name), rtol=2**-11, atol=0)
    plain = gguf.quants.quantize(expected(model, "blk.0.ffn_up.weight").numpy(), gguf.GGMLQuantizationType[precision.upper()])
    again = gguf.dequantize(plain, gguf.GGMLQuantizationType[precision.upper()])
    if scheme != "ternary":
        assert not np.allclose(again, expected(model, "blk.0.ffn_up.weight").numpy(), rtol=2**-10, atol=0), "chosen anew they would differ"


def test_tied_embeddings_and_odd_widths(tmp_path: Path) -> None:
    (done,) = export(source(llama(tie_word_embeddings=True, intermediate_size=72)), parse(["gguf:q8_0"], None), tmp_path)
    found = tensors(tmp_path / "gguf-q8_0")
    assert "output.weight" not in found
    assert found["blk.0.ffn_down.weight"][0] == "F16", "72 inputs are no blocks of 32"
    assert done.gap.kl < 1e-3


@pytest.mark.parametrize(("name", "other"), [("gguf:q4_0", "f16"), ("onnx:int4", "int8")])
def test_blocks_that_fill_hardly_any_rows_are_refused(tmp_path: Path, name: str, other: str) -> None:
    with pytest.raises(ConfigError, match=rf"do not fill the rows of 13 of 15 linear layers, e.g. the 48 inputs of .*; take {other}"):
        export(source(llama(hidden_size=48, num_attention_heads=4, num_key_value_heads=2)), parse([name], None), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_vocabulary_gives_the_same_tokens(tmp_path: Path) -> None:
    export(source(llama()), parse(["gguf"], None), tmp_path)
    (tmp_path / "gguf-f16" / "tokenizer.json").unlink()
    (tmp_path / "gguf-f16" / "tokenizer_config.json").unlink()
    read: Any = AutoTokenizer.from_pretrained(tmp_path / "gguf-f16", gguf_file="model.gguf")
    for text in ("the cat sat", "that mat, ünd 42 more\n", "<eos>"):
        assert read(text, add_special_tokens=False).input_ids == byte_bpe()(text).input_ids


def test_rows_without_a_token_are_unused_ones() -> None:
    words = vocabulary(byte_bpe(), 300)
    assert len(words.tokens) == len(words.types) == 300
    assert len(set(words.tokens)) == 300
    assert (words.types[0], words.types[5], words.types[-1]) == (3, 1, 5)
    assert words.special == {"eos": 0, "pad": 1}
    assert words.pre == "gpt-2"


def cut_by(pre: Any) -> Any:
    tokenizer = byte_bpe()
    tokenizer.backend_tokenizer.pre_tokenizer = pre
    return tokenizer


def test_llama_3_is_known_and_other_ways_to_cut_text_are_refused() -> None:
    llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    from tokenizers import Regex

    split = lambda pattern: cut_by(pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level]))
    assert vocabulary(split(llama3), 300).pre == "llama-bpe"
    with pytest.raises(ConfigError, match=r"cuts text by Split then ByteLevel in a way that llama.cpp has no name for"):
        vocabulary(split(r"\w+"), 300)
    with pytest.raises(ConfigError, match="the tokenizer is WordLevel, and only byte-level BPE is known"):
        vocabulary(models.tokenizer(), 40)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention_bias": True}, "'attention_bias': True"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "'rope_type': 'linear'"),
    ],
)
def test_what_llama_cpp_would_read_wrongly_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        export(source(llama(**changes)), parse(["gguf"], None), tmp_path)


def test_other_architectures_and_q4_k_are_refused(tmp_path: Path) -> None:
    gpt2 = source(llama())
    object.__setattr__(gpt2, "model", models.causal_lm("gpt2"))
    with pytest.raises(ConfigError, match="language models of type llama, and this is a GPT2LMHeadModel"):
        export(gpt2, parse(["gguf"], None), tmp_path)
    with pytest.raises(ConfigError, match="llama-quantize"):
        export(source(llama()), parse(["gguf:q4_k"], None), tmp_path)


def test_the_file_says_its_sizes(tmp_path: Path) -> None:
    export(source(llama()), parse(["gguf"], None), tmp_path)
    fields = gguf.GGUFReader(tmp_path / "gguf-f16" / "model.gguf").fields
    said = {name.removeprefix("llama."): field.contents() for name, field in fields.items() if name.startswith("llama.")}
    config = llama().config
    assert said["attention.head_count_kv"] == config.num_key_value_heads == 2
    assert said["context_length"] == 64
    assert json.dumps(said["rope.freq_base"]) == "10000.0"


def test_layers_of_two_factors_are_refused_and_multiplied_out_they_pass(tmp_path: Path) -> None:
    model = low_rank()
    with pytest.raises(ConfigError, match=r"gguf cannot store .* '.*up_proj'; .* `distill.compress.factors.multiplied_out"):
        export(source(model), parse(["gguf"], None), tmp_path)
    assert not list(tmp_path.iterdir())
    assert export(source(multiplied_out(model)), parse(["gguf"], None), tmp_path)[0].gap.kl < 1e-5
