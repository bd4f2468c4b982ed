"""`distill submit`: a Slurm job out of the templates in `scripts/slurm`. No heavy imports: it runs on login nodes."""

import argparse
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

TIME = re.compile(r"(?:(?P<d>\d+)-(?P<h>\d+)(?::(?P<m>\d+)(?::(?P<s>\d+))?)?)|(?:(?:(?P<H>\d+):)?(?P<M>\d+):(?P<S>\d+))|(?P<min>\d+)")


@dataclass(frozen=True, slots=True)
class Job:
    """A job to submit.

    Attributes:
        text: the batch script.
        args: what the job gives to `train.py`; of an array, its first element.
        dry_run: whether to show it only.
    """

    text: str
    args: list[str]
    dry_run: bool

    @property
    def tasks(self) -> int | None:
        """On each node, as given or in the template; None where neither says."""
        return self._number("ntasks-per-node")

    @property
    def nodes(self) -> int | None:
        """As given or in the template; None where neither says."""
        return self._number("nodes")

    def _number(self, key: str) -> int | None:
        found = re.search(rf"^#SBATCH --{key}=(\d+)\s*$", self.text, re.MULTILINE)
        return int(found[1]) if found else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"submit: {message}")


def job(args: list[str]) -> Job:
    """Make the job that a command line describes.

    The template is `array.sbatch` where `--array` is given, `many_nodes.sbatch` for more than one node, else `one_node.sbatch`, from
    `scripts/slurm` here or beside the package. What is given replaces the template's own line; the rest of it, a site's policy, stays.

    Args:
        args: `--nodes`, `--gpus` (of each node), `--time`, `--partition`, `--account`, `--array` (a file; an element of the array per
            line, which is added to the arguments), `--dry-run`; everything else goes to `train.py`.

    Raises:
        ValueError: an option has no sense, or there is no sbatch here.
        FileNotFoundError: there is no such template, config or array file.
    """
    given, rest = _parse(args)
    if not any(arg.split("=")[0] in ("--config", "-c") for arg in rest):
        raise ValueError("submit: say what to train, e.g. --config kd_llama.yaml")
    lines = _lines(Path(given.array)) if given.array else []
    template = _template("array" if lines else "many_nodes" if given.nodes and given.nodes > 1 else "one_node")
    text = template.read_text(encoding="utf-8")
    if given.time:
        _check_time(given.time, text)
    header = {
        "nodes": given.nodes,
        "ntasks-per-node": given.gpus,
        "gpus-per-node": given.gpus,
        "time": given.time,
        "partition": given.partition,
        "account": given.account,
        "array": f"1-{len(lines)}" if lines else None,
    }
    for key, value in header.items():
        text = text if value is None else _set(text, key, str(value))
    if not Path("train.py").is_file():
        text = text.replace("python train.py", "distill")  # installed, and not in a clone
    if not given.dry_run and shutil.which("sbatch") is None:
        raise ValueError("there is no sbatch here; submit from a login node of the cluster, or look at the job with --dry-run")
    return Job(_with_arguments(text, [*([given.array] if lines else []), *rest]), [*rest, *shlex.split("".join(lines[:1]))], given.dry_run)


def send(text: str) -> str:
    """Give a batch script to sbatch, and return what it says.

    Raises:
        ValueError: it refuses.
    """
    done = subprocess.run(["sbatch"], input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(" ".join(done.stderr.split()))
    return done.stdout.strip()


def _parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = _Parser(prog="submit", add_help=False, allow_abbrev=False)
    for key in ("--nodes", "--gpus"):
        parser.add_argument(key, type=int)
    for key in ("--time", "--partition", "--account", "--array"):
        parser.add_argument(key)
    parser.add_argument("--dry-run", action="store_true")
    given, rest = parser.parse_known_args(args)
    for key in ("nodes", "gpus"):
        if getattr(given, key) is not None and getattr(given, key) < 1:
            raise ValueError(f"submit: --{key} must be at least 1, got {getattr(given, key)}")
    return given, rest


def _lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(f"submit: --array wants a text file, a line of arguments per element; make it with python -m distill.sweep {path}")
    if bad := [i for i, line in enumerate(lines, start=1) if not line.strip()] or ([1] if not lines else []):
        raise ValueError(f"submit: line {bad[0]} of {path} is empty; each line is the arguments of one element of the array")
    return lines


def _template(name: str) -> Path:
    places = [Path("scripts/slurm"), Path(__file__).parent.parent / "scripts/slurm"]
    for place in places:
        if (place / f"{name}.sbatch").is_file():
            return place / f"{name}.sbatch"
    raise FileNotFoundError(f"no {name}.sbatch in {places[0]} here or in {places[1]}; run submit from a clone")


def _check_time(time: str, text: str) -> None:
    if not (found := TIME.fullmatch(time)):
        raise ValueError(f"submit: --time '{time}' is none of minutes, hours:minutes:seconds, days-hours; e.g. 4:00:00")
    unit = {"d": 86400, "h": 3600, "H": 3600, "m": 60, "M": 60, "min": 60, "s": 1, "S": 1}
    seconds = sum(unit[name] * int(value) for name, value in found.groupdict().items() if value)
    warning = re.search(r"^#SBATCH --signal=\w+@(\d+)", text, re.MULTILINE)
    if warning and seconds <= int(warning[1]):
        raise ValueError(f"submit: --time {time} is {seconds} s, but the job is told to stop {warning[1]} s before the end; give it longer")


def _set(text: str, key: str, value: str) -> str:
    line = f"#SBATCH --{key}={value}"
    changed, count = re.subn(rf"^##?SBATCH --{key}=.*$", lambda _: line, text, count=1, flags=re.MULTILINE)
    return changed if count else re.sub(r"^#SBATCH", lambda _: f"{line}\n#SBATCH", text, count=1, flags=re.MULTILINE)


def _with_arguments(text: str, args: list[str]) -> str:
    """Let the script begin with its arguments, so that it is whole without any."""
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    return "".join([*lines[:first], f"set -- {shlex.join(args)}\n", *lines[first:]])
