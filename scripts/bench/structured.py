"""What removing neurons is worth by the clock: an encoder of BERT's width, whole and with a part of its feed-forward networks.

    python scripts/bench/structured.py
    python scripts/bench/structured.py --sparsity 0.5 --lengths 64 128 --batches 1 8

The smaller model is pruned by magnitude as the callback does it, saved, and loaded again by stock `from_pretrained`; its logits are
compared with those of the masked model. Both are timed in turn in one process, after a warm-up, so that a busy machine slows them alike;
the ratio is the median over pairs of neighbouring calls. Beside the clock's time stands the process's own, which other processes do not
lengthen. The last column is what the count of multiplications promises, attention included.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

from distill.compress.mask import Mask
from distill.compress.pruner import Parts


class Spent(NamedTuple):
    """Seconds of the clock, and of this process."""

    clock: float
    process: float


class Row(NamedTuple):
    """What was measured at one batch and length."""

    batch: int
    length: int
    whole: list[Spent]
    part: list[Spent]


def encoder(layers: int, width: int) -> PreTrainedModel:
    """BERT with random weights."""
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=layers, hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64)
    return BertForSequenceClassification(config).eval()


@torch.no_grad()
def pruned(sparsity: float, layers: int, width: int) -> tuple[PreTrainedModel, float]:
    """The same without a share of its neurons, through a folder and back, and the largest gap between its logits and the masked model's."""
    model, pruner = encoder(layers, width), Parts(Mask, "neurons", "structured.py")
    pruner.prepare(model)
    pruner.update(model, sparsity, lambda name: pruner.score_of(model, name, "magnitude", 0, {}))
    ids = inputs(2, 16)
    masked = model(input_ids=ids).logits
    pruner.finish(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return again, float((again(input_ids=ids).logits - masked).abs().max())


def inputs(batch: int, length: int) -> Tensor:
    return torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def in_turn(whole: PreTrainedModel, part: PreTrainedModel, batch: int, length: int, calls: int, warm_up: int) -> Row:
    """Time both, one call each at a time."""
    ids, row = inputs(batch, length), Row(batch, length, [], [])
    for i in range(warm_up + calls):
        for model, times in ((whole, row.whole), (part, row.part)):
            start = time.perf_counter(), time.process_time()
            model(input_ids=ids)
            if i >= warm_up:
                times.append(Spent(time.perf_counter() - start[0], time.process_time() - start[1]))
    return row


def promised(model: PreTrainedModel, length: int) -> float:
    """Multiplications of a layer for one row: 4 projections, the scores and their use, the feed-forward network."""
    width = model.config.hidden_size
    return length * (4 * width**2 + 2 * length * width + 2 * width * model.config.intermediate_size)


def table(rows: Sequence[Row], whole: PreTrainedModel, part: PreTrainedModel) -> str:
    """Markdown."""
    lines = ["| batch | length | whole, ms | pruned, ms | × by the clock | 10 % to 90 % | × by the process | × by the count |"]
    lines.append("|" + "--:|" * 8)
    for row in rows:
        ratios = [sorted(getattr(a, what) / getattr(b, what) for a, b in zip(row.whole, row.part, strict=True)) for what in Spent._fields]
        times = (f"{1e3 * median(spent.clock for spent in each):.1f}" for each in (row.whole, row.part))
        spread = f"{ratios[0][len(ratios[0]) // 10]:.2f} to {ratios[0][-1 - len(ratios[0]) // 10]:.2f}"
        count = promised(whole, row.length) / promised(part, row.length)
        cells = [
            str(row.batch),
            str(row.length),
            *times,
            f"**{median(ratios[0]):.2f}**",
            spread,
            f"{median(ratios[1]):.2f}",
            f"{count:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of the neurons that goes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--calls", type=int, default=20, help="of each model at each size")
    parser.add_argument("--warm-up", type=int, default=3, help="calls before")
    args = parser.parse_args(argv)
    whole = encoder(args.layers, args.width)
    part, gap = pruned(args.sparsity, args.layers, args.width)
    rows = [in_turn(whole, part, batch, length, args.calls, args.warm_up) for batch in args.batches for length in args.lengths]
    sizes = " and ".join(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M" for model in (whole, part))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.layers} layers of width {args.width}, {sizes} parameters")
    print(f"after saving and loading, logits differ from the masked model's by at most {gap:.0e}\n")
    print(table(rows, whole, part))


if __name__ == "__main__":
    main()
