"""What this machine has that makes few bits fast."""

import platform
from pathlib import Path

import psutil
import torch

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")


def device() -> str:
    """Where models run here: `cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def features() -> dict[str, str]:
    """The processor and its instructions, the GPU and what it multiplies, memory; each in words."""
    found = {"threads": str(torch.get_num_threads()), "memory": f"{psutil.virtual_memory().total / 1e9:.0f} GB"}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        kinds = [name for name, least in (("bf16", (8, 0)), ("int8", (7, 5)), ("fp8", (8, 9))) if (major, minor) >= least]
        found["GPU"] = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}: {', '.join(kinds) or 'no few-bit products'}"
    flags = cpu_flags()
    found["CPU"] = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}" + (f": {', '.join(flags)}" if flags else "")
    return found


def cpu_flags(place: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instructions for few bits that the kernel names; none where it names nothing (not Linux)."""
    if not place.is_file():
        return []
    for line in place.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return [flag for flag in CPU_FLAGS if flag in value.split()]
    return []
