"""Targets of every kind: what terms see of a block, and what the objective makes of draws and of several teachers."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill.losses.base import TokenLoss
from distill.losses.chunked import chunked_objective
from distill.losses.class_weighted import ClassWeighted, FrequencyPower
from distill.losses.divergence import ForwardKL, ReverseKL
from distill.losses.hard import CrossEntropy, ZLoss
from distill.losses.jensen_shannon import JensenShannon
from distill.losses.logits import LogitMSE
from distill.losses.support import Apart, Distribution, Known, Mixture
from distill.losses.target import chunked
from distill.types import IGNORE_INDEX, MixedTarget, Outputs, SparseTarget, Target
from tests.losses.dense import Case, Reference, assert_close, counts, gap, linear, setting
from tests.losses.sparse import coarsened, expected, flat, found, on_bins, teacher_logits
from tests.losses.test_divergence import reference_ForwardKL, reference_ReverseKL
from tests.losses.test_hard import reference_CrossEntropy, reference_ZLoss
from tests.losses.test_jensen_shannon import reference_JensenShannon
from tests.losses.test_logits import reference_LogitMSE

V = 13


def of_outputs(case: Case, m: int) -> list[Outputs]:
    """The case's teacher, and others of other widths."""
    rng = torch.Generator().manual_seed(m)
    parts = [case.teacher()]
    for width in range(4, 3 + m):
        features = torch.randn(*case.labels.shape, width, generator=rng, dtype=case.teacher_features.dtype)
        parts.append(Outputs(features, linear(2 * torch.randn(V + width, width, generator=rng, dtype=features.dtype) / width**0.5)))
    return parts


def logits_of(part: Outputs) -> Tensor:
    """Over the classes, `[B, T, V]` in float64."""
    with torch.no_grad():
        return part.head(part.features)[..., :V].double()


def shares(case: Case, m: int, seed: int = 0) -> Tensor:
    """Weights of each position, `[B, T, M]`."""
    drawn = torch.rand(*case.labels.shape, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn / drawn.sum(-1, keepdim=True)


def drawn(logits: Tensor, n: int, temperature: float, seed: int = 0) -> SparseTarget:
    """Count n draws from a softmax at T, class by class: ids in a random order, −1 where a class was not drawn."""
    rng = torch.Generator().manual_seed(seed)
    v = logits.shape[-1]
    probs = (logits / temperature).softmax(-1).reshape(-1, v)
    hits = torch.multinomial(probs, n, replacement=True, generator=rng)
    share = torch.stack([(hits == c).sum(-1) for c in range(v)], -1).double() / n
    order = (torch.rand(share.shape, generator=rng) - 2 * (share > 0)).argsort(-1)  # those drawn come first
    kept = share.gather(-1, order)
    ids = order.masked_fill(kept == 0, -1)
    return SparseTarget(ids.view(logits.shape), kept.view(logits.shape), torch.zeros(logits.shape[:-1], dtype=torch.float64), temperature)


def estimate(target: SparseTarget, v: int) -> Tensor:
    """p̂ over all classes, `[..., V]`, by a loop."""
    dense = torch.zeros(*target.ids.shape[:-1], v, dtype=torch.float64)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in target.ids.shape)).tolist():
        if (i := int(target.ids[tuple(place)])) >= 0:
            dense[(*place[:-1], i)] += float(target.probs[tuple(place)])
    return dense


# ---- what terms see


def test_only_valid_positions_are_kept_in_order_by_chunk_and_block() -> None:
    labels = torch.tensor([[IGNORE_INDEX, 4, 5, 1], [6, IGNORE_INDEX, IGNORE_INDEX, 2]])
    valid = labels != IGNORE_INDEX
    ids = torch.arange(16).view(2, 4, 2)
    probs, tail = ids / 100, torch.arange(8.0).view(2, 4) / 10
    weights = torch.arange(16.0).view(2, 4, 2)
    features = torch.arange(8.0).view(2, 4, 1) * torch.ones(20)
    dense, sparse = Outputs(features, nn.Identity()), SparseTarget(ids, probs, tail, 2.0)
    places = [1, 2, 3, 4, 7]  # flat, of the valid ones

    found_dense, found_sparse, found_weights = [], [], []
    for start in (0, 2, 4):
        chunk = slice(start, min(start + 2, 5))
        blocks = [chunked(t, valid, 15)(chunk) for t in (dense, sparse, MixedTarget((dense, sparse), weights, "apart"))]
        for row in range(chunk.stop - chunk.start):
            one, few, both = (block(slice(row, row + 1)) for block in blocks)
            assert isinstance(one, Distribution)
            assert one.logits_NV.shape == (1, 15)  # the columns that pad the vocabulary are gone
            found_dense.append(one.logits_NV[0, 0].item())
            assert isinstance(few, Known)
            assert few.temperature == 2.0
            found_sparse.append((few.ids[0].tolist(), few.probs[0].tolist()))
            assert isinstance(both, Apart)
            assert [type(part) for part in both.parts] == [Distribution, Known]
            found_weights.append(both.weights[0].tolist())
    assert found_dense == places
    assert [ids for ids, _ in found_sparse] == [[2 * i, 2 * i + 1] for i in places]
    for i, (_, given) in zip(places, found_sparse, strict=True):
        assert given == pytest.approx([2 * i / 100, (2 * i + 1) / 100, i / 10])
    assert found_weights == [[2 * i, 2 * i + 1] for i in places]


