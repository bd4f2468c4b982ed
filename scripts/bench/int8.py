"""An encoder of BERT's width on a CPU: float32 in eager PyTorch beside its int8 exports.

    OMP_NUM_THREADS=1 python scripts/bench/int8.py > table.md

All run in turn in one process, on as many threads as torch has, so that a busy machine slows them alike; each time is the median over
turns, each ratio the median over turns of neighbours. Exports are made by `distill.export`, so each was compared with the student.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from distill.export.base import Run, Source
from distill.export.driver import Exported, export, parse
from distill.report.costs.served import logits_of
from distill.report.environment import processor
from distill.tasks import SequenceClassification
from distill.types import Batch

EAGER = "fp32, eager PyTorch"


def encoder(args: argparse.Namespace) -> Source:
    """Random weights: the time does not depend on them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": args.v, "hidden_size": args.width, "intermediate_size": 4 * args.width, "num_hidden_layers": args.layers}
    config = BertConfig(**sizes, num_attention_heads=args.width // 64, max_position_embeddings=args.length, num_labels=4)
    model = BertForSequenceClassification(config).eval().requires_grad_(False)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]")), unk_token="[UNK]")
    rows = [batch_of(4, args, seed) for seed in range(args.calibration)]
    return Source(model, words, SequenceClassification(), lambda: rows, {})


def batch_of(size: int, args: argparse.Namespace, seed: int = 0) -> Batch:
    ids = torch.randint(args.v, (size, args.length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def in_turn(runs: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Seconds of every turn; the first two warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def rows_of(runs: dict[str, Run], done: Sequence[Exported], args: argparse.Namespace) -> list[str]:
    """Lines of the table, one for each batch size and model."""
    sizes = {each.name: each for each in done}
    lines = []
    for size in args.batches:
        batch = batch_of(size, args)
        seconds = in_turn({name: partial(run, batch) for name, run in runs.items()}, args.turns)
        for name, spent in seconds.items():
            ratios = sorted(a / b for a, b in zip(seconds[EAGER], spent, strict=True))
            found = sizes.get(name)
            weight = "1.000 | " if found is None else f"{found.ratio:.3f} | {found.gap.kl:.1e}"
            spread = f"{ratios[len(ratios) // 10]:.2f} to {ratios[-1 - len(ratios) // 10]:.2f}"
            lines.append(f"| {size} | {name} | {median(spent) * 1e3:.1f} | {median(ratios):.2f} | {spread} | {weight} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=768, help="of the hidden states; a multiple of 64")
    parser.add_argument("--length", type=int, default=128, help="positions in a row")
    parser.add_argument("--v", type=int, default=2048, help="vocabulary")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows in a batch")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--calibration", type=int, default=16, help="batches of 4 rows")
    parser.add_argument("--formats", nargs="+", default=["onnx:int8", "onnx:int8-static", "openvino:int8"])
    args = parser.parse_args(argv)
    source, formats = encoder(args), parse(args.formats, None)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        done = export(source, formats, Path(folder))
        runs: dict[str, Run] = {EAGER: partial(logits_of, source.model)}
        runs |= {each.name: made.load(Path(folder) / each.name, source.task) for made, each in zip(formats, done, strict=True)}
        lines = rows_of(runs, done, args)
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {args.turns} turns\n")
    print("| batch | model | ms a batch | throughput ÷ fp32 | 10 % to 90 % | bytes ÷ fp32 | KL, nats |")
    print("| --: | --- | --: | --: | --: | --: | --: |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
