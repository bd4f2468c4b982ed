"""Buffers that no checkpoint holds survive a cast of the model."""

from pathlib import Path

import torch
from torch import nn

from distill.exact import cast
from tests.models import causal_lm, tokens


def test_a_cast_model_is_what_transformers_loads_in_that_dtype(tmp_path: Path) -> None:
    model = causal_lm()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    ids = tokens(2, 40)
    assert torch.equal(cast(model, torch.bfloat16)(ids).logits, loaded(ids).logits)
    assert model.dtype == torch.bfloat16
    assert not torch.equal(model.to(torch.bfloat16)(ids).logits, loaded(ids).logits), "torch's own cast is another model"


def test_what_checkpoints_hold_and_integers_are_left_alone() -> None:
    inner = nn.Module()
    inner.register_buffer("held", torch.tensor(0.1))
    inner.register_buffer("exact", torch.tensor(0.1), persistent=False)
    inner.register_buffer("count", torch.tensor(3), persistent=False)
    inner.register_buffer("none", None, persistent=False)
    found = cast(nn.Sequential(inner), torch.bfloat16)[0]
    assert (found.held.dtype, found.exact.dtype, found.count.dtype) == (torch.bfloat16, torch.float32, torch.int64)
    assert set(found.state_dict()) == {"held"}
