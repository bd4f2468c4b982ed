import torch
from torch import nn

from distill.balance.gram import gradients_of, gram


def test_by_hand() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
    values = {"a": (3 * model.weight[0, 0]).sum(), "b": model.weight.square().sum(), "free": torch.ones(())}
    found = gradients_of(lambda name: values[name], ["a", "b", "free"], model)
    # gradients (3, 0), (2, 4) and none
    assert gram(found).tolist() == [[9, 6, 0], [6, 20, 0], [0, 0, 0]]
    assert model.weight.grad is None


def test_frozen_parameters_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[0].weight.fill_(5.0)
        model[1].weight.fill_(7.0)
    found = gradients_of(lambda _: model(torch.ones(1, 1)).sum(), ["it"], model)
    assert gram(found).item() == 25.0  # of the second weight alone: 5
