"""Where the models of a report come from: the teacher of the run, its student before, after and alone, and what was exported."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pytorch_lightning.utilities.seed import isolate_rng
from torch import nn

from distill.data.base import DistillData
from distill.data.loader import EvalLoader
from distill.exact import cast
from distill.module import DistillModule
from distill.report.evidence import ALONE, BEFORE, TEACHER, Evidence, Subject
from distill.report.history import series
from distill.report.observe import observe
from distill.report.student import deployed
from distill.students.lora import merged
from distill.teachers.base import Teacher
from distill.teachers.online import OnlineTeacher
from distill.teachers.own import SelfTeacher
from distill.teachers.several import teachers_of
from distill.types import Batch, ConfigError


class Models:
    """Collects the models of one run, and why one that a reader would expect is not there.

    Args:
        module: of the run, with a trainer, which may have finished.
        folder: `runs/NAME`.
        device: where the models are to be.
    """

    def __init__(self, module: DistillModule, folder: Path, device: torch.device) -> None:
        self.module, self.folder, self.device = module, folder, device
        self.task = module.data.task()
        self.subjects: dict[str, Subject] = {}
        self.absent: dict[str, str] = {}

    def add(self, name: str, model: nn.Module, files: Path | None = None) -> None:
        """Take a model of the task: in `eval`, on the device, without gradients."""
        model = model.to(self.device).eval().requires_grad_(False)
        self.subjects[name] = Subject(partial(self.task.outputs, model), model, files)

    def add_teacher(self) -> None:
        """Take the teacher, if it can say something about any row, and its weights are in one piece."""
        teacher = self.module.teacher
        why = _unusable(teacher)
        if teacher is None or why:
            self.absent[TEACHER] = why
            return
        for part in _online(teacher):
            part.sharded = False  # in one process there is nobody to share it with, and `setup` moves it whole
        teacher.setup(self.task, self.device, self._dtype())
        teacher.check(self.module.data.tokenizer, self.module.data.model_config())
        held = teacher.models()
        model = held[0] if len(held) == 1 and len(teachers_of(teacher)) == 1 else None  # one of several would pass for all of them
        self.subjects[TEACHER] = Subject(teacher, model, Path(teacher.name) if Path(teacher.name).is_dir() else None)

    def add_before(self) -> None:
        """Make the student again as it was before training: it depends on the seed alone."""
        self.module.task, self.module.expected = self.task, self.module.data.model_config()
        teacher = self.module.teacher
        try:
            with isolate_rng():
                student = self.module.new_student(self._dtype())
        except ConfigError as error:
            self.absent[BEFORE] = str(error)
            of_student = teacher is not None and any(isinstance(part, SelfTeacher) for part in teachers_of(teacher))
            if of_student and TEACHER in self.subjects:
                del self.subjects[TEACHER]
                self.absent[TEACHER] = f"it is the student before training, which is not here: {error}"
            return
        if teacher is not None and TEACHER in self.subjects:
            teacher.beside(student.to(self.device))  # one that is the student without its adapters has no other here
        self.add(BEFORE, merged(student))

    def add_alone(self) -> None:
        """Load the baseline, where one was trained."""
        alone = self.folder.with_name(f"{self.folder.name}-alone") / "student"
        if alone.is_dir():
            self.add(ALONE, self.task.load(str(alone), "baseline", dtype=self._dtype()), alone)
        else:
            self.absent[ALONE] = "no student was trained without the teacher; set baseline: true for one"

    def add_saved(self, name: str) -> None:
        """Load the student that the run has left."""
        student = self.folder / "student"
        if not student.is_dir():
            raise ConfigError(
                f"report: there is no student in '{student}'; the run has not finished, go on with --config "
                f"{self.folder / 'config.yaml'} --ckpt_path last"
            )
        self.add(name, self.task.load(str(student), "student", dtype=self._dtype()), student)

    def add_all(self, name: str, student: nn.Module | None = None) -> None:
        """Take the teacher, and the student before, alone, and after.

        Args:
            name: of the student after training.
            student: as it is trained; None for the one that the run has left in its folder.
        """
        self.add_teacher()
        self.add_before()
        self.add_alone()
        if student is None:
            self.add_saved(name)
        else:
            self.add(name, cast(deployed(self.module, student), self._dtype()))

    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.module._dtypes()[0]


def _unusable(teacher: Teacher | None) -> str:
    """Why a teacher cannot be asked about held-out rows; nothing where it can."""
    if teacher is None:
        return "the student was trained without a teacher"
    if recipe := teacher.recipe_needed():
        return f"the teacher {teacher.name} does not exist here; {recipe} makes it"
    if any(part.sharded and part.is_spread for part in _online(teacher)):
        return "the teacher's weights lie on several ranks; `distill report` in one process measures it"
    if teacher.support != "classes":
        return f"the teacher is {teacher.name}, which gives no probabilities of all classes for held-out rows"
    return ""


def _online(teacher: Teacher) -> list[OnlineTeacher]:
    return [part for part in teachers_of(teacher) if isinstance(part, OnlineTeacher)]


def name_of(module: DistillModule) -> str:
    """What the final student is called, in the table at a run's end as in the report."""
    return "student distilled" if module.teacher is not None else "student after"


def evidence(models: Models, student: str, rows: int, exports: Mapping[str, Subject], asked: Mapping[str, Any] | None = None) -> Evidence:
    """Run all models over the held-out rows, and gather what the run left.

    Args:
        models: of the run.
        student: the name of the final one.
        rows: how many held-out rows are looked at, at most.
        exports: of the student, by name.
        asked: keys of the configuration that are other now than when the run began.

    Raises:
        ConfigError: there are no held-out rows.
    """
    data = models.module.data
    batches = held_out(data, rows)
    subjects = {**models.subjects, **exports}
    observed = observe(subjects, batches, data.num_classes, models.device, len(data.val_set) if data.val_set else 0)
    return Evidence(
        folder=models.folder,
        student=student,
        subjects=subjects,
        task=models.task,
        data=data,
        device=models.device,
        batches=batches,
        observed=observed,
        run=read_json(models.folder / "report.json"),
        log=series.read(models.folder / "metrics.jsonl"),
        config=yaml.safe_load((models.folder / "config.yaml").read_text(encoding="utf-8")) | dict(asked or {}),
        absent=models.absent,
    )


def held_out(data: DistillData, rows: int) -> list[Batch]:
    """Held-out rows, evenly spread over all of them (files are often sorted), on this process alone, whatever ranks there are.

    Raises:
        ConfigError: there are none.
    """
    if data.val_set is None:
        raise ConfigError("report: there are no held-out rows to measure on; set data.val_data, or data.val_fraction above 0")
    spread = np.linspace(0, len(data.val_set) - 1, min(rows, len(data.val_set))).round().astype(int)
    return list(EvalLoader(data.val_set.select(spread), data.collator(), data.val_batch_size))


def read_json(path: Path) -> dict[str, Any]:
    """Read `report.json`.

    Raises:
        ConfigError: it is not there, or torn.
    """
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"report: there is no '{path}'; the run has not finished, go on with --config {path.parent / 'config.yaml'} --ckpt_path last"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"report: '{path}' is no JSON: {error}; the run writes it again with --config {path.parent / 'config.yaml'} --ckpt_path last"
        ) from error
    return read
