"""A frozen teacher and a student, made, looked at and measured side by side; how the student is trained is `module.py`'s."""

import os
from typing import Any

import pytorch_lightning as pl
import torch
from peft import PeftModel
from pytorch_lightning.utilities.seed import isolate_rng
from torch import Tensor, nn
from transformers import PreTrainedModel

from distill import hub, objective
from distill.checks import check_length, check_packing
from distill.compress.base import Compression
from distill.compress.integers import forget
from distill.data.base import DistillData
from distill.data.loader import Loader
from distill.exact import exact_buffers, put_back
from distill.layers import layers_of
from distill.losses.base import Loss, Setting, Term
from distill.losses.measure import measure
from distill.stopwatch import Stopwatch
from distill.students.base import Student
from distill.tasks import Task, unwrap
from distill.teachers.base import Teacher
from distill.teachers.several import teachers_of
from distill.types import Batch, ConfigError, Outputs, Target


class Pair(pl.LightningModule):
    """Holds both models and the terms that compare them. The teacher stays outside the module tree: it is in no `state_dict`, optimizer,
    checkpoint or DDP bucket.

    Args:
        student: makes the model to train.
        losses: the terms, by the names they are logged under.
        teacher: gives the target; None for plain training.

    Raises:
        ConfigError: no loss, or one that needs a teacher where there is none.
    """

    def __init__(self, student: Student, losses: dict[str, Term], teacher: Teacher | None) -> None:
        super().__init__()
        self.recipe_of_student, self.teacher = student, teacher
        self.losses = nn.ModuleDict(losses)
        self.student: nn.Module | None = None
        self.size: dict[str, Any] = {}  # of the student, see `hub.describe`
        self._exact: dict[str, Tensor] = {}  # buffers of the student, see `exact.py`
        self.expected: dict[str, Any] = {}
        self.stopwatch = Stopwatch()
        self.teacher_share: float | None = None  # of the last step, where it was one that is logged
        objective.check(self.terms, with_teacher=teacher is not None)

    @property
    def terms(self) -> dict[str, Term]:
        """The losses by name."""
        return dict(self.losses.items())  # type: ignore[arg-type]

    @property
    def data(self) -> DistillData:
        """The data module of the trainer."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def setup(self, stage: str) -> None:
        """Take the task from the data, and what the models' configs must say for them; ready the teacher: the terms look at its layers."""
        self.task: Task = self.data.task()
        self.expected = self.data.model_config()
        self.data.ahead = None if self.teacher is None else self.teacher.ahead
        if self.teacher is not None:
            self.teacher.setup(self.task, self.trainer.strategy.root_device, self._dtypes()[0])
            self.teacher.check(self.data.tokenizer, self.expected)
            self.teacher.check_routes(self.data.routes)
            self.teacher.check_rows(lambda: self.data.fingerprint)
            objective.check_support(self.terms, self.teacher.support)
            for each in teachers_of(self.teacher):
                structure = each.structure()
                if structure is not None and each.support != "text":  # which counts its own tokens
                    check_length(structure, self.data.max_length, "model.teacher")
            for model in self.teacher.models() if self.data.pack else []:
                check_packing(self.task, model, "model.teacher")
            self.teacher.spread(self.trainer.strategy)

    def configure_model(self) -> None:
        """Make or load the student; a new one depends on the global seed alone, whatever has drawn random numbers before."""
        if self.student is None:
            with isolate_rng():
                self.student = self.new_student(self._dtypes()[1])
                self.size = hub.describe(self.student)  # now: some strategies leave each rank a part
                self.prepare_compressions(self.student)
                if self.teacher is not None:
                    self.teacher.beside(self.student)
                self._prepare_terms(self.student)
                self._exact = exact_buffers(self.student)

    def new_student(self, dtype: torch.dtype) -> nn.Module:
        """Make the student as it is before training, its weights in this dtype; seeds torch."""
        torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", 0)))
        self.recipe_of_student.calibrate_on(self._calibration)
        student = self.recipe_of_student.build(self.task, self.expected, self.data.tokenizer, dtype)
        forget(unwrap(student))  # of weights that were quantised once, and will be trained
        return student

    def _calibration(self) -> Loader:
        # a loader of its own: the trainer's would give each rank other rows, and lose its position
        return Loader(self.data.train_set, self.data.collator(), self.data.batch_size, seed=self.data.seed)

    @property
    def compressions(self) -> list[Compression]:
        """The callbacks that compress the student, in their order."""
        callbacks: list[pl.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # the Trainer sets it without declaring it
        return [callback for callback in callbacks if isinstance(callback, Compression)]

    def prepare_compressions(self, student: nn.Module) -> None:
        """Let every compression add to a new student what is trained along."""
        for compression in self.compressions:
            if isinstance(student, PeftModel):
                raise ConfigError(
                    f"trainer.callbacks: {type(compression).__name__} compresses weights that LoRA leaves frozen; train them all"
                )
            assert isinstance(student, PreTrainedModel)
            compression.prepare(student, self.task)

    def _prepare_terms(self, student: nn.Module) -> None:
        teacher = None if self.teacher is None else self.teacher.structure()
        common: dict[str, Any] = {
            "unit": self.task.unit,
            "num_classes": self.data.num_classes,
            "class_counts": lambda: self.data.class_counts(),
            "class_name": lambda index: self.data.class_name(index),
            "num_samples": len(self.data.train_set),
            "batch_size": self.data.batch_size * self.trainer.accumulate_grad_batches * self.trainer.world_size,
            "micro_batch": self.data.batch_size,
            "packed": self.data.pack,
            "student": layers_of(student, "model.student"),
            "teacher": None if teacher is None else layers_of(teacher, "model.teacher"),
            "target_temperature": None if self.teacher is None else self.teacher.temperature,
        }
        for name, term in self.terms.items():
            term.prepare(Setting(key=f"model.losses.{name}", **common))

    def _dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """What forward passes compute in, and what the student's weights are."""
        kind, _, mode = str(self.trainer.precision).partition("-")
        compute = {"bf16": torch.bfloat16, "16": torch.float16}.get(kind, torch.float32)
        return compute, compute if mode == "true" else torch.float32

    def check_student(self) -> None:
        """Refuse rows that the student mixes up."""
        assert self.student is not None, "configure_model comes first"
        check_length(self.student, self.data.max_length, "model.student")
        if self.data.pack:
            check_packing(self.task, self.student, "model.student")

    def on_fit_start(self) -> None:
        """Undo what the strategy's cast of the whole module has rounded."""
        self._put_back()

    def on_validation_start(self) -> None:
        """The same, where this is all that is done."""
        self._put_back()

    def on_test_start(self) -> None:
        """The same."""
        self._put_back()

    def _put_back(self) -> None:
        assert self.student is not None, "configure_model comes first"
        put_back(self.student, self._exact)

    def on_train_start(self) -> None:
        """Look once more: a teacher that moves is silently wrong."""
        if self.teacher is not None:
            self.teacher.assert_frozen()

    def forward_both(self, batch: Batch) -> tuple[Outputs, Target | None]:
        """Run the student up to its head and ask the teacher, both with the taps of the terms."""
        assert self.student is not None, "configure_model comes first"
        taps = [loss for loss in self.terms.values() if isinstance(loss, Loss)]
        student = self.task.outputs(self.student, batch, {t for loss in taps for t in loss.student_taps})
        if self.teacher is None:
            return student, None
        with self.stopwatch.lap():
            teacher = self.teacher(batch, {t for loss in taps for t in loss.teacher_taps})
        return student, teacher

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log the measures of the validation set, each weighted by its valid positions."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """The same on the test set."""
        self._evaluate(batch, "test")

    def measures(self, batch: Batch, model: nn.Module | None = None) -> dict[str, Tensor]:
        """Give the sums of `losses.measure.measure` over a batch, for the student or another model in its place.

        A teacher that knows no more than some classes of the training rows is left out.
        """
        model = self.student if model is None else model
        assert model is not None, "configure_model comes first"
        teacher = self.teacher(batch) if self.teacher is not None and self.teacher.support == "classes" else None
        with objective.heads_gathered(self.task.outputs(model, batch), teacher) as sides:
            return measure(*sides, batch["labels"], self.data.num_classes)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        sums = self.measures(batch)
        count = int(sums.pop("count"))
        for name, value in sums.items():
            self.log(f"{stage}/{name}", (value / max(1, count)).float(), batch_size=count, on_epoch=True, sync_dist=True)
