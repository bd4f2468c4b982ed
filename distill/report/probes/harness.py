"""Benchmarks of language models, by EleutherAI's lm-evaluation-harness, in this process.

Reference: Gao et al., The Language Model Evaluation Harness, doi 10.5281/zenodo.12608602.
"""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn
from transformers import PreTrainedTokenizerBase

from distill.metrics.bootstrap import Interval, Resampler
from distill.report.evidence import NotMeasured
from distill.report.probes.perturb import at_rest

BATCH = 8
DRAWS = 1000  # of the harness's own bootstrap, for metrics that are no mean


@dataclass(frozen=True)
class Score:
    """What a model reached in one metric of one task.

    Attributes:
        value: as the harness gives it.
        error: its standard error, or None.
        examples: the value of each example, by its number, where `value` is their mean; else none.
    """

    value: float
    error: float | None
    examples: Mapping[int, float] = field(default_factory=dict)


Scores = dict[str, dict[str, Score]]
"""By task, by metric; a metric of a filter other than `none` is called `METRIC, FILTER`."""


class Harness:
    """The tasks that were asked for.

    Args:
        tasks: names of the harness's tasks, groups or tags; or folders of task YAMLs, all of whose tasks are taken; one or several.
        limit: examples of each task, or a share of them below 1; None for all.

    Raises:
        NotMeasured: the harness is not installed, or a folder holds no task.
    """

    def __init__(self, tasks: str | Sequence[str], limit: float | None = None) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise NotMeasured("the benchmarks need lm_eval, which is not installed: pip install 'lm_eval>=0.4.13'") from None
        asked = [tasks] if isinstance(tasks, str) else list(tasks)
        folders = [name for name in asked if Path(name).is_dir()]
        self.names = [name for name in asked if name not in folders]
        self.limit = limit
        with _quiet():
            for folder in folders:
                inside = TaskManager(include_path=folder, include_defaults=False).all_subtasks
                if not inside:
                    raise NotMeasured(f"no YAML in '{folder}' describes a task of lm_eval")
                self.names += inside
            self.manager = TaskManager(include_path=folders, include_defaults=len(folders) < len(asked))

    def check(self, name: str) -> None:
        """Load a task, its data too.

        Raises:
            NotMeasured: it cannot be loaded here.
        """
        with _quiet(), _others():
            self.manager.load([name])

    def scores(self, name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> Scores:
        """Run one task, group or tag.

        Args:
            name: one of `names`.
            model: of transformers, a causal language model; left as it was.
            tokenizer: its own.

        Raises:
            NotMeasured: the harness gave up, e.g. because the task's data cannot be loaded here.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        with _quiet(), isolate_rng(), at_rest(model), _others():
            # a copy, for it sets a padding token
            served = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH)
            found = lm_eval.simple_evaluate(
                model=served, tasks=[name], limit=self.limit, task_manager=self.manager, bootstrap_iters=DRAWS, log_samples=True
            )
        assert found is not None, "there is one rank"
        return {task: _metrics(values, found["samples"].get(task, [])) for task, values in found["results"].items()}


def _metrics(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Score]:
    scores = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        examples = {s["doc_id"]: float(s[metric]) for s in samples if s["filter"] == kind and _is_number(s.get(metric))}
        is_mean = bool(examples) and np.isclose(np.mean([*examples.values()]), value, rtol=1e-6, atol=1e-9)
        scores[metric if kind == "none" else f"{metric}, {kind}"] = Score(
            float(value), float(error) if error is not None and _is_number(error) else None, examples if is_mean else {}
        )
    return scores


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and bool(np.isfinite(value))


def interval(score: Score) -> dict[str, float] | float:
    """With its 95 % interval: of the bootstrap over examples; else of the harness's standard error; the value alone where there is none."""
    if len(score.examples) > 1:
        values = _values(score)
        return Resampler(np.arange(len(values))).share(values).as_dict()  # of values beyond [0, 1] it is the plain mean
    if score.error is not None:
        return Interval(score.value, score.value - 1.96 * score.error, score.value + 1.96 * score.error).as_dict()
    return score.value


def difference(a: Score, b: Score) -> dict[str, Any]:
    """a − b, with the interval of the same resamples of examples for both; missing where they have none in common."""
    if a.examples.keys() != b.examples.keys() or len(a.examples) < 2:
        return {"missing": "the harness gives no values of single examples that could be paired"}
    return Resampler(np.arange(len(a.examples))).difference(_values(a), _values(b)).as_dict()


def _values(score: Score) -> NDArray[np.float64]:
    return np.array([score.examples[number] for number in sorted(score.examples)])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from warning of what is meant."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


@contextmanager
def _others() -> Iterator[None]:
    """Say what went wrong in code, files and hosts of others: whatever it was, the rest of the report is worth having."""
    try:
        yield
    except Exception as error:
        raise NotMeasured(f"lm_eval could not run it: {type(error).__name__}: {str(error)[:300]}") from error
