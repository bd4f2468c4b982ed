"""Time and peak memory of the chunked objective beside plain PyTorch and other libraries: cross-entropy plus T² · forward KL at T = 2.

    python scripts/bench/loss.py --n 256 1024 --v 8192 32000 > table.md
    python scripts/bench/loss.py --divergences --n 1024 --v 32000 > divergences.md

Every step is one forward and backward. All run in turn in one process, so that a busy machine slows them alike, and only after each has
given the value and gradients of plain PyTorch. `products` is the four matrix products alone (both logits, the gradients of features and
head), cut as ours are and into buffers that are used again: a lower bound. `--divergences` times every token loss by itself on given
logits, forward and backward, block by block as the chunked objective evaluates them.

Peak memory is what the step allocates beyond the features and heads that are there before it: on CUDA `max_memory_allocated`; on a CPU
the highest running sum of the profiler's allocation records, which every tensor and every kernel's scratch space from torch's allocator
leaves (what BLAS allocates itself is not seen). What is left out, and why, is said on stderr.
"""

import argparse
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median

import psutil  # type: ignore[import-untyped]
import torch
from peers import NAMES, Inputs, Objective, T, peers, plain, products, weight
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import distill.losses
from distill.layers import Layers
from distill.losses.base import Setting, TokenLoss
from distill.losses.block import Terms
from distill.losses.chunked import block_size, chunk_size, chunked_objective, chunks
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.losses.support import Distribution
from distill.types import ConfigError, Outputs

Result = tuple[Tensor, list[Tensor]]
Call = Callable[[], object]
SPREAD = 4.0  # of the features: logits of about ±2.3, so that the two models differ and a wrong temperature does not pass for rounding
COPIES = 8  # of the logits in float32, that plain PyTorch holds at its peak
assert distill.losses.__path__, "imported so that every loss is defined"


