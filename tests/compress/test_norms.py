import pytest
import torch
from torch import nn

from distill.compress.norms import input_norms
from tests import models


def test_only_valid_positions_count_and_nothing_is_dropped() -> None:
    model = models.classifier("bert", hidden_dropout_prob=0.5).train()
    ids, mask = models.tokens(3, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5])
    names = ["bert.encoder.layer.1.intermediate.dense", "bert.pooler.dense"]
    norms = input_norms(model, names, {"attention_mask": mask}, lambda: model(input_ids=ids, attention_mask=mask))
    assert model.training
    with torch.no_grad():
        seen = model.eval()(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        inside = model.bert.encoder.layer[1].attention(seen.hidden_states[1], attention_mask=_wide(mask))[0]
    assert torch.allclose(norms[names[0]], inside[mask.bool()].norm(dim=0), rtol=1e-5)
    assert torch.allclose(norms[names[1]], seen.hidden_states[-1][:, 0].norm(dim=0), rtol=1e-5), "one vector of each row"


def _wide(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]


def test_a_layer_that_runs_twice_counts_twice_and_hooks_go() -> None:
    model = nn.Sequential(nn.Linear(2, 2))

    def run() -> None:
        model(torch.tensor([[3.0, 0.0]]))
        model(torch.tensor([[4.0, 1.0]]))

    assert input_norms(model, ["0"], {}, run)["0"].tolist() == [5.0, 1.0]
    with pytest.raises(ZeroDivisionError):
        input_norms(model, ["0"], {}, lambda: 1 / 0)
    assert not model[0]._forward_pre_hooks
