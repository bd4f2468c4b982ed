"""Energy of a stretch of work: counted by the machine where it can, else estimated from the time its processors were busy."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")
WATTS_PER_CORE = 10.0  # of a server's processor under load: about 200 W for 20 cores


@dataclass
class Energy:
    """Joules, and where the figure comes from."""

    joules: float = 0.0
    source: str = ""


@contextmanager
def metered(on_gpu: bool = False) -> Iterator[Energy]:
    """Take the energy of what runs inside; the figure is there when the context closes.

    The counter of the GPU (NVML's total energy), where the work is done by one; the processor's own counters (RAPL, packages), where the
    kernel lets them be read; both count all that runs on the device. Otherwise an estimate, said so: busy core-seconds of this process
    (`time.process_time`) times `WATTS_PER_CORE`.
    """
    energy = Energy()
    gpu, packages, busy = _gpu_millijoules() if on_gpu else None, _rapl_microjoules(), time.process_time()
    yield energy
    seconds = time.process_time() - busy
    if gpu is not None:
        energy.joules, energy.source = ((_gpu_millijoules() or gpu) - gpu) / 1e3, "NVML"
    elif packages:
        after = _rapl_microjoules()
        energy.joules = sum((now - packages[name]) % _range(name) for name, now in after.items()) / 1e6
        energy.source = "RAPL"
    else:
        energy.joules, energy.source = seconds * WATTS_PER_CORE, f"estimate: {WATTS_PER_CORE:g} W a busy core"


def _gpu_millijoules() -> int | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        torch.cuda.synchronize()
        # by its own name: NVML counts all cards of the machine, torch those that CUDA_VISIBLE_DEVICES leaves
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}")
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(card))
    except Exception:  # no package, no driver, or a card without the counter: each has its own error
        return None


def _rapl_microjoules() -> dict[str, int]:
    """The counter of each processor package; empty where there is none, or only root may read it."""
    found = {}
    for counter in sorted(RAPL.glob("intel-rapl:[0-9]*/energy_uj")):
        try:
            if (
                not (counter.parent / "name").read_text().startswith("package")
            ):  # its cores and memory are counted with it, the board above it
                continue
            found[counter.parent.name] = int(counter.read_text())
        except OSError:
            return {}
    return found


def _range(package: str) -> int:
    """Where a counter begins anew."""
    return int((RAPL / package / "max_energy_range_uj").read_text())
