"""What models cost where they are served: size, latency, throughput, memory, energy; side by side, timed in turn."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from distill.report.costs.energy import Energy, metered
from distill.types import Batch

Run = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A model that is looked at.

    Attributes:
        run: from a batch to its logits.
        model: what counts its parameters and operations; None where only files are known.
        files: the folder or file that is shipped.
    """

    run: Run
    model: nn.Module | None = None
    files: Path | None = None


@dataclass(frozen=True)
class Cost:
    """Figures of one model; None where it is not known.

    Attributes:
        parameters: of the model, tied ones once.
        nonzero: of them, those that are not 0; not counted where weights are stored as integers with scales.
        disk_bytes: of all weights in its files.
        flops: floating-point operations of one sample (multiplications and additions), matrix products and attention.
        latency_ms: median time of one sample by the clock; `latency_p95_ms` the 95th percentile.
        cpu_ms: processor time of one sample, all cores.
        throughput: samples a second at the large batch.
        peak_bytes: most memory of the process above what it held before the large batch, sampled; of a GPU counted exactly. The largest of
            all rounds, the first one included: runtimes with an arena take theirs there, and keep it.
        joules: energy of 1,000 single samples.
        energy_source: where that figure comes from.
    """

    parameters: int | None
    nonzero: int | None
    disk_bytes: int | None
    flops: int | None
    latency_ms: float
    latency_p95_ms: float
    cpu_ms: float
    throughput: float
    peak_bytes: int
    joules: float
    energy_source: str

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


@dataclass
class Clocked:
    """What was measured of a model, round by round.

    Attributes:
        single: seconds of one sample, by the clock and of the processors.
        large: seconds of the large batch, by the clock.
        energies: of one sample.
        peak: see `Cost.peak_bytes`.
    """

    single: list[tuple[float, float]] = field(default_factory=list)
    large: list[float] = field(default_factory=list)
    energies: list[Energy] = field(default_factory=list)
    peak: int = 0


def measure(candidates: Mapping[str, Candidate], one: Batch, many: Batch, rounds: int = 20, warm_up: int = 3) -> dict[str, Cost]:
    """Time all candidates in turn, round by round, so that a busy machine slows them alike; see `clock`."""
    clocked = clock(candidates, one, many, rounds, warm_up)
    return {name: cost_of(candidate, one, len(many["input_ids"]), clocked[name]) for name, candidate in candidates.items()}


def clock(candidates: Mapping[str, Candidate], one: Batch, many: Batch, rounds: int = 20, warm_up: int = 3) -> dict[str, Clocked]:
    """Take the times of all candidates in turn.

    Args:
        candidates: by name.
        one: a batch of one sample.
        many: a batch of several.
        rounds: how often each is timed at either size, ≥ 2.
        warm_up: rounds before, which do not count.

    Raises:
        ValueError: fewer than 2 rounds, or `one` holds several samples.
    """
    if rounds < 2 or len(one["input_ids"]) != 1:
        raise ValueError(f"at least 2 rounds and one sample are wanted, got {rounds} rounds and {len(one['input_ids'])} samples")
    on_gpu = one["input_ids"].is_cuda
    found = {name: Clocked() for name in candidates}
    for number in range(warm_up + rounds):
        for name, candidate in candidates.items():
            here = found[name]
            together, peak = _with_peak(candidate.run, many, on_gpu)
            here.peak = max(here.peak, peak)
            with metered(on_gpu) as energy:
                alone = _timed(candidate.run, one, on_gpu)
            if number >= warm_up:
                here.single.append(alone)
                here.large.append(together)
                here.energies.append(energy)
    return found


def cost_of(c: Candidate, one: Batch, size: int, clocked: Clocked) -> Cost:
    """Give the figures of a model.

    Args:
        c: the model.
        one: a batch of one sample.
        size: samples of the large batch.
        clocked: what was measured of it.
    """
    wall, busy = np.array(clocked.single).T * 1e3
    return Cost(
        parameters=None if c.model is None else sum(p.numel() for p in c.model.parameters()),
        nonzero=None if c.model is None else _nonzero(c.model),
        disk_bytes=None if c.files is None else bytes_of(c.files),
        flops=None if c.model is None else flops(c.run, one),
        latency_ms=float(np.median(wall)),
        latency_p95_ms=float(np.percentile(wall, 95)),
        cpu_ms=float(np.median(busy)),
        throughput=size / median(clocked.large),
        peak_bytes=clocked.peak,
        joules=1e3 * sum(e.joules for e in clocked.energies) / len(clocked.energies),
        energy_source=clocked.energies[0].source,
    )


def of_files(files: Path | None) -> dict[str, Any]:
    """Give `Cost.as_dict` of a model that is not run here: all that is known is its bytes."""
    return dict.fromkeys(each.name for each in fields(Cost)) | {"disk_bytes": None if files is None else bytes_of(files)}


def _nonzero(model: nn.Module) -> int | None:
    if any(is_traceable_wrapper_subclass(p) for p in model.parameters()):  # torchao's have no such operation
        return None
    return sum(int(p.count_nonzero()) for p in model.parameters())


def flops(run: Run, batch: Batch) -> int:
    """Count the floating-point operations of a forward pass, as torch does."""
    # torch counts no fused attention of a CPU: there it is taken apart
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(batch)
    return int(counter.get_total_flops())


def bytes_of(files: Path) -> int:
    """Bytes of a file, or of all files in a folder but those of the tokenizer and small configurations.

    Of a folder of transformers those of the weights that it loads: many hold the same in other formats beside, e.g. `tf_model.h5`.
    """
    if files.is_file():
        return files.stat().st_size
    for name in ("model*.safetensors", "pytorch_model*.bin"):
        if weights := [*files.glob(name)]:
            return sum(file.stat().st_size for file in weights)
    return sum(f.stat().st_size for f in files.rglob("*") if f.is_file() and f.suffix not in (".json", ".txt", ".model", ".jinja", ".md"))


def _timed(run: Run, batch: Batch, on_gpu: bool) -> tuple[float, float]:
    wall, busy = time.perf_counter(), time.process_time()
    run(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - busy


def _with_peak(run: Run, batch: Batch, on_gpu: bool) -> tuple[float, int]:
    """Seconds of a run, and the most memory it took above what was there."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds, _ = _timed(run, batch, on_gpu)
        return seconds, torch.cuda.max_memory_allocated() - before
    process, done, most = psutil.Process(), threading.Event(), [0]
    before = process.memory_info().rss

    def sample() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], process.memory_info().rss)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        seconds, _ = _timed(run, batch, on_gpu)
    finally:
        done.set()
        thread.join()
    return seconds, max(0, most[0] - before)
