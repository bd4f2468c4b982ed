"""Several teachers as one: what is asked of it, each of them is asked."""

from abc import ABC
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pytorch_lightning.strategies import Strategy
from torch import nn

from distill.tasks import Task
from distill.teachers.base import Teacher
from distill.types import Batch, ConfigError, Support

WEAKEST_LAST: tuple[Support, ...] = ("classes", "bins", "draws")  # what is right on one is right on those before


class Several(Teacher, ABC):
    """Teachers that are set up, checked, frozen and told of batches together. Layers are matched with those of the first.

    Args:
        parts: by what messages call them.

    Raises:
        ConfigError: there are none, or one is itself made of several.
    """

    def __init__(self, parts: Mapping[str, Teacher]) -> None:
        if not parts:
            raise ConfigError("model.teacher.teachers is empty; name at least one teacher")
        for key, part in parts.items():
            if isinstance(part, Several):
                raise ConfigError(
                    f"model.teacher.teachers: {key} is itself made of several ({type(part).__name__}); name its teachers here"
                )
        self.parts = dict(parts)
        self.name = " + ".join(part.name for part in self.teachers)

    @property
    def teachers(self) -> list[Teacher]:
        """The teachers, in order."""
        return list(self.parts.values())

    def recipe_needed(self) -> str | None:
        """Give the first config that must run."""
        return next((recipe for part in self.teachers if (recipe := part.recipe_needed())), None)

    def setup(self, task: Task, device: torch.device, dtype: torch.dtype) -> None:
        """Make each ready."""
        self._each(lambda part: part.setup(task, device, dtype))

    def check(self, tokenizer: Any, expected: dict[str, Any]) -> None:
        """Check each, and whether their targets go together.

        Raises:
            ConfigError: also where one's target is of other tokens, or two are of different temperatures.
        """
        self._each(lambda part: part.check(tokenizer, expected))
        self._each(_same_tokens)
        known = {key: part.temperature for key, part in self.parts.items() if part.temperature is not None}
        if len(set(known.values())) > 1:
            shown = ", ".join(f"{key}: {value:g}" for key, value in known.items())
            raise ConfigError(f"model.teacher.teachers: their targets were made with different temperatures ({shown}); make them with one")

    def check_rows(self, fingerprint: Callable[[], str]) -> None:
        """Check each."""
        self._each(lambda part: part.check_rows(fingerprint))

    def spread(self, strategy: Strategy) -> None:
        """Spread each."""
        self._each(lambda part: part.spread(strategy))

    @property
    def support(self) -> Support:
        """What all their targets are known on: the weakest."""
        return max((part.support for part in self.teachers), key=WEAKEST_LAST.index)

    @property
    def temperature(self) -> float | None:
        """The T of those whose target has one."""
        return next((part.temperature for part in self.teachers if part.temperature is not None), None)

    def ahead(self, batch: Batch) -> None:
        """Tell each."""
        for part in self.teachers:
            part.ahead(batch)

    def beside(self, student: nn.Module) -> None:
        """Show it to each."""
        self._each(lambda part: part.beside(student))

    def models(self) -> list[nn.Module]:
        """The models of all."""
        return [model for part in self.teachers for model in part.models()]

    def structure(self) -> nn.Module | None:
        """That of the first teacher."""
        return self.teachers[0].structure()

    def assert_frozen(self) -> None:
        """Look at each."""
        for part in self.teachers:
            part.assert_frozen()

    def describe(self) -> dict[str, Any]:
        """Give the sums, as far as each teacher knows its figures."""
        found = [part.describe() for part in self.teachers]
        known = [key for key in ("parameters", "trainable", "megabytes") if all(key in each for each in found)]
        sums: dict[str, Any] = {key: sum(each[key] for each in found) for key in known}
        if any("store_megabytes" in each for each in found):
            sums["store_megabytes"] = sum(each.get("store_megabytes", 0.0) for each in found)
        return {**sums, "dtype": " + ".join(dict.fromkeys(str(each["dtype"]) for each in found if "dtype" in each))}

    def _each(self, ask: Callable[[Teacher], None]) -> None:
        for key, part in self.parts.items():
            try:
                ask(part)
            except ConfigError as error:
                raise ConfigError(f"teacher {key} ({part.name}): {error}") from error


def _same_tokens(part: Teacher) -> None:
    if part.support == "text":
        raise ConfigError("its target is in the tokens of another tokenizer; each of several teachers must have the student's")


def teachers_of(teacher: Teacher) -> list[Teacher]:
    """The teachers that one is made of, or itself."""
    return teacher.teachers if isinstance(teacher, Several) else [teacher]