def chunked(chunk: int) -> Objective:
    losses, weights = {"ce": CrossEntropy(), "kd": ForwardKL(T)}, {"ce": 1.0, "kd": 1.0}

    def objective(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        return chunked_objective(student, teacher, labels, losses, weights, len(weight(student)), chunk)[0]

    return objective


def make(n: int, v: int, hidden: int, teacher_hidden: int, device: str, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(0)

    def side(width: int) -> Outputs:
        head = nn.Linear(width, v, bias=False, device=device, dtype=dtype)
        return Outputs(SPREAD * torch.randn(1, n, width, device=device, dtype=dtype), head)

    student, teacher = side(hidden), side(teacher_hidden)
    student.features.requires_grad_()
    return student, teacher, torch.randint(v, (1, n), device=device)


def run(objective: Objective, inputs: Inputs) -> Result:
    """One forward and backward; give the value and the gradients, and leave none behind."""
    student, _, labels = inputs
    leaves = [student.features, *student.head.parameters()]
    value = objective(*inputs)
    (value / labels.numel()).backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    for leaf in leaves:
        leaf.grad = None
    return value.detach(), gradients


def check(objectives: dict[str, Objective], inputs: Inputs, tolerance: float) -> dict[str, float]:
    """Stop where one differs from the first; give the largest relative difference of value and gradients of each."""
    value, gradients = run(next(iter(objectives.values())), inputs)
    gaps = {}
    for name, objective in objectives.items():
        other_value, others = run(objective, inputs)
        pairs = [(value, other_value), *zip(gradients, others, strict=True)]
        gaps[name] = max(((a - b).float().norm() / a.float().norm()).item() for a, b in pairs)
        if not gaps[name] <= tolerance:
            raise SystemExit(f"{name} differs from plain by {gaps[name]:.1e}, allowed {tolerance:.0e}: nothing was timed")
    return gaps


def timed(call: Call, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(calls: dict[str, Call], repeats: int, cuda: bool) -> dict[str, float]:
    """Seconds of each, the median over the turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            spent = timed(call, cuda)
            if turn:  # the first is the warm-up
                seconds[name].append(spent)
    return {name: median(values) for name, values in seconds.items()}


def peak_bytes(call: Call, cuda: bool) -> int:
    """Highest number of bytes that are allocated at once beyond those before the step."""
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        record.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


def fits(n: int, v: int, device: torch.device) -> bool:
    """Whether plain PyTorch has room; says so where it has not."""
    need = COPIES * n * v * 4
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if need > room:
        print(f"{n} x {v} is left out: plain needs about {need / 2**30:.1f} GiB, {room / 2**30:.1f} are free", file=sys.stderr)
    return bool(need <= room)


def row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def bench_objective(args: argparse.Namespace, device: torch.device) -> None:
    others = peers(args.peers, args.liger_chunk)
    row("N", "V", "H_s", "H_t", "chunk", "step", "ms", "÷ plain", "MiB", "÷ plain", "ours ÷ it, ms", "ours ÷ it, MiB", "difference")
    row(*["--:"] * 5, "---", *["--:"] * 7)
    for n, v, chosen in product(args.n, args.v, args.chunk):
        if not fits(n, v, device):
            continue
        torch.compiler.reset()  # or, after a few sizes, torch.compile gives up and runs eagerly
        chunk, cuda = chosen or chunk_size(v, device), device.type == "cuda"
        inputs = make(n, v, args.hidden, args.teacher_hidden, args.device, getattr(torch, args.dtype))
        objectives = {"plain": plain, "ours": chunked(chunk), **others}
        gaps = check(objectives, inputs, 1e-4 if args.dtype == "float32" else 2e-2)
        calls: dict[str, Call] = {name: partial(run, objective, inputs) for name, objective in objectives.items()}
        calls = {"plain": calls.pop("plain"), "products": partial(products, inputs, chunk), **calls}
        mib = {name: peak_bytes(call, cuda) / 2**20 for name, call in calls.items()}
        ms = {name: seconds * 1e3 for name, seconds in in_turn(calls, args.repeats, cuda).items()}
        for name in calls:
            time_ratios = f"{ms[name] / ms['plain']:.2f}", f"{ms['ours'] / ms[name]:.2f}"
            memory_ratios = f"{mib[name] / mib['plain']:.2f}", f"{mib['ours'] / mib[name]:.2f}"
            gap = f"{gaps[name]:.0e}" if name in gaps and name != "plain" else "–"
            where = n, v, args.hidden, args.teacher_hidden, chunk
            columns = f"{ms[name]:.0f}", time_ratios[0], f"{mib[name]:.0f}", memory_ratios[0], time_ratios[1], memory_ratios[1]
            row(*where, name, *columns, gap)


def token_losses(base: type[TokenLoss] = TokenLoss) -> Iterator[type[TokenLoss]]:
    for cls in base.__subclasses__():
        yield from token_losses(cls)
        if not inspect.isabstract(cls) and cls.__module__.startswith("distill.losses."):
            yield cls


def prepared(v: int, device: torch.device) -> dict[str, TokenLoss]:
    """Every token loss by its defaults, in a made-up setting; says which cannot be had so."""
    counts = 1 + torch.arange(v) % 50
    student, teacher = (Layers(f"model.{who}", ("layers.0", "layers.1"), 8, 2, None, (), "eager") for who in ("student", "teacher"))
    setting = Setting("model.losses.it", "sample", v, lambda: counts, str, int(counts.sum()), 8, 8, False, student, teacher)
    found = {}
    for cls in dict.fromkeys(token_losses()):
        needed = [p.name for p in inspect.signature(cls).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        try:
            if needed:
                raise ConfigError(f"no default for {', '.join(needed)}")
            loss = cls()
            loss.prepare(setting)
        except ConfigError as reason:
            print(f"{cls.__name__} is left out: {reason}", file=sys.stderr)
        else:
            loss.at(0, 1)
            found[cls.__name__] = loss.to(device)
    return found


def in_blocks(loss: TokenLoss, logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> None:
    """Forward and backward as the chunked objective does between its matrix products."""
    terms = Terms({"it": loss}, {"it": 1.0}, logits.shape[1])
    for rows in chunks(len(labels), block_size(logits.shape[1], logits.device)):
        terms.gradients(logits[rows], Distribution(teacher_logits[rows]), labels[rows], each=False)


def bench_divergences(args: argparse.Namespace, device: torch.device) -> None:
    row("N", "V", "loss", "ms", "÷ ForwardKL")
    row("--:", "--:", "---", "--:", "--:")
    for n, v in product(args.n, args.v):
        torch.manual_seed(0)
        logits, teacher_logits = (2 * torch.randn(n, v, device=device) for _ in range(2))
        labels = torch.randint(v, (n,), device=device)
        calls: dict[str, Call] = {
            name: partial(in_blocks, loss, logits, teacher_logits, labels) for name, loss in prepared(v, device).items()
        }
        seconds = in_turn(calls, args.repeats, device.type == "cuda")
        for name, spent in sorted(seconds.items(), key=lambda item: item[1]):
            row(n, v, name, f"{spent * 1e3:.1f}", f"{spent / seconds['ForwardKL']:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--divergences", action="store_true", help="time each token loss by itself instead")
    parser.add_argument("--n", type=int, nargs="+", default=[256, 1024], help="valid tokens")
    parser.add_argument("--v", type=int, nargs="+", default=[8192, 32000], help="vocabulary")
    parser.add_argument("--hidden", type=int, default=512, help="width of the student")
    parser.add_argument("--teacher-hidden", type=int, default=1024, help="width of the teacher")
    parser.add_argument("--chunk", type=int, nargs="+", default=[0], help="tokens a chunk of ours; 0 for the default")
    parser.add_argument("--peers", choices=NAMES, nargs="*", default=["liger", "trl"], help="other libraries, where installed")
    parser.add_argument("--liger-chunk", type=int, default=1024, help="Liger's chunk_size; its default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of features and heads")
    args = parser.parse_args(argv)
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, {args.dtype}, median of {args.repeats} turns\n")
    (bench_divergences if args.divergences else bench_objective)(args, torch.device(args.device))


if __name__ == "__main__":
    main()
