"""The LightningModule that pairs a frozen teacher with a student."""

import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn

from distill import objective
from distill.balance.base import Balancer
from distill.balance.fixed import FixedWeights
from distill.balance.gram import gradients_of
from distill.losses.base import Loss, Term, TokenLoss
from distill.nonfinite import NonFinite
from distill.optim import AdamW, Optimizer
from distill.pair import Pair
from distill.parallel.folder import check_names
from distill.parallel.gradients import KeepsGradients, gradient_norm, shards_parameters
from distill.parallel.summed import summed
from distill.parallel.through import through
from distill.students.base import Student
from distill.teachers.base import Teacher
from distill.types import Batch, ConfigError
from distill.window import Micro, Window


class DistillModule(Pair):
    """Trains a student on the weighted sum of its losses, divided once by the valid positions of the global batch.

    `Σ_i w_i Σ_n L_i(n) / N`, with N counted over all ranks and all micro-batches of the accumulation, so that 1×8, 8×1 and two ranks
    give the same gradient. The teacher stays outside the module tree: it is in no `state_dict`, optimizer, checkpoint or DDP bucket.

    Args:
        student: makes the model to train.
        losses: the terms, by the names they are logged under.
        teacher: gives the target; None for plain training, then every loss must do without.
        balancer: weighs the terms.
        optimizer: makes the optimizer and its schedule.
        chunk: valid tokens that the objective takes at a time; None chooses.
        max_skipped_steps: steps in a row that are left out where a loss or gradient is not finite on any rank; one more ends training.

    Raises:
        ConfigError: no loss, or one that needs a teacher where there is none.
    """

    def __init__(
        self,
        student: Student,
        losses: dict[str, Term],
        teacher: Teacher | None = None,
        balancer: Balancer | None = None,
        optimizer: Optimizer | None = None,
        chunk: int | None = None,
        max_skipped_steps: int = 5,
    ) -> None:
        super().__init__(student, losses, teacher)
        if chunk is not None and chunk < 1:
            raise ConfigError(f"model.chunk must be at least 1, got {chunk}; leave it out to have it chosen")
        self.chunk, self.balancer, self.optimizer = chunk, balancer or FixedWeights(), optimizer or AdamW()
        self.balancer.start(list(self.terms))
        self._window, self._norm = Window(), 0.0
        self._non_finite = NonFinite(max_skipped_steps)

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps that were left out because a loss or gradient was not finite."""
        return self._non_finite.total

    def forget_teacher(self) -> None:
        """Train the student alone: on its losses that need no teacher, the heaviest weighing 1; on cross-entropy where none teaches."""
        losses, weights = objective.without_teacher(self.terms, self.balancer.weights(list(self.terms)))
        self.teacher, self.losses, self.balancer = None, nn.ModuleDict(losses), FixedWeights(weights)

    def on_fit_start(self) -> None:
        """Refuse rows that the student mixes up, and a window that the loader does not count."""
        super().on_fit_start()
        assert self.student is not None, "configure_model comes first"
        through(self.trainer, "check_student")
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError("GradientAccumulationScheduler changes the global batch in mid-training; use trainer.accumulate_grad_batches")
        if self.trainer.world_size > 1 and not any(
            isinstance(loss, TokenLoss) or (isinstance(loss, Loss) and loss.on_features) for loss in self.terms.values()
        ):
            raise ConfigError(
                "model.losses has no term on the student's predictions, so its head would learn nothing; add one, e.g. kd: ForwardKL"
            )

        if str(self.trainer.precision) == "16-true" and not self._scaled():
            raise ConfigError(
                "trainer.precision=16-true trains float16 weights without a loss scale, and they overflow; take 16-mixed or bf16-true"
            )
        if self.balancer.exact_every and shards_parameters(self.trainer.strategy):
            raise ConfigError(
                f"model.balancer: {type(self.balancer).__name__} measures gradients on the parameters every {self.balancer.exact_every} "
                "steps, but this trainer.strategy cuts the parameters into shards; take trainer.strategy=zero2, or a balancer without "
                "it (model.balancer.exact_every=0 leaves the norms at the branch points, or FixedWeights)"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the balancer's state and the count of skipped steps."""
        checkpoint["non_finite"] = self._non_finite.state_dict()
        checkpoint["balancer"] = {"class": type(self.balancer).__name__, "state": self.balancer.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the balancer's state back, and let Lightning count micro-batches from where the data go on."""
        if "state_dict" in checkpoint:  # a strategy that shards the weights has read them by now, and refused others
            objective.check_checkpoint(self.losses, checkpoint["state_dict"])
            frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]  # DeepSpeed may leave them out
            check_names(Path(str(self.trainer.ckpt_path)), checkpoint["state_dict"], self.state_dict(), frozen)
        self._non_finite.load_state_dict(checkpoint["non_finite"])
        kept = checkpoint["balancer"]
        if kept["class"] == type(self.balancer).__name__:  # another balancer begins anew
            self.balancer.load_state_dict(kept["state"])
        self.data.realign(checkpoint)

    # ---- one step

    def objective(self, batch: Batch, norms: bool = False, exact: bool = False) -> Micro:
        """Evaluate the weighted sum over this micro-batch's valid positions.

        Args:
            batch: the micro-batch.
            norms: whether to measure each term's gradient at its branch point.
            exact: whether to measure the gradients on the parameters, at one `autograd.grad` a term.
        """
        assert self.student is not None, "configure_model comes first"
        student, teacher = self.forward_both(batch)
        given = (student, teacher, batch, self.data.num_classes, self.chunk)
        alone = lambda name: objective.evaluate({name: self.terms[name]}, {name: 1.0}, *given).total  # noqa: E731
        gradients = gradients_of(alone, list(self.terms), self.student, self._window.gradients) if exact else None
        weights = self.balancer.weights(list(self.terms))
        return objective.evaluate(self.terms, weights, *given, norms=norms)._replace(gradients=gradients)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Evaluate the objective; Lightning divides by the accumulation and DDP by the ranks, so both are multiplied back in."""
        for loss in self.terms.values():
            loss.at(self.global_step, self._total_steps())
        self._seed()
        if self._logs_now() and self.teacher is not None and not self._window.parts:
            self.stopwatch.start(self.device)
        norms = self.balancer.wants_norms(self.global_step) or self._logs_now()
        micro = self.objective(batch, norms, exact=self.balancer.wants_gram(self.global_step))
        here = torch.stack([batch["num_valid"].float(), (~micro.total.isfinite()).to(batch["num_valid"].device).float()])
        count, broken = summed(here).unbind()
        count = count.clamp(min=1)
        self._window.add(micro, batch, count)
        # one rank's loss that is not finite makes every gradient NaN, so that any strategy skips the step on all ranks
        scale = torch.where(broken > 0, torch.nan, self.trainer.accumulate_grad_batches * self.trainer.world_size / count)
        return micro.total * scale.to(micro.total.dtype)

    def _logs_now(self) -> bool:
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # the Trainer sets it without declaring it
        return every > 0 and (self.global_step + 1) % every == 0

    def _seed(self) -> None:
        # Dropout as a function of (seed, step, micro-batch, rank): a resumed run draws what an uninterrupted one would, without any state
        place = (int(os.environ.get("PL_GLOBAL_SEED", 0)), self.global_step, len(self._window.parts), self.global_rank)
        seed = int(np.random.SeedSequence(place).generate_state(1)[0])
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also asks every kind of device there might be, for 2 ms
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)

    def _total_steps(self) -> int:
        total = self.trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            raise ConfigError(
                "nothing bounds the number of steps, which schedules need; set trainer.max_steps or trainer.max_epochs above 0"
            )
        return int(total)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the gradient, and drop it where it is not finite: an optimizer leaves parameters without one as they are."""
        self._norm = gradient_norm(self.parameters())
        if not math.isfinite(self._norm) and not self._scaled():  # there a GradScaler skips the step by itself, and tries a lower scale
            for parameter in self.parameters():
                parameter.grad = None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None) -> None:
        """Step, then look at what it was."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._after_step(optimizer)

    def _after_step(self, optimizer: Any) -> None:
        """Log the means over the global batch and tell the balancer; of a step that was skipped only that it was."""
        window, self._window = self._window, Window()
        self.teacher_share = self.stopwatch.stop()
        strategy = self.trainer.strategy
        norm = strategy.gradient_norm() if isinstance(strategy, KeepsGradients) else self._norm
        means, measured = window.measured(list(self.terms), summed)
        # in float16 a gradient overflows while the loss scale is sought, and the scaler skips the step: nothing is wrong yet
        looked_at = means if self._scaled() else means | {"grad_norm": norm}
        skipped = self._non_finite.check(self.global_step, looked_at, window.rows)
        self.log_dict({f"train/{name}": value for name, value in means.items()}, prog_bar=True)
        if self._logs_now():  # each figure costs about a millisecond, whether a logger takes it or not
            figures = {"train/grad_norm": norm, "train/skipped_steps": float(self.skipped_steps), "train/lr": self._lr(optimizer)}
            self.log_dict(figures | objective.figures(self.terms, self.balancer.weights(list(self.terms)), measured))
        if skipped:
            return
        if measured.gram is not None:  # past `self.log`, which would write it again at every step until the next measurement
            for logger in self.loggers:
                logger.log_metrics(objective.exact_figures(self.terms, measured.gram), self.global_step)
        asked = self.balancer.wants_norms(self.global_step)  # what is measured for the log alone must not change training
        self.balancer.update(measured if asked else replace(measured, norms={}))

    def _scaled(self) -> bool:
        half = str(self.trainer.precision)
        return half == "16-mixed" or (half == "16-true" and isinstance(self.trainer.strategy, KeepsGradients))

    @staticmethod
    def _lr(optimizer: Any) -> float:
        return float(optimizer.param_groups[0]["lr"])

    def configure_optimizers(self) -> Any:
        """Optimise the student, and the losses' own parameters where they have any."""
        return self.optimizer.build(self.named_parameters(), self._total_steps())
