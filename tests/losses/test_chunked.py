from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distill.losses.base import TokenLoss
from distill.losses.chunked import chunk_size, chunked_objective, chunks, flatten
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.losses.support import Distribution
from distill.types import IGNORE_INDEX, Outputs, SparseTarget
from tests.losses.dense import Case, assert_close, gap, linear
from tests.losses.test_divergence import reference_ForwardKL
from tests.losses.test_hard import reference_CrossEntropy

BOTH = {"ce": CrossEntropy(), "kd": ForwardKL(2.0)}
WEIGHTS = {"ce": 0.3, "kd": 1.7}


def dense_objective(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    """0.3 CE + 1.7 KL at T = 2, in what torch has."""
    kl = F.kl_div((student_logits / 2).log_softmax(-1), (teacher_logits / 2).softmax(-1), reduction="sum") * 4
    return 0.3 * F.cross_entropy(student_logits, labels, reduction="sum") + 1.7 * kl


class Recorder(TorchDispatchMode):
    """Note the largest storage that any operation gives, in elements, and how many matrix products there are."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


# ---- value and gradient


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("mask", ["none", "some", "one", "all"])
def test_two_weighted_losses_equal_dense_autograd(mask: str, chunk: int) -> None:
    case = Case.random(mask=mask, dtype=torch.float64)

    def kl_at_two(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return reference_ForwardKL(student, teacher, labels, temperature=2.0)

    expected = case.dense(reference_CrossEntropy, kl_at_two, weights=(0.3, 1.7))
    assert_close(case.chunked(BOTH, WEIGHTS, chunk), expected, 1e-12)


def test_each_terms_own_sum_is_unweighted_and_detached() -> None:
    case = Case.random(dtype=torch.float64)
    total, sums, _ = chunked_objective(case.student(), case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes, 3)
    assert list(sums) == ["ce", "kd"]
    assert gap(sums["ce"], case.dense(reference_CrossEntropy).value) < 1e-12
    assert gap(total.detach(), 0.3 * sums["ce"] + 1.7 * sums["kd"]) < 1e-12
    assert total.requires_grad
    assert not any(value.requires_grad for value in sums.values())


def test_what_comes_after_scales_the_gradient() -> None:
    case = Case.random(dtype=torch.float64)
    once = case.chunked(BOTH, WEIGHTS)
    student = case.student()
    total, _, _ = chunked_objective(student, case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes, 3)
    (total / 7 + 5).backward()
    assert student.features.grad is not None
    assert gap(student.features.grad, once.features / 7) < 1e-12


def test_a_head_with_bias_and_a_transform() -> None:
    torch.manual_seed(0)
    features, labels = torch.randn(3, 4, 5, dtype=torch.float64), torch.randint(6, (3, 4))
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    found, expected = ([x.clone().requires_grad_() for x in (features, weight, bias)] for _ in range(2))

    head = nn.Sequential(linear(found[1].detach(), found[2].detach()), nn.Tanh())
    total, _, _ = chunked_objective(Outputs(found[0], head), None, labels, {"ce": CrossEntropy()}, {"ce": 1.0}, 6, 5)
    total.backward()
    F.cross_entropy(F.linear(expected[0], expected[1], expected[2]).tanh().flatten(0, 1), labels.flatten(), reduction="sum").backward()
    for ours, reference in zip((found[0], *head.parameters()), expected, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)


def test_a_tied_weight_gets_the_sum_of_both_gradients() -> None:
    torch.manual_seed(0)
    ids, labels = torch.randint(9, (2, 5)), torch.randint(9, (2, 5))
    weight, teacher = torch.randn(9, 4, dtype=torch.float64), torch.randn(2, 5, 9, dtype=torch.float64)

    head = linear(weight)
    trunk = F.embedding(ids, head.weight).cumsum(1)  # the same Parameter in the trunk and in the head
    total, _, _ = chunked_objective(Outputs(trunk, head), Outputs(teacher, nn.Identity()), labels, BOTH, WEIGHTS, 9, 3)
    total.backward()

    leaf = weight.clone().requires_grad_()
    dense_objective(
        (F.embedding(ids, leaf).cumsum(1) @ leaf.T).flatten(0, 1), teacher.flatten(0, 1).log_softmax(-1), labels.flatten()
    ).backward()
    torch.testing.assert_close(head.weight.grad, leaf.grad)


def test_a_frozen_head_gets_no_gradient_and_costs_none() -> None:
    case = Case.random(shape=(1, 8), mask="none")
    products = {}
    for trainable in (True, False):
        student, teacher = case.student(), case.teacher()
        student.head.requires_grad_(trainable)
        with Recorder() as seen:
            total, _, _ = chunked_objective(student, teacher, case.labels, BOTH, WEIGHTS, case.num_classes, 4)
        total.backward()
        products[trainable] = seen.products
        assert student.features.grad is not None
        assert (next(student.head.parameters()).grad is not None) == trainable
    assert products == {True: 2 * 4, False: 2 * 3}  # two chunks: both heads, the features' gradient, and the weight's or not


def test_a_trained_head_on_frozen_features() -> None:
    case = Case.random(dtype=torch.float64)
    head = linear(case.student_weight)
    total, _, _ = chunked_objective(Outputs(case.student_features, head), case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes, 3)
    total.backward()
    assert gap(_grad(head.weight), case.chunked(BOTH, WEIGHTS).weight) < 1e-12


class LowRankHead(nn.Module):
    """A frozen projection with a trained low-rank update, as LoRA on the head makes it."""

    def __init__(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.frozen = nn.Parameter(weight, requires_grad=False)
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, features: Tensor) -> Tensor:
        return features @ self.frozen.T + (features @ self.a.T) @ self.b.T


def test_extra_parameters_of_a_head_get_gradients() -> None:
    case = Case.random(dtype=torch.float64)
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64)
    head = LowRankHead(case.student_weight, a, b)
    total, _, _ = chunked_objective(Outputs(case.student_features, head), case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes, 3)
    total.backward()

    leaf_a, leaf_b, valid = a.clone().requires_grad_(), b.clone().requires_grad_(), case.labels != IGNORE_INDEX
    logits = case.student_features @ (case.student_weight + leaf_b @ leaf_a).T
    teacher = case.teacher_features @ case.teacher_weight.T
    dense_objective(logits[valid][:, : case.num_classes], teacher[valid][:, : case.num_classes], case.labels[valid]).backward()
    torch.testing.assert_close(head.a.grad, leaf_a.grad)
    torch.testing.assert_close(head.b.grad, leaf_b.grad)
    assert head.frozen.grad is None


class Focal(TokenLoss):
    """A loss that learns: cross-entropy times a weight for each class."""

    needs_teacher = False

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, num_classes, dtype=torch.float64))

    def forward(self, student: Distribution, teacher: Distribution, labels_N: Tensor) -> Tensor:
        return self.scale[labels_N] * F.nll_loss(student.logp(), labels_N, reduction="none")


def test_a_parameter_of_a_loss_gets_its_gradient() -> None:
    case = Case.random(dtype=torch.float64, mask="none")
    loss = Focal(case.num_classes)
    case.chunked({"focal": loss, "kd": ForwardKL()}, {"focal": 0.5, "kd": 1.0}, chunk=3)
    logits = (case.student_features @ case.student_weight.T)[..., : case.num_classes].flatten(0, 1)
    ce = F.cross_entropy(logits, case.labels.flatten(), reduction="none")
    expected = torch.zeros(case.num_classes, dtype=torch.float64).index_add_(0, case.labels.flatten(), 0.5 * ce)
    torch.testing.assert_close(loss.scale.grad, expected)


def test_one_loss_under_two_names_does_not_double_its_gradient() -> None:
    case = Case.random(dtype=torch.float64)
    one, shared = Focal(case.num_classes), Focal(case.num_classes)
    case.chunked({"a": one}, {"a": 2.0})
    case.chunked({"a": shared, "b": shared}, {"a": 1.0, "b": 1.0})
    torch.testing.assert_close(shared.scale.grad, one.scale.grad)


# ---- precision


@pytest.mark.parametrize("measured_before", [False, True], ids=["alone", "after a no_grad pass in the same autocast"])
def test_under_autocast(measured_before: bool) -> None:
    case = Case.random(shape=(4, 16), num_classes=50, widths=(32, 48))
    student, head = case.student(), linear(case.student_weight)
    with torch.autocast("cpu", torch.bfloat16):
        if measured_before:  # autocast keeps the cast weight: one that was cast without a graph must not be used with one
            with torch.no_grad():
                chunked_objective(Outputs(student.features, head), case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes)
        total, _, _ = chunked_objective(Outputs(student.features, head), case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes, 7)
    total.backward()
    assert total.dtype == torch.float32
    assert _grad(student.features).dtype == torch.float32
    expected = case.chunked(BOTH, WEIGHTS)  # all in float32
    assert gap(_grad(head.weight), expected.weight) < 1e-2
    assert gap(_grad(student.features), expected.features) < 1e-2


def test_bfloat16_head_gradient_is_summed_in_float32() -> None:
    # 600 equal contributions: summed in bf16, one at a time, the sum would stop at 256 times the first
    features, head = torch.ones(1, 600, 1, dtype=torch.bfloat16), linear(torch.zeros(2, 1, dtype=torch.bfloat16))
    labels = torch.zeros(1, 600, dtype=torch.long)
    total, _, _ = chunked_objective(Outputs(features, head), None, labels, {"ce": CrossEntropy()}, {"ce": 1.0}, 2, 1)
    total.backward()
    assert _grad(head.weight).flatten().tolist() == [-300.0, 300.0]  # (q − 1, q) with q = 1/2, times 600


def test_a_loss_scale_protects_a_float16_head() -> None:
    torch.manual_seed(0)
    features, weight = torch.randn(32, 64).half(), (torch.randn(32000, 64) / 4).half()
    logits = F.linear(features, weight).float()
    teacher = logits + 0.01 * torch.randn(32, 32000)  # a student that is close, as late in training
    x, head = features[None].requires_grad_(), linear(weight)
    labels = torch.zeros(1, 32, dtype=torch.long)
    total, _, _ = chunked_objective(
        Outputs(x, head), Outputs(teacher[None], nn.Identity()), labels, {"kd": ForwardKL(2.0)}, {"kd": 1.0}, 32000
    )
    (total * 1024).backward()  # what a GradScaler does

    gradient = 2 * ((logits.double() / 2).softmax(-1) - (teacher.double() / 2).softmax(-1))  # T (q − p), of the same logits
    expected = 1024 * gradient @ weight.double()
    assert gap(_grad(x)[0], expected) < 5e-3  # dense autograd with the same scale: 1.3e-3


# ---- edges


def test_backward_twice_is_refused() -> None:
    case = Case.random()
    total, _, _ = chunked_objective(case.student(), case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradient was already used; call backward once per forward"):
        total.backward()


def test_without_grad_mode_there_are_only_values() -> None:
    case = Case.random(dtype=torch.float64)
    with torch.no_grad():
        total, sums, _ = chunked_objective(case.student(), case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes, 3)
    assert not total.requires_grad
    assert gap(total, case.chunked(BOTH, WEIGHTS).value) < 1e-12
    assert gap(total, 0.3 * sums["ce"] + 1.7 * sums["kd"]) < 1e-12


def test_an_all_masked_batch_gives_zeros() -> None:
    case = Case.random(mask="all")
    student = case.student()
    total, sums, _ = chunked_objective(student, case.teacher(), case.labels, BOTH, WEIGHTS, case.num_classes)
    total.backward()
    assert total.item() == 0
    assert all(value.item() == 0 for value in sums.values())
    for tensor in (student.features, *student.head.parameters()):
        assert (_grad(tensor) == 0).all()


def test_masked_positions_get_a_gradient_of_exactly_zero() -> None:
    case = Case.random()
    found = case.chunked(BOTH, WEIGHTS)
    masked = case.labels == IGNORE_INDEX
    assert (found.features[masked] == 0).all()
    assert (found.features[~masked] != 0).any(-1).all()


def test_no_token_loss_at_all() -> None:
    case = Case.random()
    total, sums, _ = chunked_objective(case.student(), case.teacher(), case.labels, {}, {}, case.num_classes)
    assert total.item() == 0
    assert sums == {}


@pytest.mark.parametrize("label", [13, 15, 1000, -1], ids=["padding", "padding too", "beyond the head", "negative"])
def test_a_label_that_is_no_class_is_an_error(label: int) -> None:
    case = Case.random()  # 13 classes, a head of 16
    case.labels[0, 0] = label
    with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|[Tt]arget"):
        case.chunked({"ce": CrossEntropy()})


def test_flatten_keeps_valid_positions_in_order() -> None:
    features = torch.arange(6.0).view(2, 3, 1)
    labels = torch.tensor([[IGNORE_INDEX, 4, 5], [6, IGNORE_INDEX, IGNORE_INDEX]])
    student, target, kept = flatten(Outputs(features, nn.Identity()), Outputs(10 * features, nn.Identity()), labels, 1)
    assert student.flatten().tolist() == [1, 2, 3]
    assert target is not None
    side = target(slice(0, 3))(slice(0, 3))
    assert isinstance(side, Distribution)
    assert side.logits_NV.flatten().tolist() == [10, 20, 30]
    assert kept.tolist() == [4, 5, 6]
    assert flatten(Outputs(features, nn.Identity()), None, labels, 1)[1] is None


def test_chunks_cover_every_position_once() -> None:
    for n in range(12):
        for size in range(1, 14):
            assert [i for part in chunks(n, size) for i in range(n)[part]] == list(range(n))


@pytest.mark.parametrize("num_classes", [2, 32000, 128256, 10**9])
def test_chunk_size_bounds_the_logits(num_classes: int) -> None:
    for device, limit in (("cpu", 2**23), ("cuda", 2**27)):
        size = chunk_size(num_classes, torch.device(device))
        assert size >= 16
        assert size <= 512 or size * num_classes <= limit


# ---- memory


@pytest.mark.parametrize(("chunk", "share"), [(None, 0.6), (256, 0.15)])
def test_no_tensor_of_tokens_times_classes_exists(chunk: int | None, share: float) -> None:
    n, v = 2048, 8192
    case = Case.random(shape=(1, n), num_classes=v, padding=(0, 64), widths=(16, 24), mask="none")
    student, teacher = case.student(), case.teacher()
    with Recorder() as seen:
        total, _, _ = chunked_objective(student, teacher, case.labels, BOTH, WEIGHTS, v, chunk)
        total.backward()
    assert seen.largest <= share * n * v

    with Recorder() as dense, torch.no_grad():
        student.head(student.features)
    assert dense.largest >= n * v  # the same recorder sees what is there


def test_no_tensor_of_tokens_times_classes_exists_with_a_sparse_target() -> None:
    n, v, k = 2048, 8192, 16
    case = Case.random(shape=(1, n), num_classes=v, padding=(0, 0), widths=(16, 24), mask="none")
    student, ids = case.student(), torch.arange(k).expand(1, n, k)
    target = SparseTarget(ids, torch.full((1, n, k), 0.9 / k), torch.full((1, n), 0.1), 2.0)
    with Recorder() as seen:
        total, _, _ = chunked_objective(student, target, case.labels, BOTH, WEIGHTS, v, 256)
        total.backward()
    assert seen.largest <= 0.15 * n * v
    assert seen.products == 3 * n // 256  # logits, and the gradients of features and head: no teacher's head


def _grad(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


# ---- norms


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("mask", ["none", "some", "all"])
def test_squares_are_those_of_each_terms_own_gradient(mask: str, chunk: int) -> None:
    case = Case.random(mask=mask, dtype=torch.float64)
    losses = {"ce": CrossEntropy(), "kd": ForwardKL()}
    plain, _, none = chunked_objective(case.student(), case.teacher(), case.labels, losses, WEIGHTS, case.num_classes, chunk)
    total, _, squares = chunked_objective(case.student(), case.teacher(), case.labels, losses, WEIGHTS, case.num_classes, chunk, norms=True)
    assert none == {}
    assert gap(total, plain) < 1e-12
    for name, reference in (("ce", reference_CrossEntropy), ("kd", reference_ForwardKL)):
        assert gap(squares[name], case.dense(reference).features.square().sum()) < 1e-12


def test_measuring_one_weighted_term_changes_no_gradient() -> None:
    case = Case.random(dtype=torch.float64)
    found = []
    for norms in (False, True):
        student = case.student()
        total, _, _ = chunked_objective(
            student, case.teacher(), case.labels, {"kd": ForwardKL()}, {"kd": 0.1}, case.num_classes, 3, norms=norms
        )
        total.backward()
        found.append((_grad(student.features), _grad(next(student.head.parameters()))))
    for plain, measured in zip(*found, strict=True):
        assert gap(measured, plain) < 1e-12


def test_a_frozen_trunk_is_measured_all_the_same() -> None:
    case = Case.random(dtype=torch.float64)
    head = linear(case.student_weight)
    student = Outputs(case.student_features, head)
    _, _, squares = chunked_objective(
        student, case.teacher(), case.labels, {"kd": ForwardKL()}, {"kd": 0.1}, case.num_classes, 3, norms=True
    )
    assert gap(squares["kd"], case.dense(reference_ForwardKL).features.square().sum()) < 1e-12


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("weight", [1e-6, 1.0, 500.0])
def test_a_float16_head_holds_gradients_of_any_size(weight: float, norms: bool) -> None:
    torch.manual_seed(0)
    features, weights = torch.randn(1, 32, 64).half(), (torch.randn(300, 64) / 4).half()
    teacher, labels = 3 * torch.randn(1, 32, 300), torch.randint(300, (1, 32))
    x, head = features.clone().requires_grad_(), linear(weights)
    terms = {"ce": CrossEntropy(), "kd": ForwardKL(4.0)}
    total, _, _ = chunked_objective(
        Outputs(x, head), Outputs(teacher, nn.Identity()), labels, terms, dict.fromkeys(terms, weight), 300, norms=norms
    )
    total.backward()
    leaf = F.linear(features[0], weights).double().requires_grad_()
    p = (teacher[0].double() / 4).softmax(-1)
    kl = 16 * (p * (p.log() - (leaf / 4).log_softmax(-1))).sum()
    (F.cross_entropy(leaf, labels[0], reduction="sum") + kl).backward()
    expected = weight * leaf.grad @ weights.double()
    if weight == 500.0:  # the features' gradient itself, which autograd wants in float16, is near the end of it
        expected = expected.clamp(-65504, 65504)
    assert gap(_grad(x)[0].clamp(-65504, 65504), expected) < 2e-2 if weight > 1e-3 else _grad(x).isfinite().all()
    assert _grad(head.weight).float().abs().max() > 0


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.random(shape=(1, 9), mask="none", dtype=torch.float64)
    whole = case.chunked(BOTH, WEIGHTS, chunk=9)
    for rows in (1, 2, 4):
        monkeypatch.setattr("distill.losses.chunked.block_size", lambda *_, rows=rows: rows)
        assert_close(case.chunked(BOTH, WEIGHTS, chunk=9), whole, 1e-12)
