import torch

from distill.balance.branch import Branch


def through(weight: float, scale: float, measured: bool = True) -> tuple[Branch, torch.Tensor]:
    """A trunk x → h = x² → used by the trunk (Σ h) and by a term Σ 3 h² weighted; gives the branch and x."""
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    h = x.square()
    branch = Branch({"h": h}, measured)
    value = branch.of((3 * branch.taps["h"].square()).sum() if branch.taps else torch.zeros(()))
    ((h.sum() + weight * value) * scale).backward()
    return branch, x


def test_the_square_is_of_this_terms_gradient_at_the_tap_and_nothing_else() -> None:
    for weight, scale in ((1.0, 1.0), (0.25, 1.0), (2.0, 65536.0)):
        branch, x = through(weight, scale)
        # ∂(3 h²)/∂h = 6 h = (6, 24), whatever it is multiplied by later; the trunk's own gradient does not count
        assert branch.square.item() == 6**2 + 24**2
        assert x.grad is not None
        # ∂/∂x = scale (1 + weight · 6 h) 2 x
        torch.testing.assert_close(x.grad, scale * torch.tensor([(1 + weight * 6) * 2, (1 + weight * 24) * 4], dtype=torch.float64))


def test_a_weight_of_zero_hides_the_gradient() -> None:
    assert through(0.0, 1.0)[0].square.item() == 0.0


def test_unmeasured_the_taps_are_passed_on_as_they_are() -> None:
    tap = torch.ones(2, requires_grad=True)
    assert Branch({"h": tap}, measured=False).taps["h"] is tap
    assert through(1.0, 1.0, measured=False)[0].square.item() == 0.0
