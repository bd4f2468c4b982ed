"""The objective `Σ_i w_i L_i` of a micro-batch, whatever its terms are; and what is said of the terms before and after."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor, nn

from distill.balance.base import Measured
from distill.balance.branch import Branch
from distill.losses.base import Loss, Term, TokenLoss
from distill.losses.chunked import chunked_objective
from distill.losses.hard import CrossEntropy
from distill.parallel.gather import gathered
from distill.types import Batch, ConfigError, MixedTarget, Outputs, Support, Target
from distill.window import Micro

RESERVED = {"loss", "lr", "grad_norm"}


def check(terms: Mapping[str, Term], with_teacher: bool) -> None:
    """Look at the terms by themselves.

    Raises:
        ConfigError: there are none, one needs a teacher where there is none, or is called like a figure of the log.
    """
    if not terms:
        raise ConfigError("model.losses is empty; give at least one term, e.g. ce: CrossEntropy")
    if taken := set(terms) & RESERVED:
        raise ConfigError(f"model.losses: {sorted(taken)} are names of the log; call the terms otherwise, e.g. kd")
    needing = [name for name, loss in terms.items() if loss.needs_teacher]
    if needing and not with_teacher:
        raise ConfigError(f"model.losses: {needing} need a teacher, but model.teacher is not set; set it, or keep only hard losses")


def check_support(terms: Mapping[str, Term], support: Support) -> None:
    """Make sure that every term is right on the kind of target that the teacher gives.

    Raises:
        ConfigError: one is not; the message says what it needs.
    """
    for name, loss in terms.items():
        if loss.needs_teacher and support not in loss.supports:
            wanted = " or ".join(words for kind, words in WHAT.items() if kind in loss.supports)
            raise ConfigError(
                f"model.losses.{name}: {type(loss).__name__} needs {wanted}, but model.teacher gives {WHAT[support]}; {_INSTEAD[support]}"
            )


WHAT: dict[Support, str] = {
    "classes": "the probabilities of all classes",
    "bins": "the likeliest classes and one bin for the rest",
    "draws": "classes drawn at random",
    "text": "a target in the tokens of another tokenizer",
}
_INSTEAD: dict[Support, str] = {
    "classes": "take a term on classes, e.g. ForwardKL",
    "bins": "take a divergence that holds on bins, e.g. ForwardKL or JensenShannon, or a teacher in memory",
    "draws": "take ForwardKL, of which draws give an unbiased gradient, or a store of the likeliest classes",
    "text": "take a term across tokenizers, or a teacher with the student's tokenizer",
}


def check_checkpoint(losses: nn.ModuleDict, state_dict: Mapping[str, Tensor]) -> None:
    """Make sure that a checkpoint holds what the terms have learned themselves, and nothing of other terms.

    Raises:
        ConfigError: it does not; the message names the terms.
    """
    ours = {f"losses.{key}" for key in losses.state_dict()}
    theirs = {key for key in state_dict if key.startswith("losses.")}
    if ours != theirs:
        names = sorted({key.split(".")[1] for key in ours ^ theirs})
        raise ConfigError(
            f"the checkpoint and model.losses do not have the same parameters in {names}, e.g. projectors; resume with the terms that "
            "it was made with, or start a new run from its student folder"
        )


def without_teacher(terms: Mapping[str, Term], weights: Mapping[str, float]) -> tuple[dict[str, Term], dict[str, float]]:
    """Give the terms that need no teacher with the ratios of their weights, the heaviest that teaches weighing 1.

    Cross-entropy joins where none of them teaches: nothing, or a z-loss alone, is no baseline.
    """
    hard = {name: loss for name, loss in terms.items() if not loss.needs_teacher}
    teaching = [name for name, loss in hard.items() if not loss.regulariser and weights[name] > 0]
    heaviest = max((weights[name] for name in teaching), default=max(weights.values()))
    fixed = {name: weights[name] / heaviest for name in hard}
    if not teaching:
        name = "ce" if "ce" not in hard else "cross_entropy"
        hard, fixed = {**hard, name: CrossEntropy()}, {**fixed, name: 1.0}
    return hard, fixed


def evaluate(
    terms: Mapping[str, Term],
    weights: Mapping[str, float],
    student: Outputs,
    teacher: Target | None,
    batch: Batch,
    num_classes: int,
    chunk: int | None = None,
    norms: bool = False,
) -> Micro:
    """Evaluate the weighted sum of the terms over the valid positions of a micro-batch.

    Args:
        terms: by name.
        weights: w_i by the same names.
        student: with the taps that the terms asked for; receives the gradient.
        teacher: the same, or None where no term needs one.
        batch: the micro-batch.
        num_classes: V.
        chunk: valid tokens at a time, see `chunked_objective`.
        norms: whether each term's gradient is measured at its branch point.
    """
    token = {name: loss for name, loss in terms.items() if isinstance(loss, TokenLoss)}
    with heads_gathered(student, teacher, token.values()) as sides:
        total, sums, squares = chunked_objective(*sides, batch["labels"], token, weights, num_classes, chunk, norms)
        branches = {}
        for name, loss in terms.items():
            if isinstance(loss, Loss):
                branch = branches[name] = Branch(_read(loss, student), norms)
                value = branch.of(loss(_seen(sides[0], branch), sides[1], batch))
                total = total + weights[name] * value
                sums[name] = value.detach()
    return Micro(total, {name: sums[name] for name in terms}, squares, branches, norms)


_FEATURES = ""  # no tap is called so


def _read(loss: Loss, student: Outputs) -> dict[str, Tensor]:
    """What a term reads of the student, and sends its gradient back through."""
    return {tap: student.taps[tap] for tap in loss.student_taps} | ({_FEATURES: student.features} if loss.on_features else {})


def _seen(student: Outputs, branch: Branch) -> Outputs:
    return replace(student, features=branch.taps.get(_FEATURES, student.features), taps=branch.taps)


@contextmanager
def heads_gathered(student: Outputs, teacher: Target | None, losses: Iterable[TokenLoss] = ()) -> Iterator[tuple[Outputs, Target | None]]:
    """Hold the weights of both heads, and of what else is called chunk by chunk, whole: gathered once; every rank must come here."""
    with ExitStack() as stack:
        head = stack.enter_context(gathered(student.head, *losses))
        yield replace(student, head=head), _gathered(stack, teacher)


def _gathered(stack: ExitStack, target: Target | None) -> Target | None:
    whole = lambda part: replace(part, head=stack.enter_context(gathered(part.head))) if isinstance(part, Outputs) else part  # noqa: E731
    if isinstance(target, MixedTarget):
        return replace(target, parts=tuple(whole(part) for part in target.parts))
    return whole(target)


def figures(terms: Mapping[str, Term], weights: Mapping[str, float], measured: Measured) -> dict[str, float]:
    """What is logged of each term beside its loss, by `train/NAME_…`: weight, weighted loss, norm of the gradient, schedules."""
    found = {f"{n}_{k}": v for n, loss in terms.items() for k, v in loss.scheduled().items()}
    found |= {f"{name}_weight": weight for name, weight in weights.items()}
    found |= {f"{name}_weighted": weights[name] * value for name, value in measured.losses.items()}
    found |= {f"{name}_grad_norm": value for name, value in measured.norms.items()}
    return {f"train/{name}": value for name, value in found.items()}


def exact_figures(terms: Mapping[str, Term], gram: Tensor) -> dict[str, float]:
    """The norms of the gradients on the parameters, by `train/NAME_grad_norm_exact`."""
    return {f"train/{name}_grad_norm_exact": norm for name, norm in zip(terms, gram.diagonal().sqrt().tolist(), strict=True)}
