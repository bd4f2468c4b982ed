"""Post-training quantisation gives torchao's own values, leaves the student as it was, and records what it did."""

from typing import Any

import pytest
import torch
from torch import nn

from distill.compress.integers import recorded
from distill.compress.ptq import ptq
from distill.compress.schemes import SCHEMES
from distill.types import ConfigError
from tests.export.sources import bert, llama

torchao: Any = pytest.importorskip("torchao", reason="integers are torchao's")


@pytest.mark.parametrize(("scheme", "bits", "group"), [("int8", 8, None), ("int4", 4, 32), ("int3", 3, 32), ("int2", 2, 16)])
def test_values_are_those_of_torchaos_post_training_quantisation(scheme: str, bits: int, group: int | None) -> None:
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    ours = ptq(llama(), scheme, group)
    theirs = llama()
    granularity = PerAxis(0) if group is None else PerGroup(group)
    head = theirs.get_output_embeddings()
    config = IntxWeightOnlyConfig(getattr(torch, f"int{bits}"), granularity)
    quantize_(theirs, config, filter_fn=lambda module, _: isinstance(module, nn.Linear) and module is not head)
    for name, module in theirs.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            weight: Any = module.weight
            assert torch.equal(ours.get_submodule(name).weight, weight.dequantize())  # type: ignore[arg-type]


def test_ternary_is_absmean() -> None:
    weight = llama().get_submodule("model.layers.0.mlp.up_proj").weight
    scale = weight.abs().mean()  # type: ignore[operator, union-attr]
    expected = torch.where(weight.abs() > scale / 2, weight.sign() * scale, 0.0)  # type: ignore[operator, union-attr]
    assert torch.equal(ptq(llama(), "ternary").get_submodule("model.layers.0.mlp.up_proj").weight, expected)  # type: ignore[arg-type]


def test_fewer_bits_are_further_away() -> None:
    model, ids = llama(), torch.arange(40).view(4, 10)
    logp = model(ids).logits.log_softmax(-1)
    gaps = [
        (logp.exp() * (logp - ptq(model, name)(ids).logits.log_softmax(-1))).sum(-1).mean() for name in ("int8", "int4", "int3", "int2")
    ]
    assert gaps == sorted(gaps)
    assert 0 < gaps[0] < gaps[-1]


def test_the_student_stays_and_the_copy_says_what_was_done() -> None:
    model = bert()
    before = [weight.clone() for weight in model.parameters()]
    quantised = ptq(model, "int4", "row", include=["*attention*"], exclude=["*layer.1*"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    changed = {n for (n, a), b in zip(quantised.named_parameters(), model.parameters(), strict=True) if not torch.equal(a, b)}
    names = [f"bert.encoder.layer.0.attention.{part}" for part in ("self.query", "self.key", "self.value", "output.dense")]
    assert changed == {f"{name}.weight" for name in names}
    assert recorded(quantised).keys() == set(names)
    assert all(how.bits == 4 and how.group_size is None for how in recorded(quantised).values())
    assert recorded(model) == {}


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"scheme": "int5"}, "ptq.scheme: there is no 'int5'"),
        ({"scheme": "int4", "group_size": 24}, "ptq.group_size is 24, which does not divide the 32 inputs"),
        ({"scheme": "int4", "include": ["*.nothing"]}, "ptq.include: no linear layer is called"),
    ],
)
def test_what_cannot_work_is_one_line(kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ptq(llama(), **kwargs)


def test_every_scheme_that_runs_here_works() -> None:
    for name, how in SCHEMES.items():
        if how.kind != "fp8":
            assert ptq(bert(), name)(torch.arange(6)[None]).logits.isfinite().all()
