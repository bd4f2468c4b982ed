"""Reading a budget: a number with its unit."""

import re

from distill.advise.parts import Budget, Target
from distill.types import ConfigError

BYTES = {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
MILLISECONDS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3}
EXAMPLES = {"size": '"500 MB" or "30 %" of the teacher', "latency": '"20 ms" or "50 %" of the teacher'}
QUALITY = {"classification": ("points", '"1 point" of accuracy'), "causal-lm": ("nats", '"0.05 nats" of held-out loss a token')}


def parse(text: str, target: Target, task: str, whole: float | None) -> Budget:
    """Read a budget.

    Args:
        text: e.g. `500 MB`, `20 ms`, `30 %` (of the teacher), `1 point`.
        target: what it is for.
        task: `causal-lm` or `classification`; a classifier loses points of accuracy, a language model nats.
        whole: what `%` is a share of: the teacher's bytes or milliseconds; None where that is not known yet, which checks the text alone.

    Raises:
        ConfigError: no number, no unit, or one that is not of this target.
    """
    unit_of_quality, example = QUALITY[task]
    example = EXAMPLES.get(target, example)
    found = re.fullmatch(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?)\s*([^\s\d]*)\s*", text)
    try:
        number = float(found[1]) if found else None
    except ValueError:
        number = None
    if found is None or number is None:
        raise ConfigError(f"--budget: '{text}' is no number with a unit; write e.g. {example}")
    unit, least = found[2], "at least 0" if target == "quality" else "above 0"
    if number < 0 or (number == 0 and target != "quality"):
        raise ConfigError(f"--budget must be {least}, got '{text}'; write e.g. {example}")
    if target == "quality":
        if unit.rstrip("s") != unit_of_quality.rstrip("s"):
            raise ConfigError(
                f"--budget: '{text}' has no unit of what a {task} model may lose; write it in {unit_of_quality}, e.g. {example}"
            )
        return Budget(number, "points" if unit_of_quality == "points" else "nats", text.strip())
    if unit == "%":
        if number > 100:
            raise ConfigError(f"--budget: '{text}' is more than the teacher has; write at most 100 %")
        return Budget(number / 100 * (whole or 0.0), "bytes" if target == "size" else "ms", text.strip())
    known = BYTES if target == "size" else MILLISECONDS
    if unit not in known:
        raise ConfigError(f"--budget: '{text}' has no unit of {target}; it has one of {', '.join(known)}, or %: write e.g. {example}")
    return Budget(number * known[unit], "bytes" if target == "size" else "ms", text.strip())
