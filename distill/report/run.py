"""What a run leaves behind: its folder, its banner, its results, and the student."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from safetensors.torch import save_file

from distill import hub
from distill.callbacks.wandb import wandb_logger
from distill.data.base import DistillData
from distill.data.profile import profile
from distill.module import DistillModule
from distill.report import tables
from distill.report.files import write_file, write_folder, write_json, write_text
from distill.report.quality import evaluate, retention, student_part, teacher_part
from distill.students.lora import merged
from distill.types import ConfigError


class Run(pl.Callback):
    """Prints the banner, measures the student before and after, saves it, and writes `report.json`.

    The folder is made when training starts, after everything that can be wrong with a configuration has been looked at, so that a
    mistake leaves nothing behind.

    Args:
        folder: where the run lives, e.g. `runs/NAME`; must not exist, unless training resumes.
        config: the resolved configuration as YAML, saved there.
        resume: whether the folder's own checkpoint goes on.
        alone: folder of the baseline (the same student trained alone), measured beside the student at the end; None for none.
        wandb: project of Weights & Biases to track the run in; None for none.
    """

    def __init__(self, folder: Path, config: str, resume: bool = False, alone: Path | None = None, wandb: str | None = None) -> None:
        self.folder, self.config, self.resume, self.alone, self.wandb = folder, config, resume, alone, wandb
        self.before: dict[str, float] = {}
        self.wandb_id: str | None = None
        self.seconds = 0.0
        self._start: float | None = None  # of the clock, while it runs

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the banner, measure the student before, make the folder."""
        module = _ours(pl_module)
        if trainer.is_global_zero:
            tables.show(tables.banner(f"Run {self.folder}", describe(trainer, module)))
        if not self.before:
            self.before = evaluate(trainer, module)
        if trainer.is_global_zero:
            self._make_folder()
        if self.wandb:
            logger = wandb_logger(self.wandb, self.folder.name, self.folder, yaml.safe_load(self.config), self.wandb_id)
            self.wandb_id = str(logger.version)
            trainer.loggers = [*trainer.loggers, logger]
        self._start = time.perf_counter()

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=self.resume)
        except FileExistsError:
            raise ConfigError(f"the run folder {self.folder} exists; take another --name, or resume with --ckpt_path last") from None
        write_text(self.folder / "config.yaml", self.config)

    def state_dict(self) -> dict[str, Any]:
        """Keep the figures of the untrained student, the seconds so far and the W&B run, for after a resume."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return {"before": self.before, "seconds": self.seconds + running, "wandb_id": self.wandb_id}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.before, self.seconds, self.wandb_id = state_dict["before"], state_dict["seconds"], state_dict["wandb_id"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        assert self._start is not None, "on_train_start comes first"
        self.seconds += time.perf_counter() - self._start
        self._start = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Say how to go on after Ctrl-C."""
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            saved = (self.folder / "checkpoints" / "last.ckpt").is_file()
            go_on = f"Go on from the last checkpoint with --config {self.folder / 'config.yaml'} --ckpt_path last"
            print(f"\nInterrupted at step {trainer.global_step}. {go_on if saved else 'No checkpoint was saved yet.'}", file=sys.stderr)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, print, save, after every other callback has said its last."""
        module = _ours(pl_module)
        trainer.save_checkpoint(self.folder / "checkpoints" / "last.ckpt")
        if trainer.is_global_zero:  # before measuring: whatever goes wrong there, the student is safe
            write_folder(self.folder / "student", lambda path: save_student(module, path))
            save_losses(module, self.folder / "losses.safetensors")
        models = self._measure(trainer, module) if self.before["count"] else {}
        if trainer.is_global_zero:
            report = {"unit": module.task.unit, "steps": trainer.global_step, "models": models, "losses": describe_losses(module)}
            write_json(self.folder / "report.json", report | {"classes": describe_classes(module.data)})
            if models:
                tables.show(tables.results(models, module.task.unit))
            else:
                print("No validation data, nothing measured: set data.val_data or data.val_fraction, and trainer.limit_val_batches above 0")
            print(f"The student is in {self.folder / 'student'}, the figures are in {self.folder / 'report.json'}")

    def _measure(self, trainer: pl.Trainer, module: DistillModule) -> dict[str, dict[str, Any]]:
        after = evaluate(trainer, module)
        size = hub.describe(module.student)
        models: dict[str, dict[str, Any]] = {}
        if module.teacher is not None:
            models["teacher"] = {**teacher_part(after), **module.teacher.describe()}
        models["student before"] = {**student_part(self.before), **size}
        if self.alone is not None:
            model = module.task.load(str(self.alone / "student"), "baseline", dtype=next(module.parameters()).dtype).to(module.device)
            models["student alone"] = {**student_part(evaluate(trainer, module, model)), **size, "seconds": _seconds(self.alone)}
        models["student distilled" if module.teacher is not None else "student after"] = {
            **student_part(after),
            **size,
            "seconds": self.seconds,
        }
        for model in models.values():
            model["perplexity"] = math.exp(min(model["loss"], 700.0))
            if "teacher" in models:
                model["retention"] = retention(model, models["teacher"])
        return models


def describe(trainer: pl.Trainer, module: DistillModule) -> dict[str, str]:
    """The rows of the banner."""
    student = hub.describe(module.student)
    micro, accumulate, ranks = module.data.batch_size, trainer.accumulate_grad_batches, trainer.world_size
    weights = module.balancer.weights(list(module.terms))
    rows = {
        "teacher": "none: plain training",
        "student": f"{module.recipe_of_student.name} · {_size(student)} · {student['trainable'] / student['parameters']:.0%} trainable",
        "losses": " + ".join(f"{weights[name]:g} × {name} ({type(loss).__name__})" for name, loss in module.terms.items()),
        "balancer": type(module.balancer).__name__,
        **{f"  {name}": " · ".join(lines) for name, loss in module.terms.items() if (lines := loss.summary())},
        "precision": str(trainer.precision),
        "batch": f"{micro * accumulate * ranks} = {micro} × {accumulate} accumulated × {ranks} ranks",
        "tokens per step": f"{module.data.max_length * micro * accumulate * ranks:,} at most",
        "steps": f"{int(trainer.estimated_stepping_batches):,}",
        **module.data.summary(),
    }
    if module.teacher is not None:
        teacher = module.teacher.describe()
        rows["teacher"] = f"{module.teacher.name} · {_size(teacher)} · {teacher['parameters'] / student['parameters']:.1f}× the student"
    return rows


def save_student(module: DistillModule, path: Path) -> None:
    """Write what plain transformers loads: safetensors, config, generation config, tokenizer."""
    assert module.student is not None, "configure_model comes first"
    merged(module.student).save_pretrained(path)
    module.data.tokenizer.save_pretrained(path)


def save_losses(module: DistillModule, path: Path) -> None:
    """Write what the terms have learned themselves, e.g. projectors, beside the student; nothing where they have learned nothing."""
    if tensors := {name: tensor.contiguous() for name, tensor in module.losses.state_dict().items()}:
        write_file(path, lambda beside: save_file(tensors, beside))


def describe_losses(module: DistillModule) -> dict[str, dict[str, Any]]:
    """What each term is, its last weight, and what it settled before training, e.g. which layer is matched with which."""
    weights = module.balancer.weights(list(module.terms))
    return {name: {"class": type(loss).__name__, "weight": weights[name], "settled": loss.summary()} for name, loss in module.terms.items()}


def describe_classes(data: DistillData) -> dict[str, Any]:
    """How often each class is a label of the training rows: a summary, and of a classifier every class by name."""
    counts = data.class_counts()
    summary: dict[str, Any] = {**profile(counts.numpy())}
    by_class = summary.pop("counts")
    if data.task.unit == "sample":
        summary["counts"] = {data.class_name(i): count for i, count in enumerate(by_class)}
    return summary


def _size(described: dict[str, Any]) -> str:
    return f"{described['parameters']:,} parameters · {described['megabytes']:.1f} MB {described['dtype']}"


def _seconds(folder: Path) -> float | None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return next((model["seconds"] for model in report["models"].values() if "seconds" in model), None)


def _ours(pl_module: pl.LightningModule) -> DistillModule:
    assert isinstance(pl_module, DistillModule)
    return pl_module
