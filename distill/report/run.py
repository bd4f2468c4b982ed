"""What a run leaves behind: its folder, its banner, its results, and the student."""

import json
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml

from distill import hub
from distill.callbacks.wandb import wandb_logger
from distill.data.base import DistillData
from distill.data.profile import profile
from distill.module import DistillModule
from distill.report import student, tables
from distill.report.files import write_json, write_text
from distill.report.fingerprint import fingerprints
from distill.report.gather import name_of
from distill.report.quality import evaluate, retention, student_part, teacher_part
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
        artifact: whether the student is uploaded there at the end.
    """

    def __init__(
        self,
        folder: Path,
        config: str,
        resume: bool = False,
        alone: Path | None = None,
        wandb: str | None = None,
        artifact: bool = False,
    ) -> None:
        self.folder, self.config, self.resume, self.alone, self.wandb, self.artifact = folder, config, resume, alone, wandb, artifact
        self.before: dict[str, float] = {}
        self.fingerprints: dict[str, str] = {}
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
        self._track(trainer, module)
        self._start = time.perf_counter()

    def _track(self, trainer: pl.Trainer, module: DistillModule) -> None:
        """Take the fingerprints and start the W&B run."""
        self.fingerprints = fingerprints(module.data.fingerprint)
        if self.wandb:
            config = yaml.safe_load(self.config) | {"fingerprints": self.fingerprints}
            trainer.loggers = [*trainer.loggers, wandb_logger(self.wandb, self.folder, config, self.artifact)]

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=self.resume)
        except FileExistsError:
            raise ConfigError(f"the run folder {self.folder} exists; take another --name, or resume with --ckpt_path last") from None
        write_text(self.folder / "config.yaml", self.config)

    def state_dict(self) -> dict[str, Any]:
        """Keep the figures of the untrained student and the seconds so far, for after a resume."""
        running = 0.0 if self._start is None else time.perf_counter() - self._start
        return {"before": self.before, "seconds": self.seconds + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self.before, self.seconds = state_dict["before"], state_dict["seconds"]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        assert self._start is not None, "on_train_start comes first"
        self.seconds += time.perf_counter() - self._start
        self._start = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure, print, save, after every other callback has said its last."""
        module = _ours(pl_module)
        if not self.fingerprints:  # resumed at the last step: Lightning has skipped the training, and its hooks
            self._track(trainer, module)
        saved = student.save(trainer, module, self.folder)  # before measuring: whatever goes wrong there, the student is safe
        models = self._measure(trainer, module, saved) if self.before["count"] else {}
        if trainer.is_global_zero:
            report = {"unit": module.task.unit, "steps": trainer.global_step, "models": models, "losses": describe_losses(module)}
            report |= {"compression": [{"class": type(c).__name__, "settled": c.summary(), **c.figures()} for c in module.compressions]}
            report |= {"classes": describe_classes(module.data), "fingerprints": self.fingerprints, "skipped_steps": module.skipped_steps}
            write_json(self.folder / "report.json", report)
            for old in ("report.html", "report_rows.npz"):  # of the run before it went on, and its figures are no longer these
                (self.folder / old).unlink(missing_ok=True)
            if module.skipped_steps:
                print(f"{module.skipped_steps} of {trainer.global_step} steps were skipped: a loss or gradient was not finite")
            if models:
                tables.show(tables.results(models, module.task.unit))
                if module.teacher is not None and "kl" not in models["teacher"]:
                    print(f"KL and agreement are not measured: the teacher is {module.teacher.name}, and gives no target for held-out rows")
                    if (before := module.teacher.measured()) and "loss" not in models["teacher"]:
                        print(
                            f"The teacher's own figures are left out: they are of {before['count']:,.0f} positions, this run measured "
                            f"{models['student before']['count']:,.0f}; take limit_val_batches=1.0 and the same validation data"
                        )
            else:
                print("No validation data, nothing measured: set data.val_data or data.val_fraction, and trainer.limit_val_batches above 0")
            print(f"The student is in {self.folder / 'student'}, the figures are in {self.folder / 'report.json'}")

    def _measure(self, trainer: pl.Trainer, module: DistillModule, saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
        after = evaluate(trainer, module)
        size = module.size
        models: dict[str, dict[str, Any]] = {}
        if module.teacher is not None:
            models["teacher"] = {**teacher_part(after, module.teacher.measured()), **module.teacher.describe()}
        models["student before"] = {**student_part(self.before), **size}
        if self.alone is not None:
            model = module.task.load(str(self.alone / "student"), "baseline", dtype=next(module.parameters()).dtype).to(module.device)
            models["student alone"] = {
                **student_part(evaluate(trainer, module, model)),
                **hub.describe(model),
                "seconds": _seconds(self.alone),
            }
        models[name_of(module)] = {
            **student_part(after),
            **saved,
            "seconds": self.seconds,
        }
        for model in models.values():
            if "loss" in model:
                model["perplexity"] = math.exp(min(model["loss"], 700.0))
            if "teacher" in models:
                model["retention"] = retention(model, models["teacher"])
        return models


def describe(trainer: pl.Trainer, module: DistillModule) -> dict[str, str]:
    """The rows of the banner."""
    size = module.size
    micro, accumulate, ranks = module.data.batch_size, trainer.accumulate_grad_batches, trainer.world_size
    weights = module.balancer.weights(list(module.terms))
    rows = {
        "teacher": "none: plain training",
        "student": f"{module.recipe_of_student.name} · {_size(size)} · {size['trainable'] / size['parameters']:.0%} trainable",
        "losses": " + ".join(f"{weights[name]:g} × {name} ({type(loss).__name__})" for name, loss in module.terms.items()),
        "balancer": type(module.balancer).__name__,
        **{f"  {name}": " · ".join(lines) for name, loss in module.terms.items() if (lines := loss.summary())},
        "compression": " + ".join(" · ".join([type(c).__name__, *c.summary()]) for c in module.compressions) or "none",
        "precision": str(trainer.precision),
        "batch": f"{micro * accumulate * ranks} = {micro} × {accumulate} accumulated × {ranks} ranks",
        "tokens per step": f"{module.data.max_length * micro * accumulate * ranks:,} at most",
        "steps": f"{int(trainer.estimated_stepping_batches):,}",
        **module.data.summary(),
    }
    if module.teacher is not None:
        teacher = module.teacher.describe()
        rows["teacher"] = f"{module.teacher.name} · {_size(teacher)}"
        if teacher.get("parameters"):
            rows["teacher"] += f" · {teacher['parameters'] / size['parameters']:.1f}× the student"
        if "store_megabytes" in teacher:
            rows["teacher"] += f" · none of it in memory, {teacher['store_megabytes']:,.1f} MB on disk"
    return rows


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
    if "parameters" not in described:
        return "of unknown size"
    if described["parameters"] == 0:
        return "no weights of its own"
    return f"{described['parameters']:,} parameters · {described['megabytes']:.1f} MB {described['dtype']}"


def _seconds(folder: Path) -> float | None:
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return next((model["seconds"] for model in report["models"].values() if "seconds" in model), None)


def _ours(pl_module: pl.LightningModule) -> DistillModule:
    assert isinstance(pl_module, DistillModule)
    return pl_module
