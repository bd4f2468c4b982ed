"""Parse errors said in one line: the key, what was seen, what is allowed, and the nearest thing that would have worked."""

import inspect
import re
import traceback
from collections.abc import Iterator
from typing import Any

from jsonargparse import Namespace

from distill.balance.base import Balancer
from distill.data.base import DistillData
from distill.lookup import did_you_mean
from distill.losses.base import Term
from distill.losses.class_weighted import ClassWeights
from distill.optim import Optimizer
from distill.schedule import Schedule
from distill.students.base import Student
from distill.teachers.base import Teacher

SEEN = (
    r"val='([^']*)'",
    r"Got value: (\S+)",
    r"Given value: (.*)",
    r"Not of type \w+: (\S+) does not conform",
    r"Not of type \w+: .*'(.*)'",
)
BOUNDED = {
    "PositiveInt": "a whole number of at least 1",
    "NonNegativeInt": "a whole number of at least 0",
    "NonNegativeFloat": "a number of at least 0",
}
BASES = (DistillData, Term, Teacher, Student, Balancer, Optimizer, Schedule, ClassWeights)


def explain(message: str, keys: list[str]) -> str:
    """Turn a message of jsonargparse, which spans many lines, into one that names key, value and fix.

    Args:
        message: what the parser says.
        keys: the keys that the verb accepts.
    """
    text = message.replace("distill.data.base.", "").replace("distill.schedule.", "")
    if found := re.search(r"unrecognized arguments?: (.*)", text):
        option = found[1].split()[0].lstrip("-").split("=")[0]
        return f"does not accept option '{option}'{did_you_mean(option, keys)}"
    if found := re.search(r"Subcommand '\w+' does not accept option '([^']+)'", text):
        return f"does not accept option '{found[1]}'{did_you_mean(found[1], keys)}"
    if found := re.search(r"arguments are required: (.*)", text):
        missing = re.sub(r"\b(fit|validate|test)\.", "", found[1])
        return f"these keys have no value: {missing}; give a config, e.g. --config kd_llama.yaml"
    return f"{_key(text)}{_cause(text, keys)}"


def _key(text: str) -> str:
    path = re.findall(r'Parser key "([^"]+)"', text)
    return f"{'.'.join(path)}: " if path else ""


def _cause(text: str, keys: list[str]) -> str:
    if found := re.search(r"(?:Option|Key) '([^']+)' is not (?:accepted|expected)", text):
        known = sorted({name for cls in our_classes() for name in inspect.signature(cls).parameters} | set(keys))
        return f"does not accept option '{found[1]}'{did_you_mean(found[1], known)}"
    if found := re.search(r"Problem with given class_path '([^']+)':\s*(.*?)(?:\n\s*-|\Z)", text, re.DOTALL):
        return f"cannot use '{found[1]}': {_flat(found[2])}"
    value = _value(text)
    if bounded := [said for name, said in BOUNDED.items() if f"Not of type {name}: " in text]:
        words = re.findall(r"Literal\['([^']+)'\]", text)
        return f"must be {' or '.join([*bounded, *dict.fromkeys(words)])}; got '{value}'"
    if choices := [c for group in re.findall(r"Literal\[([^\]]*)\]", text) for c in re.findall(r"'([^']+)'", group)]:
        return f"must be one of {', '.join(dict.fromkeys(choices))}; got '{value}'{did_you_mean(value, choices)}"
    if simple := [t for t in re.findall(r"Expected a <class '(\w+)'>", text) if t != "NoneType"]:
        return f"must be of type {' or '.join(dict.fromkeys(simple))}; got '{value}'"
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        names = sorted(cls.__name__ for cls in our_classes())
        return f"no class '{found[1]}'{did_you_mean(found[1], names)}; a class of your own is named by its import path, e.g. my_losses.Mine"
    if found := re.search(r"Errors:\s*- (.*?)(?:\n\s*- |\nGiven value|\Z)", text, re.DOTALL):
        return _flat(found[1])
    return _flat(re.sub(r'Parser key "[^"]+":', "", text))


def _value(text: str) -> str:
    found = filter(None, (re.search(pattern, text) for pattern in SEEN))
    return next((match[1].strip() for match in found), "?")


def _flat(text: str) -> str:
    return " ".join(text.split())[:400]


def place(error: BaseException, config: Any) -> str:
    """Find the key of the object whose constructor complained: `model.losses.kd: `, or nothing where that cannot be told.

    Args:
        error: with the traceback that it was raised with.
        config: the resolved configuration, nested.
    """
    makers = [
        type(frame.f_locals["self"])
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "__init__" and type(frame.f_locals.get("self")).__module__.split(".")[0] != "jsonargparse"
    ]
    keys = [key for key, path in _class_paths(config, "") if makers and path.rpartition(".")[2] == makers[-1].__name__]
    return f"{' or '.join(keys)}: " if keys and not any(key in str(error) for key in keys) else ""


def _class_paths(config: Any, key: str) -> Iterator[tuple[str, str]]:
    """Every key that holds an object, with the class of the object."""
    entries = vars(config) if isinstance(config, Namespace) else config
    if not isinstance(entries, dict):
        return
    if isinstance(path := entries.get("class_path"), str):
        yield key, path
    for name, value in entries.items():
        inner = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        yield from _class_paths(value, inner)


def our_classes() -> Iterator[type[Any]]:
    """Every class that YAML can name by its short name, a user's own included once it is imported."""
    waiting: list[type[Any]] = list(BASES)
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_") and cls not in BASES:
            yield cls
