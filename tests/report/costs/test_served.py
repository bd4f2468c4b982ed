import torch
from torch import nn

from distill.report.costs.served import all_outputs, inputs_of, logits, logits_of
from distill.tasks import CausalLM
from distill.types import MixedTarget, Outputs, SparseTarget
from tests import models


def test_a_lazy_head_gives_what_the_model_itself_gives() -> None:
    for kind in ("llama", "gemma2"):
        model = models.causal_lm(kind)
        batch = {"input_ids": models.tokens(2, 6), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]), "labels": torch.ones(2, 6)}
        with torch.no_grad():
            (outputs,) = all_outputs(CausalLM().outputs(model, batch))
            ours, theirs = logits(outputs), model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(ours[batch["attention_mask"].bool()], theirs[batch["attention_mask"].bool()])
        torch.testing.assert_close(logits_of(model, batch), theirs)


def test_what_is_behind_a_target() -> None:
    part, empty = Outputs(torch.ones(1, 1, 2), nn.Identity()), torch.zeros(1, 1, 1)
    stored = SparseTarget(empty, empty, empty)
    assert all_outputs(stored) == []
    assert all_outputs(MixedTarget((part, stored, part), empty, "apart")) == [part, part]


def test_a_packed_row_is_one_document() -> None:
    ids = models.tokens(2, 4)
    given = inputs_of({"input_ids": ids, "position_ids": ids, "labels": ids, "token_type_ids": ids})
    assert set(given) == {"input_ids", "attention_mask", "token_type_ids"}
    assert given["attention_mask"].all()