@pytest.mark.parametrize(("how", "geometric"), [("probabilities", False), ("log_probabilities", True)])
def test_a_mean_is_one_distribution(how: Any, geometric: bool) -> None:
    case = Case.random(mask="none")
    target = MixedTarget(tuple(of_outputs(case, 2)), shares(case, 2), how)
    side = chunked(target, case.labels != IGNORE_INDEX, V)(slice(0, 3))(slice(0, 2))
    assert isinstance(side, Mixture)
    assert side.geometric is geometric
    torch.testing.assert_close(side.logp(2.0).exp().sum(-1), torch.ones(2, dtype=torch.float64))


def test_a_teacher_runs_once_a_chunk_whatever_the_blocks() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            Counting.calls += 1
            assert not torch.is_grad_enabled()
            return super().forward(x)

    case = Case.random(shape=(1, 6), mask="none")
    parts = tuple(Outputs(torch.randn(1, 6, 3), Counting(3, V)) for _ in range(2))
    block = chunked(MixedTarget(parts, shares(case, 2), "apart"), case.labels != IGNORE_INDEX, V)(slice(0, 6))
    for row in range(6):
        block(slice(row, row + 1))
    assert Counting.calls == 2


# ---- draws


@pytest.mark.parametrize("closed", [True, False], ids=["closed form", "autograd"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("n", [1, 8, 200])
def test_forward_kl_of_draws_has_the_gradient_t_times_q_minus_the_estimate(n: int, temperature: float, closed: bool) -> None:
    student = 2 * torch.randn(1, 6, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = drawn(3 * torch.randn(1, 6, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64), n, temperature)
    leaf, labels = student.clone().requires_grad_(), torch.zeros(1, 6, dtype=torch.long)
    terms: dict[str, TokenLoss] = {"kd": ForwardKL(temperature)} if closed else {"kd": ForwardKL(temperature), "z": ZLoss()}
    total, sums, _ = chunked_objective(Outputs(leaf, nn.Identity()), target, labels, terms, {"kd": 1.0, "z": 0.0}, V, 4)
    total.backward()
    assert leaf.grad is not None
    q, p = (student / temperature).softmax(-1), estimate(target, V)
    torch.testing.assert_close(leaf.grad, temperature * (q - p), rtol=1e-12, atol=1e-14)
    value = temperature**2 * (torch.xlogy(p, p) - p * q.log()).sum()
    assert sums["kd"].item() == pytest.approx(value.item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_over_draws_goes_to_the_dense_gradient(temperature: float) -> None:
    rng = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(1, 1, V, generator=rng, dtype=torch.float64) for _ in range(2))
    times, n = 2000, 8
    leaf, labels = student.expand(1, times, V).clone().requires_grad_(), torch.zeros(1, times, dtype=torch.long)
    target = drawn(teacher.expand(1, times, V), n, temperature)
    total, _, _ = chunked_objective(Outputs(leaf, nn.Identity()), target, labels, {"kd": ForwardKL(temperature)}, {"kd": 1.0}, V)
    total.backward()
    assert leaf.grad is not None
    p = (teacher[0, 0] / temperature).softmax(-1)
    dense = temperature * ((student[0, 0] / temperature).softmax(-1) - p)
    error = temperature * (p * (1 - p) / (n * times)).sqrt()  # of the mean: the draws are multinomial
    away = (leaf.grad[0].mean(0) - dense).abs() / error
    assert away.max() < 4  # of 13 classes, with a fixed seed
    assert away.square().mean().sqrt() < 1.5
    assert (leaf.grad[0, 0] - dense).norm() > 10 * (leaf.grad[0].mean(0) - dense).norm()


# ---- the mean of several teachers


LOSSES: list[tuple[Any, Reference]] = [
    (ForwardKL, reference_ForwardKL),
    (ReverseKL, reference_ReverseKL),
    (JensenShannon, reference_JensenShannon),
]


def mean_logits(parts: list[Tensor], weights: Tensor, temperature: float, geometric: bool) -> Tensor:
    """T · log p of the mean p of softened distributions, `[N, V]`: logits that give p back at T."""
    p = torch.stack([(part / temperature).softmax(-1) for part in parts])
    w = weights.movedim(-1, 0)[..., None]
    mean = (p**w).prod(0) if geometric else (w * p).sum(0)
    return temperature * (mean / mean.sum(-1, keepdim=True)).log()


@pytest.mark.parametrize(("cls", "reference"), LOSSES, ids=lambda each: getattr(each, "__name__", ""))
@pytest.mark.parametrize("how", ["probabilities", "log_probabilities"])
@pytest.mark.parametrize(("m", "temperature"), [(2, 1.0), (2, 2.0), (3, 2.0)])
def test_mean_of_teachers(cls: Any, reference: Reference, how: Any, m: int, temperature: float) -> None:
    for chunk, dtype in ((1, torch.float64), (4, torch.float32)):
        case = Case.random(seed=m, dtype=dtype)
        parts, weights, valid = of_outputs(case, m), shares(case, m), case.labels != IGNORE_INDEX
        mean = mean_logits([logits_of(p)[valid] for p in parts], weights[valid], temperature, how == "log_probabilities")
        true = case.dense(lambda s, t, y, mean=mean: reference(s, mean, y, temperature=temperature))
        ours = found(case, MixedTarget(tuple(parts), weights.to(dtype), how), cls(temperature=temperature), chunk=chunk)
        assert_close(ours, true, 1e-12 if dtype == torch.float64 else 1e-5)


def test_mean_of_one_is_that_one() -> None:
    case = Case.random(dtype=torch.float64)
    for how in ("probabilities", "log_probabilities", "apart"):
        ours = found(case, MixedTarget((case.teacher(),), torch.ones(*case.labels.shape, 1), how), ReverseKL(2.0))
        assert_close(ours, case.chunked(ReverseKL(2.0)), 1e-12)


@pytest.mark.parametrize("how", ["probabilities", "log_probabilities"])
def test_losses_on_logits_see_the_log_probabilities_of_the_mean(how: Any) -> None:
    case = Case.random(dtype=torch.float64)
    parts, weights, valid = of_outputs(case, 2), shares(case, 2), case.labels != IGNORE_INDEX
    mean = mean_logits([logits_of(p)[valid] for p in parts], weights[valid], 1.0, how == "log_probabilities")
    true = case.dense(lambda s, t, y: reference_LogitMSE(s, mean, y))
    assert_close(found(case, MixedTarget(tuple(parts), weights, how), LogitMSE()), true, 1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_stand_for_their_estimate_in_a_mean_of_probabilities(temperature: float) -> None:
    case = Case.random(dtype=torch.float64)
    whole, weights, valid = case.teacher(), shares(case, 2), case.labels != IGNORE_INDEX
    target = drawn(logits_of(of_outputs(case, 2)[1]), 16, temperature)
    p = weights[..., :1] * (teacher_logits(case) / temperature).softmax(-1) + weights[..., 1:] * estimate(target, V)
    mean = temperature * p[valid].log()
    for cls, reference in LOSSES:
        true = case.dense(lambda s, t, y, it=reference: it(s, mean, y, temperature=temperature))
        assert_close(found(case, MixedTarget((whole, target), weights, "probabilities"), cls(temperature=temperature)), true, 1e-12)


@pytest.mark.parametrize("how", ["probabilities", "log_probabilities"])
def test_a_mean_keeps_what_float32_probabilities_would_lose(how: Any) -> None:
    # e^-200 and e^-300 are 0 in float32; log p is not
    first, second = torch.tensor([[[0.0, -200.0, -1.0]]]), torch.tensor([[[0.5, -300.0, 0.0]]])
    weights = torch.tensor([[[0.3, 0.7]]])
    target = MixedTarget((Outputs(first, nn.Identity()), Outputs(second, nn.Identity())), weights, how)
    side = chunked(target, torch.ones(1, 1, dtype=torch.bool), 3)(slice(0, 1))(slice(0, 1))
    assert isinstance(side, Mixture)
    true = mean_logits([first[0].double(), second[0].double()], weights[0].double(), 1.0, how == "log_probabilities")
    torch.testing.assert_close(side.logp(), true.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["probabilities", "log_probabilities", "apart"])
def test_means_of_extremes_stay_finite(how: Any) -> None:
    out = -torch.inf
    logits = torch.tensor([[1e4, -1e4, 0.0], [out, 0.0, 1.0], [out, out, 1.0], [0.0, 1e4, 1e4]])
    student = logits[None]
    parts = tuple(Outputs(x[None], nn.Identity()) for x in (logits, logits.flip(0), logits.roll(1, 0)))
    for weights in (torch.full((1, 4, 3), 1 / 3), torch.eye(3)[[0, 1, 2, 0]][None]):
        for loss in (ForwardKL(2.0), ReverseKL(0.5), JensenShannon()):
            leaf = student.clone().requires_grad_()
            target, labels = MixedTarget(parts, weights, how), torch.zeros(1, 4, dtype=torch.long)
            total, _, _ = chunked_objective(Outputs(leaf, nn.Identity()), target, labels, {"it": loss}, {"it": 1.0}, 3)
            total.backward()
            assert leaf.grad is not None
            assert total.isfinite()
            assert leaf.grad.isfinite().all()


# ---- several teachers, each by itself


def test_one_hot_weights_choose_each_positions_teacher() -> None:
    case = Case.random(dtype=torch.float64)
    parts, valid = of_outputs(case, 3), case.labels != IGNORE_INDEX
    choice = torch.randint(3, case.labels.shape, generator=torch.Generator().manual_seed(2))
    own = torch.stack([logits_of(p) for p in parts], -2)[valid][torch.arange(int(valid.sum())), choice[valid]]
    weights = nn.functional.one_hot(choice, 3).double()
    for cls, reference in LOSSES:
        true = case.dense(lambda s, t, y, it=reference: it(s, own, y, temperature=2.0))
        assert_close(found(case, MixedTarget(tuple(parts), weights, "apart"), cls(temperature=2.0)), true, 1e-12)


def on_any(reference: Reference, student: Tensor, part: Target, labels_BT: Tensor, temperature: float) -> Tensor:
    """A reference against a target of either kind, `[N]`."""
    valid = labels_BT != IGNORE_INDEX
    if isinstance(part, Outputs):
        return reference(student, logits_of(part)[valid], labels_BT[valid], temperature=temperature)
    assert isinstance(part, SparseTarget)
    return on_bins(reference, student, flat(part, labels_BT), labels_BT[valid], temperature=temperature)


@pytest.mark.parametrize(("cls", "reference"), LOSSES, ids=lambda each: getattr(each, "__name__", ""))
def test_weights_sum_the_terms_whatever_each_teacher_knows(cls: Any, reference: Reference) -> None:
    for chunk in (1, 3, 100):
        case = Case.random(dtype=torch.float64)
        two = of_outputs(case, 3)
        parts: list[Outputs | SparseTarget] = [
            two[0],
            coarsened(logits_of(two[1]), 4, 2.0, fills=True),
            coarsened(logits_of(two[2]), 9, 2.0),
        ]
        weights, valid = shares(case, 3), case.labels != IGNORE_INDEX

        def summed(s: Tensor, t: Tensor, y: Tensor, parts: Any = parts, w: Tensor = weights[valid], labels: Tensor = case.labels) -> Tensor:
            return torch.stack([on_any(reference, s, part, labels, 2.0) * w[:, m] for m, part in enumerate(parts)]).sum(0)

        ours = found(case, MixedTarget(tuple(parts), weights, "apart"), cls(temperature=2.0), chunk=chunk)
        assert_close(ours, case.dense(summed), 1e-10)


def test_forward_kl_apart_has_the_gradient_of_the_mean() -> None:
    case = Case.random(dtype=torch.float64)
    parts, weights = tuple(of_outputs(case, 2)), shares(case, 2)
    apart, mean = (found(case, MixedTarget(parts, weights, how), ForwardKL(2.0)) for how in ("apart", "probabilities"))
    assert gap(apart.features, mean.features) < 1e-12
    assert gap(apart.weight, mean.weight) < 1e-12
    assert apart.value > mean.value  # by the mean of the teachers' divergences from their mean


# ---- several terms


def targets(case: Case) -> dict[str, tuple[Target, Reference]]:
    """One of every kind, with what forward KL at T = 2 is on it."""
    parts, weights = of_outputs(case, 2), shares(case, 2)
    sparse, valid = coarsened(teacher_logits(case), 4, 2.0, fills=True), case.labels != IGNORE_INDEX
    mean = mean_logits([logits_of(p)[valid] for p in parts], weights[valid], 2.0, False)

    def apart(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([on_any(reference_ForwardKL, s, p, case.labels, 2.0) * weights[valid][:, m] for m, p in enumerate(parts)]).sum(0)

    return {
        "sparse": (sparse, lambda s, t, y: on_bins(reference_ForwardKL, s, flat(sparse, case.labels), y, temperature=2.0)),
        "mean": (MixedTarget(tuple(parts), weights, "probabilities"), lambda s, t, y: reference_ForwardKL(s, mean, y, temperature=2.0)),
        "apart": (MixedTarget(tuple(parts), weights, "apart"), apart),
    }


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("closed", [True, False], ids=["closed form", "autograd"])
@pytest.mark.parametrize("kind", ["sparse", "mean", "apart"])
def test_terms_with_and_without_a_teacher(kind: str, closed: bool, norms: bool) -> None:
    case = Case.random(dtype=torch.float64)
    target, reference = targets(case)[kind]
    terms: dict[str, TokenLoss] = {"ce": CrossEntropy(), "kd": ForwardKL(2.0)} | ({} if closed else {"z": ZLoss()})
    references = {"ce": reference_CrossEntropy, "kd": reference, "z": reference_ZLoss}
    weights = {"ce": 0.3, "kd": 1.7, "z": 0.01}
    used = [name for name in references if name in terms]
    true = case.dense(*(references[name] for name in used), weights=tuple(weights[name] for name in used))
    assert_close(found(case, target, terms, weights, 3, norms), true, 1e-10)
    _, sums, squares = chunked_objective(case.student(), target, case.labels, terms, weights, V, 3, norms)
    for name in used:
        alone = case.dense(references[name])
        assert gap(sums[name], alone.value) < 1e-10
        if norms:
            assert gap(squares[name], alone.features.square().sum()) < 1e-10


@pytest.mark.parametrize("kind", ["sparse", "mean", "apart"])
def test_without_grad_mode_the_values_are_the_same(kind: str) -> None:
    case = Case.random(dtype=torch.float64)
    target, reference = targets(case)[kind]
    with torch.no_grad():
        total, _, _ = chunked_objective(case.student(), target, case.labels, {"kd": ForwardKL(2.0)}, {"kd": 1.0}, V, 3)
    assert not total.requires_grad
    assert gap(total, case.dense(reference).value) < 1e-10


@pytest.mark.parametrize("kind", ["mean", "apart"])
def test_no_teacher_of_several_gets_a_gradient(kind: str) -> None:
    case = Case.random(dtype=torch.float64)
    target, _ = targets(case)[kind]
    assert isinstance(target, MixedTarget)
    found(case, target, {"kd": ForwardKL(2.0), "z": ZLoss()})
    for part in target.parts:
        assert isinstance(part, Outputs)
        assert part.features.grad is None
        assert all(p.grad is None for p in part.head.parameters())


def test_a_target_that_no_term_needs_is_not_looked_at() -> None:
    case = Case.random(dtype=torch.float64)
    broken = SparseTarget(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert_close(found(case, broken, CrossEntropy()), case.dense(reference_CrossEntropy), 1e-12)


def test_class_weights_on_bins() -> None:
    case = Case.random(dtype=torch.float64)
    target = coarsened(teacher_logits(case), 4, 2.0, fills=True)
    loss = ClassWeighted(ForwardKL(2.0), FrequencyPower(0.5, cap=None))
    loss.prepare(setting(V))
    n = counts(V).double()
    w = n**-0.5 * n.sum() / (n * n**-0.5).sum()  # 1 on average over the samples

    def weighted(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return w[y] * on_bins(reference_ForwardKL, s, flat(target, case.labels), y, temperature=2.0)

    assert "bins" in loss.supports
    assert_close(found(case, target, loss), case.dense(weighted), 1e-12)
    plain = expected(case, target, reference_ForwardKL, temperature=2.0)
    assert gap(plain.features, case.dense(weighted).features) > 0.1  # the weights are not all 1


def test_an_empty_batch() -> None:
    case = Case.random(mask="all")
    for target, _ in targets(case).values():
        ours = found(case, target, {"ce": CrossEntropy(), "kd": ForwardKL(2.0)})
        assert ours.value.item() == 0
        assert (ours.features == 0).all()
