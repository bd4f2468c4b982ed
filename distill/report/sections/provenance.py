"""Where the figures come from: the configuration, code, data and weights, and how to make them again."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import yaml

from distill.report.environment import environment, private
from distill.report.evidence import TEACHER, Evidence
from distill.report.fingerprint import fingerprints, weights
from distill.report.page.blocks import Block, Fold, Grid, Missing, Note
from distill.report.page.words import size
from distill.report.sections.base import Section


class Provenance(Section):
    """What made this run, and what it left behind."""

    name: ClassVar[str] = "provenance"
    title: ClassVar[str] = "Provenance"
    question: ClassVar[str] = "What exactly was run, on what, and how is it run again?"
    order: ClassVar[int] = 70

    def figures(self, evidence: Evidence) -> dict[str, Any]:
        """Hash, look up, list."""
        config = private(dict(evidence.config))
        return {
            "student": evidence.student,
            "code": _code(evidence),
            "weights": _weights(evidence),
            "environment": environment(),
            "again": again(config, evidence.folder),
            "left": [{"name": name, "bytes": size} for name, size in left_behind(evidence.folder)],
            "config": config,
        }

    def blocks(self, figures: dict[str, Any]) -> list[Block]:
        """A sentence, hashes, machine, files, and the whole configuration."""
        hashes, made = figures["weights"], figures["code"]
        missing = [Missing(f"hash of {name}", each["missing"]) for name, each in hashes.items() if isinstance(each, dict)]
        rows = [[f"weights, {name}", each] for name, each in hashes.items() if isinstance(each, str)]
        code = [["distill", made["version"]], ["commit", made["commit"]], ["code", made["code"]], ["training data", made["data"]], *rows]
        left = [[each["name"], size(each["bytes"])] for each in figures["left"]]
        return [
            Note(_said(figures)),
            Grid(["", "hash or version"], [row for row in code if row[1]], _CODE),
            *missing,
            Grid(
                ["", "of this machine"],
                _machine(figures["environment"]),
                "What the report was made with; the run, too, if it wrote the report.",
            ),
            Grid(["file", "size"], left, "What the run left, beside this report."),
            Fold("How to run it again", figures["again"]),
            Fold("The resolved configuration", yaml.safe_dump(figures["config"], sort_keys=False, allow_unicode=True)),
        ]


_CODE = (
    "A commit with + had changes. `code` is the first 16 digits of the SHA-256 of all source files; data: of the training rows' tokens; "
    "weights: of the sums of the bits of each tensor."
)


def _code(evidence: Evidence) -> dict[str, Any]:
    """What the run noted of itself; of a run that noted nothing, how things are now."""
    noted = evidence.run.get("fingerprints")
    return {**noted, "noted": "by the run"} if noted else {**fingerprints(evidence.data.fingerprint), "noted": "now"}


def _weights(evidence: Evidence) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in (TEACHER, evidence.student):
        subject = evidence.subjects.get(name)
        if subject is None or subject.model is None:
            found[name] = {"missing": evidence.absent.get(name) or "there is not one model of it in this process"}
        else:
            found[name] = weights([subject.model])
    return found


def again(config: Mapping[str, Any], folder: Path) -> str:
    """The commands that run it again, into another folder."""
    config_file, seed = private(str(folder / "config.yaml")), config.get("seed_everything")
    command = ["python", "train.py", "--config", config_file, "--name", f"{folder.name}-again"]
    command += ["--seed_everything", str(seed)] if isinstance(seed, int) and not isinstance(seed, bool) else []  # true draws one
    command += ["--ckpt_path", "null"] if config.get("ckpt_path") else []
    return shlex.join(command)


def left_behind(folder: Path) -> Iterator[tuple[str, int]]:
    """The files of a run's folder but for those of the report, and the folders in it with a slash, each with the bytes of all in it."""
    for path in sorted(folder.iterdir() if folder.is_dir() else [], key=lambda each: (each.is_file(), each.name)):
        if path.name.startswith((".", "report")):
            continue
        if path.is_dir():
            yield f"{path.name}/", sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        else:
            yield path.name, path.stat().st_size


def _said(figures: Mapping[str, Any]) -> str:
    made, seed = figures["code"], figures["config"].get("seed_everything")
    commit = f"commit `{made['commit'][:12]}`{' with changes' if made['commit'].endswith('+') else ''}" if made["commit"] else "no commit"
    noted = "" if made["noted"] == "by the run" else ", as it is now: the run noted nothing"
    return f"Made by distill {made['version']}, {commit}{noted}, with seed {seed}, from training data `{made['data']}`."


def _machine(found: Mapping[str, Any]) -> list[list[str]]:
    gpus = ", ".join(found["gpus"]) + (f" with CUDA {found['cuda']}" if found["cuda"] else "")
    rows = [
        ["processor", f"{found['cpu']}, {found['cores']} cores, {found['threads']} in use"],
        ["memory", f"{found['memory_gb']:,.1f} GB"],
        ["GPUs", gpus or "none"],
        ["system", found["system"]],
        ["Python", found["python"]],
    ]
    return rows + [[name, version] for name, version in found["packages"].items() if name != "distill"]
