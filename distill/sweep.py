"""A grid of W&B's sweep format as lists of arguments, so that a Slurm array runs it without a server. No heavy imports here.

`python -m distill.sweep configs/sweeps/x.yaml > grid.txt` writes a line per run, quoted, for `scripts/slurm/array.sbatch`.
"""

import itertools
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml


def elements(path: str | Path) -> list[list[str]]:
    """Give the arguments of `train.py` for each run of a grid: the product of the values, those of the last key varying fastest.

    They are what `wandb agent` gives: `command` after the program, with `--key=value` of each parameter in the place of `${args}`.

    Args:
        path: the sweep's file.

    Raises:
        ValueError: the file is no grid, or none that a command line can express.
    """
    sweep = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(sweep, dict) or not isinstance(sweep.get("parameters"), dict):
        raise ValueError(f"{path} is no sweep: it has no parameters")
    if sweep.get("method") != "grid":
        raise ValueError(
            f"{path}: method is {sweep.get('method')}, of which only the server knows the runs; use `wandb agent`, or method: grid"
        )
    before, after = _around_args(path, sweep)
    axes = [[f"--{key}={value}" for value in _values(path, key, given)] for key, given in sweep["parameters"].items()]
    return [[*before, *point, *after] for point in itertools.product(*axes)]


def _around_args(path: str | Path, sweep: dict[str, Any]) -> tuple[list[str], list[str]]:
    command = [str(word) for word in sweep.get("command") or []]
    programs = [i for i, word in enumerate(command) if word in ("${program}", str(sweep.get("program")))]
    if not programs or "${args}" not in command[programs[0] :]:
        raise ValueError(f"{path}: command must have the program, then ${{args}}; e.g. [python, train.py, --config, x.yaml, '${{args}}']")
    words = command[programs[0] + 1 :]
    if macros := [word for word in words if "${" in word and word != "${args}"]:
        raise ValueError(f"{path}: {macros[0]} in command is known to `wandb agent` alone; write ${{args}}")
    place = words.index("${args}")
    return words[:place], words[place + 1 :]


def _values(path: str | Path, key: str, given: Any) -> list[Any]:
    if isinstance(given, dict) and "value" in given:
        return [given["value"]]
    if isinstance(given, dict) and isinstance(given.get("values"), list) and given["values"]:
        return list(given["values"])
    raise ValueError(f"{path}: {key} has neither value nor values; a grid needs them, and a nested key is written with dots")


if __name__ == "__main__":
    try:
        print("\n".join(map(shlex.join, elements(sys.argv[1]))))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
