"""Which layer of the student is matched with which layer of the teacher."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from distill.layers import Layers
from distill.lookup import did_you_mean
from distill.losses.base import Setting
from distill.types import ConfigError, Outputs, Target

NumberRule = Literal["last", "uniform", "every_other"] | list[tuple[int, int]]
LayerRule = NumberRule | list[tuple[str, str]]


@dataclass(frozen=True)
class Match:
    """A place in the student and one in the teacher.

    Attributes:
        taps: the student's tap and the teacher's, by the names of `tasks.record`.
        widths: of the activations there, `(d_s, d_t)`.
        text: for people, e.g. `student layer 2 ↔ teacher layer 4`.
        key: of the rule in the configuration, for messages.
    """

    taps: tuple[str, str]
    widths: tuple[int, int]
    text: str
    key: str


def pairs(rule: NumberRule, student_count: int, teacher_count: int, key: str, first: int = 0) -> list[tuple[int, int]]:
    """Pair layers by number: 0 is the embedding output, i the output of layer i, the count that of the last layer (before any final norm).

    - `last`: the last with the last.
    - `uniform`: every student layer i ≥ 1 with teacher layer i · L_t / L_s, rounded half up, and the embeddings with each other
      (TinyBERT, Jiao et al. 2019, arXiv 1909.10351).
    - `every_other`: student layer i ≥ 1 with teacher layer 2 i (PKD-skip, Sun et al. 2019, arXiv 1908.09355, there without the last
      layer); not the embeddings.
    - a list of pairs `[student, teacher]`, where −1 is the last as in Python.

    Args:
        rule: see above.
        student_count: L_s.
        teacher_count: L_t.
        key: of the rule in the configuration, for messages.
        first: 0, or 1 where the embedding output is no layer, as for attention.

    Raises:
        ConfigError: a number is out of range, the rule asks for more layers than there are, or there are none.
    """
    for who, count in (("student", student_count), ("teacher", teacher_count)):
        if count == 0:
            raise ConfigError(f"{key}: the layers of the {who} are in no list of modules, so they have no numbers; give pairs of names")
    if rule == "last":
        return [(student_count, teacher_count)]
    if rule == "uniform":
        embeddings = [(0, 0)] if first == 0 else []
        return embeddings + [(i, _uniform(i, student_count, teacher_count)) for i in range(1, student_count + 1)]
    if rule == "every_other":
        if teacher_count < 2 * student_count:
            raise ConfigError(
                f"{key}: every_other needs {2 * student_count} teacher layers for {student_count} student layers, but there are "
                f"{teacher_count}; take uniform"
            )
        return [(i, 2 * i) for i in range(1, student_count + 1)]
    if not rule:
        raise ConfigError(f"{key} is empty; give at least one pair [student, teacher], or last, uniform or every_other")
    return [(_index(s, student_count, "student", key, first), _index(t, teacher_count, "teacher", key, first)) for s, t in rule]


def _uniform(i: int, student_count: int, teacher_count: int) -> int:
    return max(1, (2 * i * teacher_count + student_count) // (2 * student_count))  # Python's round takes 2.5 to 2 and 3.5 to 4


def _index(index: int, count: int, who: str, key: str, first: int) -> int:
    found = index + count + 1 if index < 0 else index
    if not first <= found <= count:
        raise ConfigError(
            f"{key}: {who} layer {index} is out of range; there are {first} to {count}, or {first - count - 1} to -1 from the end"
        )
    return found


def match_hidden(rule: LayerRule, setting: Setting) -> list[Match]:
    """Match hidden states by number (see `pairs`), or outputs of submodules by a list of pairs of dotted names.

    Raises:
        ConfigError: a number is out of range, or there is no such submodule.
    """
    key, student, teacher = f"{setting.key}.layers", setting.student, setting.layers_of_teacher()
    if not isinstance(rule, str) and rule and isinstance(rule[0][0], str):
        return [_named(str(s), str(t), student, teacher, key) for s, t in rule]
    return [
        Match((student.hidden(s), teacher.hidden(t)), (student.width, teacher.width), f"student layer {s} ↔ teacher layer {t}", key)
        for s, t in pairs(rule, student.count, teacher.count, key)  # type: ignore[arg-type]  # no names any more
    ]


def _named(student_name: str, teacher_name: str, student: Layers, teacher: Layers, key: str) -> Match:
    for name, layers in ((student_name, student), (teacher_name, teacher)):
        if name not in layers.widths:
            raise ConfigError(f"{key}: {layers.who} has no submodule '{name}' with weights{did_you_mean(name, list(layers.widths))}")
    widths = student.widths[student_name], teacher.widths[teacher_name]
    return Match((student_name, teacher_name), widths, f"student {student_name} ↔ teacher {teacher_name}", key)


def tapped(match: Match, student: Outputs, teacher: Target) -> tuple[Tensor, Tensor]:
    """Give both activations, the teacher's without a gradient.

    Raises:
        ConfigError: a named submodule does not run, or gives something of another width than its weights have.
    """
    found = []
    for who, outputs, name, width in zip(("student", "teacher"), (student, teacher), match.taps, match.widths, strict=True):
        if name not in outputs.taps:
            raise ConfigError(f"{match.key}: the {who} does not run '{name}' on the way to its features; name a module that it does")
        if outputs.taps[name].ndim < 3:
            raise ConfigError(
                f"{match.key}: '{name}' of the {who} gives {list(outputs.taps[name].shape)}, one vector per row and not per position; name "
                "a module that sees every position"
            )
        if outputs.taps[name].ndim == 3 and outputs.taps[name].shape[-1] != width:
            raise ConfigError(
                f"{match.key}: '{name}' of the {who} gives {outputs.taps[name].shape[-1]} values, but its weights are {width} wide; name "
                "another module, e.g. the linear layer inside"
            )
        found.append(outputs.taps[name])
    return found[0], found[1].detach()
