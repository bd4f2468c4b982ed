"""The machine and the software that a report was made with, and texts without what is nobody else's business."""

import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = (
    "distill",
    "torch",
    "pytorch-lightning",
    "transformers",
    "tokenizers",
    "datasets",
    "peft",
    "safetensors",
    "numpy",
    "scipy",
    "scikit-learn",
    "torchmetrics",
    "deepspeed",
    "torchao",
    "onnxruntime",
    "openvino",
    "gguf",
    "lm_eval",
    "wandb",
)
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.]*://)(?!huggingface\.co\b|localhost\b|127\.0\.0\.1\b)[^/\s\"']+", re.IGNORECASE)
_HOME = re.compile(r"(?<![\w.])/(?:home|Users)/[^/\s\"']+|(?<![\w.])/root(?=[/\s\"']|$)")
_SECRET = re.compile(r"(?:^|_)(?:api_?key|token|password|secret)$", re.IGNORECASE)


def environment() -> dict[str, Any]:
    """Describe the machine and the installed packages; no host name, user name or path is in it."""
    memory = psutil.virtual_memory().total
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": processor(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "packages": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The processor's name; of its kind, where the system does not tell."""
    info = Path("/proc/cpuinfo")
    if info.is_file() and (
        named := re.search(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
    ):
        return named[1]
    return platform.processor() or platform.machine()


def private(value: Any, here: Path | None = None) -> Any:
    """Leave out of a configuration what a report must not carry to others.

    Paths below the working directory become relative to it, home folders `~`, the hosts of addresses `…` but for the Hugging Face hub and
    this machine, and the values of keys that are called like a secret `…`.

    Args:
        value: mappings and lists of plain values.
        here: the working directory; None for that of the process.
    """
    here = here or Path.cwd()
    if isinstance(value, dict):
        return {
            key: "…" if item and _SECRET.search(str(key)) and isinstance(item, str) else private(item, here) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [private(item, here) for item in value]
    return _without_names(value, here) if isinstance(value, str | Path) else value


def _without_names(value: str | Path, here: Path) -> str:
    text = str(value)
    if text and here != Path("/"):
        text = re.sub(rf"{re.escape(str(here))}(?:/|(?=[\s\"']|$))", "", text) or "."
    home = os.path.expanduser("~")
    if home not in ("/", "~"):
        text = re.sub(rf"{re.escape(home)}(?=[/\s\"']|$)", "~", text)
    return _ADDRESS.sub(r"\1…", _HOME.sub("~", text))
