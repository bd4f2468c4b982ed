"""GGUF, the file of llama.cpp and what is built on it; Llama architectures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from distill.export.base import Format, Run, Source, need, refuse_factors, refuse_odd
from distill.export.gguf_tokens import Vocabulary, vocabulary
from distill.export.grid import Grid
from distill.report.costs.served import logits_of
from distill.tasks import CausalLM, Task
from distill.types import ConfigError

FILE = "model.gguf"
BLOCK = 32
BITS = {"q8_0": 8, "q4_0": 4}
FINER = ("token_embd.weight", "output.weight")  # never below 8 bits, as llama.cpp does it


class Gguf(Format):
    """One file with weights, sizes and vocabulary.

    `f16`; `q8_0` and `q4_0`: blocks of 32 weights with a float16 scale, embeddings always of 8 bits. Layers that training quantised keep
    their integers where a block has one scale, which is rounded to float16. Vectors stay float32. `q4_k` no Python package can write;
    llama.cpp's own tool makes it.
    """

    name = "gguf"
    runtime = "llama.cpp"
    precisions: ClassVar[Mapping[str, float]] = {"f16": 1e-3, "q8_0": 0.05, "q4_0": 0.5, "q4_k": 0.5}

    def check(self, source: Source) -> None:
        """Refuse what llama.cpp would read wrongly."""
        if self.precision == "q4_k":
            raise ConfigError(
                "format: gguf's q4_k can only be written by llama.cpp; export gguf:f16 and run `llama-quantize model.gguf q4.gguf Q4_K_M`"
            )
        need("gguf", self.name)
        config = source.model.config
        if not isinstance(source.task, CausalLM) or source.model_type != "llama":
            raise ConfigError(f"format: gguf is for language models of type llama, and this is a {type(source.model).__name__}; take onnx")
        refuse_factors(source, self.name)
        odd = {key: value for key in ("attention_bias", "mlp_bias") if (value := getattr(config, key))}
        if config.rope_parameters["rope_type"] != "default":
            odd["rope_type"] = config.rope_parameters["rope_type"]
        if odd:
            raise ConfigError(f"format: gguf: a llama with {odd} is not known here; take onnx, or llama.cpp's own converter")
        if self.precision in BITS:
            refuse_odd(source, self.name, self.precision, BLOCK, "f16")
        vocabulary(source.tokenizer, config.vocab_size)

    def write(self, source: Source, folder: Path) -> None:
        """Write the sizes, the vocabulary and every tensor."""
        gguf: Any = need("gguf", self.name)
        writer = gguf.GGUFWriter(folder / FILE, "llama")
        _sizes(
            writer, source.model.config, gguf.LlamaFileType[{"f16": "MOSTLY_F16"}.get(self.precision, f"MOSTLY_{self.precision.upper()}")]
        )
        _words(writer, vocabulary(source.tokenizer, source.model.config.vocab_size))
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, source.model.config.num_hidden_layers)
        grids = source.learned(BITS.get(self.precision, 0))
        for name, values in _tensors(source):
            heads = _heads(name, source.model.config)
            stored = names.get_name(name, try_suffixes=(".weight",))
            precision = "q8_0" if self.precision in BITS and stored in FINER else self.precision
            data, kind = _stored(_permuted(values, heads), _permuted_grid(grids.get(name.removesuffix(".weight")), heads), precision)
            writer.add_tensor(stored, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def load(self, folder: Path, task: Task) -> Run:
        """Load with transformers, which turns the blocks into floats again by code of its own."""
        model = task.load(str(folder), "export", gguf_file=FILE, dtype="float32").eval()
        return lambda batch: logits_of(model, batch)


def _stored(values: NDArray[Any], grid: Grid | None, precision: str) -> tuple[NDArray[Any], Any]:
    """The bytes of a tensor, and ggml's name of their kind."""
    gguf: Any = need("gguf", "gguf")
    kinds = gguf.GGMLQuantizationType
    if values.ndim == 1:
        return values, kinds.F32
    if precision == "f16" or values.shape[1] % BLOCK:
        return values.astype(np.float16), kinds.F16
    kind = kinds[precision.upper()]
    scales = None if grid is None else grid.blocks(BLOCK)
    if grid is None or scales is None:
        return gguf.quants.quantize(values, kind), kind
    return _blocks(grid.levels.numpy(), scales.numpy(), BITS[precision]), kind


def _tensors(source: Source) -> list[tuple[str, NDArray[Any]]]:
    """All weights by name, each once: without an output embedding llama.cpp takes the input's."""
    return [(name, parameter.detach().numpy()) for name, parameter in source.model.named_parameters()]


def _heads(name: str, config: Any) -> int | None:
    if name.endswith("q_proj.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if name.endswith("k_proj.weight") else None


def _permuted(rows: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """From transformers' order of rotated pairs, (i, i + d/2), to llama.cpp's, (2i, 2i + 1), in each head."""
    if heads is None:
        return rows
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _permuted_grid(grid: Grid | None, heads: int | None) -> Grid | None:
    if grid is None or heads is None:
        return grid
    scales = grid.scales.expand(grid.levels.shape[0], -1).contiguous()
    levels, scales = (torch.from_numpy(_permuted(each.numpy(), heads).copy()) for each in (grid.levels, scales))
    return Grid(levels, scales, grid.how)


def _blocks(levels: NDArray[np.int8], scales: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """Lay blocks out as ggml does: the scale in float16, then the integers; of 4 bits the first half of a block in the low nibbles, + 8."""
    out = len(levels)
    blocks = levels.reshape(out, -1, BLOCK)
    if bits == 4:
        nibbles = (blocks + 8).astype(np.uint8)
        stored = nibbles[..., : BLOCK // 2] | (nibbles[..., BLOCK // 2 :] << 4)
    else:
        stored = blocks.view(np.uint8)
    return np.concatenate([scales.astype(np.float16)[..., None].view(np.uint8), stored], -1).reshape(out, -1)


def _sizes(writer: Any, config: Any, file_type: int) -> None:
    writer.add_file_type(file_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _words(writer: Any, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.begins)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)
