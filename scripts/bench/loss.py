"""Time and peak memory of the chunked objective beside plain PyTorch: cross-entropy plus forward KL at T = 2, forward and backward.

    python scripts/bench/loss.py --n 256 1024 --v 8192 32000 > table.md

Both run in turn in one process, so that a busy machine slows both alike. Peak memory is what the step allocates beyond the features
and heads that are there before it: on CUDA `max_memory_allocated`; on a CPU the highest running sum of the profiler's allocation
records, which every tensor and every kernel's scratch space from torch's allocator leaves (what BLAS allocates itself is not seen).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from distill.losses.chunked import chunk_size, chunked_objective
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.types import Outputs

Step = Callable[[Outputs, Outputs, Tensor], Tensor]
T = 2.0


def plain(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """Evaluate on whole logits, as a hand-written training step does."""
    logits = student.head(student.features[0]).float()
    with torch.no_grad():
        targets = teacher.head(teacher.features[0]).float()
    ce = F.cross_entropy(logits, labels[0], reduction="sum")
    kl = F.kl_div((logits / T).log_softmax(-1), (targets / T).log_softmax(-1), reduction="sum", log_target=True)
    return ce + kl * T**2


def chunked(chunk: int | None) -> Step:
    losses, weights = {"ce": CrossEntropy(), "kd": ForwardKL(T)}, {"ce": 1.0, "kd": 1.0}

    def step(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        classes = student.head.out_features
        assert isinstance(classes, int)
        return chunked_objective(student, teacher, labels, losses, weights, classes, chunk)[0]

    return step


def make(n: int, v: int, hidden: int, teacher_hidden: int, device: str, dtype: torch.dtype) -> tuple[Outputs, Outputs, Tensor]:
    torch.manual_seed(0)

    def side(width: int) -> Outputs:
        head = nn.Linear(width, v, bias=False, device=device, dtype=dtype)
        return Outputs(torch.randn(1, n, width, device=device, dtype=dtype), head)

    student, teacher = side(hidden), side(teacher_hidden)
    student.features.requires_grad_()
    return student, teacher, torch.randint(v, (1, n), device=device)


def run(step: Step, inputs: tuple[Outputs, Outputs, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One forward and backward; give the value and the gradients, and leave none behind."""
    student, _, labels = inputs
    leaves = [student.features, *student.head.parameters()]
    value = step(*inputs)
    (value / labels.numel()).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    return value.detach(), gradients


def check(steps: dict[str, Step], inputs: tuple[Outputs, Outputs, Tensor], tolerance: float) -> float:
    """Stop where the two differ; give the largest relative difference of value and gradients."""
    (value, gradients), (other_value, others) = (run(step, inputs) for step in steps.values())
    pairs = [(value, other_value), *zip(gradients, others, strict=True)]
    gap = max(((a - b).float().norm() / a.float().norm()).item() for a, b in pairs)
    if not gap <= tolerance:
        raise SystemExit(f"the two differ by {gap:.1e}, allowed {tolerance:.0e}: nothing was timed")
    return gap


def timed(step: Step, inputs: tuple[Outputs, Outputs, Tensor]) -> float:
    cuda = inputs[2].is_cuda
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(step, inputs)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Step, inputs: tuple[Outputs, Outputs, Tensor]) -> int:
    """Highest number of bytes that are allocated at once beyond those before the step."""
    if inputs[2].is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(step, inputs)
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run(step, inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def compare(steps: dict[str, Step], inputs: tuple[Outputs, Outputs, Tensor], repeats: int) -> tuple[dict[str, float], dict[str, int]]:
    peaks = {name: peak_bytes(step, inputs) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            spent = timed(step, inputs)
            if turn:  # the first is the warm-up
                seconds[name].append(spent)
    return {name: median(values) for name, values in seconds.items()}, peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[256, 1024], help="valid tokens")
    parser.add_argument("--v", type=int, nargs="+", default=[8192, 32000], help="vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="width of the student")
    parser.add_argument("--teacher-hidden", type=int, default=1024, help="width of the teacher")
    parser.add_argument("--chunk", type=int, nargs="+", default=[0], help="tokens a chunk; 0 for the default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of features and heads")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    print("| N | V | chunk | plain ms | chunked ms | time ratio | plain MiB | chunked MiB | memory ratio | largest difference |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for n, v, chunk in product(args.n, args.v, args.chunk):
        inputs = make(n, v, args.hidden, args.teacher_hidden, args.device, dtype)
        steps = {"plain": plain, "chunked": chunked(chunk or None)}
        gap = check(steps, inputs, 1e-4 if args.dtype == "float32" else 2e-2)
        seconds, peaks = compare(steps, inputs, args.repeats)
        size = chunk or chunk_size(v, inputs[2].device)
        print(
            f"| {n} | {v} | {size} | {seconds['plain'] * 1e3:.0f} | {seconds['chunked'] * 1e3:.0f} "
            f"| {seconds['chunked'] / seconds['plain']:.2f} | {peaks['plain'] / 2**20:.0f} | {peaks['chunked'] / 2**20:.0f} "
            f"| {peaks['chunked'] / peaks['plain']:.2f} | {gap:.0e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
