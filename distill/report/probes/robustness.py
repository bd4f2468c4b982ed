"""Teacher and student on the same disturbed rows: what each still has right at every strength, and who keeps more of its own accuracy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from distill.metrics.bootstrap import Interval, Resampler
from distill.metrics.margin import radii, robust
from distill.report.evidence import TEACHER, Bools, Evidence, NotMeasured
from distill.report.probes.linear_head import linear_head
from distill.report.probes.perturb import Probe, labels_and_rows, some_rows
from distill.tasks import unwrap
from distill.types import IGNORE_INDEX, Batch, DataError

EPSILONS = (0.02, 0.05, 0.1, 0.2)
STRENGTHS: dict[str, tuple[float, ...]] = {
    "margin": EPSILONS,
    "fgsm": EPSILONS,
    "pgd": (0.05, 0.2),  # the slowest; at a small ε it does little that one step does not
    "noise": (0.5, 1.0, 2.0),
    "replaced": (0.1, 0.2, 0.4),
}
ATTACKS = ("fgsm", "pgd")
PGD_STEPS = 3
ROWS, TOKENS = 64, 2048  # that are attacked, at most; of rows that are only disturbed four times and twice as many
WORK = 5e9  # weights × tokens of one forward pass over what is attacked: on one core all strengths take seconds
GPU = 100  # times as much on anything faster
FEWEST = 8  # rows, whatever they take


class Rights(NamedTuple):
    """Whether a model is right at each position, undisturbed and at every strength; and what is to be said of how it was found."""

    at: list[Bools]
    note: str = ""


def measure(evidence: Evidence) -> dict[str, Any]:
    """Put teacher and final student to every test.

    Raises:
        NotMeasured: neither can be.
    """
    models, absent = _models(evidence)
    batches = {"attacked": _rows(evidence, models.values(), 1), "disturbed": _rows(evidence, models.values(), 2)}
    found: dict[str, dict[str, Rights | str]] = {test: {} for test in STRENGTHS}
    for name, model in models.items():
        make = partial(Probe, model, evidence.task, num_classes=evidence.data.num_classes, device=evidence.device)
        try:
            probes = {size: make(batches=some) for size, some in batches.items()}
        except NotMeasured as error:
            absent[name] = str(error)
            continue
        for test in STRENGTHS:
            found[test][name] = _ask(test, probes["attacked" if test in ATTACKS else "disturbed"], evidence)
    if len(absent) == 2:
        raise NotMeasured(" ".join(f"{name}: {why}." for name, why in absent.items()))
    resamplers = {size: Resampler(labels_and_rows(some)[1]) for size, some in batches.items()}
    return {
        "names": [*evidence.subjects],
        "student": evidence.student,
        "absent": absent,
        "unit": evidence.task.unit,
        "of_rows": evidence.observed.of_rows,
        "rows": {size: int(resampler.rows.max()) + 1 for size, resampler in resamplers.items()},
        "positions": {size: len(resampler.rows) for size, resampler in resamplers.items()},
        "tests": {
            test: {
                "strengths": [0.0, *STRENGTHS[test]],
                **_figures(resamplers["attacked" if test in ATTACKS else "disturbed"], of_models, evidence.student),
            }
            for test, of_models in found.items()
        },
    }


def _models(evidence: Evidence) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Teacher and final student, those that are modules; of the others why not."""
    models, absent = {}, {}
    for name in (TEACHER, evidence.student):
        subject = evidence.subjects.get(name)
        if subject is None:
            absent[name] = evidence.absent.get(name, "it is not here")
        elif subject.model is None:
            absent[name] = "it is no module of torch in this process, so that its embeddings cannot be reached"
        else:
            models[name] = subject.model
    if not models:
        raise NotMeasured(" ".join(f"{name}: {why}." for name, why in absent.items()))
    return models, absent


def _rows(evidence: Evidence, models: Iterable[nn.Module], times: int) -> list[Batch]:
    work = WORK * (1 if evidence.device.type == "cpu" else GPU)
    longest = max(batch["input_ids"].shape[1] for batch in evidence.batches)
    tokens = max(FEWEST * longest, min(TOKENS, int(work / max(map(_passed, models)))))
    return some_rows(evidence.batches, ROWS * times**2, tokens * times, evidence.data.pad_id)


def _passed(model: nn.Module) -> int:
    """Weights that a token passes through: all but a table of embeddings that is no head as well."""
    inner = unwrap(model)
    table, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    return sum(p.numel() for p in inner.parameters()) - (0 if tied else table.weight.numel())


