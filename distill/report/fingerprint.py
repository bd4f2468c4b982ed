"""Which code and which data made a run."""

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from distill import __version__
from distill.parallel.same import fingerprint

PACKAGE = Path(__file__).parents[1]


def fingerprints(data: str) -> dict[str, str]:
    """Give what tells two runs apart that have the same configuration.

    Args:
        data: `DistillData.fingerprint`.

    Returns:
        `version` and `commit` of distill, `code`: a hash of its sources, and `data`.
    """
    return {"version": __version__, "commit": commit(PACKAGE), "code": sources(PACKAGE), "data": data}


def weights(models: Iterable[nn.Module]) -> str:
    """Hash models' weights: SHA-256 of the sums of the bits of each tensor, see `parallel.same.fingerprint`."""
    return hashlib.sha256(b"".join(fingerprint(model).cpu().numpy().tobytes() for model in models)).hexdigest()


def sources(package: Path) -> str:
    """Hash the Python files of a package, names included: SHA-256, the first 16 digits."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


def commit(package: Path) -> str:
    """Give the commit that a package lies at, with ` +` if its files differ from it; empty where git does not keep them."""
    # a virtual environment often lies inside the repository of something else
    if not _git(package, "ls-files", "__init__.py"):
        return ""
    changed = _git(package, "status", "--porcelain", "--", ".")
    return f"{_git(package, 'rev-parse', 'HEAD')}{' +' if changed else ''}"


def _git(folder: Path, *args: str) -> str:
    try:
        done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a slow file system: a run does not fail for that
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