def _ask(test: str, probe: Probe, evidence: Evidence) -> Rights | str:
    try:
        return _TESTS[test](probe, evidence)
    except NotMeasured as error:
        return str(error)


def margin(probe: Probe, epsilons: Sequence[float]) -> Rights:
    """What stays right whatever moves the features before a linear head by no more than ε times their root mean square each.

    Raises:
        NotMeasured: the head is not linear.
    """
    heads = [linear_head(probe.model, probe.task, batch, probe.num_classes) for batch in probe.batches]
    features = torch.cat([head.features for head in heads])
    labels = torch.cat([batch["labels"][batch["labels"] != IGNORE_INDEX] for batch in probe.batches])
    found = radii(features, heads[0].weight, heads[0].bias, labels)
    if (robust(found.values, 0.0).numpy(force=True) != probe.clean).mean() > 0.01:  # ties and rounding are rarer
        raise NotMeasured("its last linear layer does not decide as the model does, so that its margin has no closed form")
    scale = float(features.float().square().mean().sqrt())
    note = "" if found.exact else f"an upper bound: of the other classes the {found.competitors} likeliest were looked at"
    return Rights([probe.clean, *(robust(found.values, epsilon * scale).numpy(force=True) for epsilon in epsilons)], note)


_TESTS: Mapping[str, Callable[[Probe, Evidence], Rights]] = {
    "margin": lambda probe, _: margin(probe, STRENGTHS["margin"]),
    "fgsm": lambda probe, _: Rights([probe.clean, *probe.fgsm(STRENGTHS["fgsm"])]),
    "pgd": lambda probe, _: Rights([probe.clean, *(probe.pgd(epsilon, PGD_STEPS) for epsilon in STRENGTHS["pgd"])]),
    "noise": lambda probe, _: Rights([probe.clean, *(probe.noisy(sigma) for sigma in STRENGTHS["noise"])]),
    "replaced": lambda probe, evidence: Rights(
        [probe.clean, *(probe.replaced(share, evidence.data.tokenizer.all_special_ids) for share in STRENGTHS["replaced"])]
    ),
}


def _figures(resampler: Resampler, found: Mapping[str, Rights | str], student: str) -> dict[str, Any]:
    """Accuracy at every strength; the share of its own accuracy that a model keeps; and how much more of it the student does."""
    models: dict[str, Any] = {}
    pairs: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
    for name, rights in found.items():
        if isinstance(rights, str):
            models[name] = {"missing": rights}
            continue
        right = np.stack(rights.at).astype(np.float64)
        pairs[name] = right[1:].mean(axis=0), right[0]
        accuracy = [or_missing(partial(resampler.share, each)) for each in right]
        models[name] = {"accuracy": accuracy, "kept": or_missing(partial(kept, resampler, pairs[name])), "note": rights.note}
    if len(pairs) < 2:
        return {"models": models, "difference": {"missing": "there is only one to look at"}}
    return {"models": models, "difference": or_missing(partial(difference, resampler, pairs[student], pairs[TEACHER]))}


def kept(resampler: Resampler, pair: tuple[NDArray[np.float64], NDArray[np.float64]]) -> Interval:
    """The share of its accuracy that a model keeps on average over the strengths, `mean_s a(s) / a(0)`.

    Args:
        resampler: of the positions.
        pair: both `[N]`: at how many of the strengths a position is right, as a share; whether it is right undisturbed.
    """
    return resampler.ratio(*pair)


def difference(
    resampler: Resampler,
    student: tuple[NDArray[np.float64], NDArray[np.float64]],
    teacher: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> Interval:
    """What the student keeps less what the teacher keeps, paired; below 0 the student falls faster.

    Raises:
        DataError: one of them is never right.
    """
    columns = np.stack([*student, *teacher], axis=1)
    value = _gap(columns.sum(axis=0))
    if np.isnan(value):
        raise DataError("undisturbed, one of them is never right, so that there is nothing to keep")
    return resampler.interval(float(value), _gap(resampler.sums(columns)))


def _gap(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    a, b, c, d = sums.T
    there = (b > 0) & (d > 0)
    return np.where(there, a / np.where(there, b, 1) - c / np.where(there, d, 1), np.nan)


def or_missing(make: Callable[[], Interval]) -> dict[str, Any]:
    """A figure for `report.json`, or why there is none."""
    try:
        return make().as_dict()
    except DataError as error:
        return {"missing": str(error)}
