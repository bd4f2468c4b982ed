"""What a training step from a store costs: beside plain fine-tuning without any teacher, and beside the teacher in memory.

    python scripts/bench/cached_step.py

One training run of one student, whose steps are in turn plain (cross-entropy alone), from the store, and with the teacher in memory (both
with forward KL too): a few of each in every round, so that a busy machine slows all alike. The steps are whole: loader, forward, objective,
backward, AdamW. The store decodes a step ahead in threads, as in any run. The first step of a turn does not count, for no step before it
has decoded anything. Beside the clock's time stands the process's own, decoding threads included, which other processes do not lengthen.
The teacher's weights are random, its distributions as sharp as a language model's: 2.5 nats.
"""

import argparse
import json
import math
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.data.text import TextData
from distill.losses.base import Term
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.report.sources import caching
from distill.students.load import FromConfig
from distill.teachers.base import Teacher
from distill.teachers.cached import CachedTeacher
from distill.teachers.online import OnlineTeacher
from distill.types import Batch, SparseTarget

PLAIN, STORED, ONLINE = "plain fine-tuning, no teacher", "from the store", "teacher in memory"


class Switched(CachedTeacher):
    """Decodes ahead only while its own steps are timed, and knows how long the calling thread and the decoding took."""

    on, called, decoded = False, 0.0, 0.0

    def ahead(self, batch: Batch) -> None:
        if self.on:
            start = time.perf_counter()
            super().ahead(batch)
            self.called += time.perf_counter() - start

    def __call__(self, batch: Batch, taps: Any = ()) -> SparseTarget:
        start = time.perf_counter()
        target = super().__call__(batch, taps)
        self.called += time.perf_counter() - start
        return target

    def _decoded(self, where: Any) -> Any:
        start = time.thread_time()
        found = super()._decoded(where)
        self.decoded += time.thread_time() - start
        return found


class Turns(pl.Callback):
    """Gives a few steps to each kind in turn, and times them from the end of one step to that of the next."""

    def __init__(self, stored: Switched, online: OnlineTeacher, steps: int, warm_up: int) -> None:
        self.kinds: dict[str, tuple[Teacher | None, dict[str, Term]]] = {
            PLAIN: (None, {"ce": CrossEntropy()}),
            STORED: (stored, {"ce": CrossEntropy(), "kd": ForwardKL()}),
            ONLINE: (online, {"ce": CrossEntropy(), "kd": ForwardKL()}),
        }
        self.stored, self.steps, self.skip = stored, steps + 1, warm_up
        self.clock: dict[str, list[float]] = {name: [] for name in self.kinds}
        self.process: dict[str, list[float]] = {name: [] for name in self.kinds}
        self.inside: list[tuple[float, float]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._let(pl_module, 0)

    def _let(self, module: Any, step: int) -> None:
        self.name = list(self.kinds)[step // self.steps % len(self.kinds)]
        module.teacher, losses = self.kinds[self.name]
        module.losses, self.stored.on = nn.ModuleDict(losses), self.name == STORED
        self.stored.called = self.stored.decoded = 0.0
        self.start = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        step = trainer.global_step - 1
        if step >= self.skip * self.steps * len(self.kinds) and step % self.steps:
            self.clock[self.name].append(time.perf_counter() - self.start[0])
            self.process[self.name].append(time.process_time() - self.start[1])
            if self.name == STORED:
                self.inside.append((self.stored.called, self.stored.decoded))
        self._let(pl_module, step + 1)


def models(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Save a teacher with its tokenizer and a text of random words; give the student's configuration."""
    words = Tokenizer(WordLevel({f"w{i}.": i for i in range(args.vocab)}, unk_token="w0."))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0.", eos_token="w1.").save_pretrained(folder)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": args.length}
    teacher = {"hidden_size": 2 * args.width, "intermediate_size": 6 * args.width, "num_hidden_layers": 4, **sizes}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**teacher, vocab_size=args.vocab, tie_word_embeddings=False))
    # features have a mean square of 1: normal logits of variance s² have an entropy of ln V − s²/2
    nn.init.normal_(model.lm_head.weight, std=math.sqrt(2 * (math.log(args.vocab) - 2.5) / (2 * args.width)))
    model.save_pretrained(folder)
    rng = random.Random(0)
    rows = [{"text": " ".join(f"w{rng.randrange(2, args.vocab)}." for _ in range(args.length - 1))} for _ in range(args.rows)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    student = {"hidden_size": args.width, "intermediate_size": 3 * args.width, "num_hidden_layers": 2, "tie_word_embeddings": True}
    return {"model_type": "llama", **student, **sizes}


def measure(args: argparse.Namespace, folder: Path) -> tuple[Turns, float]:
    """Write the store and train; also gives its bytes per position."""
    student = models(folder, args)
    online = OnlineTeacher(str(folder))
    stored = Switched(str(folder / "store"), k=args.k, draws=args.draws, source=OnlineTeacher(str(folder)))
    files = {"train_data": str(folder / "rows.jsonl"), "tokenizer": str(folder), "val_fraction": 0.0}
    data = TextData(**files, max_length=args.length, batch_size=args.batch)
    module = DistillModule(FromConfig(student), {"ce": CrossEntropy(), "kd": ForwardKL()}, stored)
    fabric = Fabric(accelerator="auto", devices=1)
    assert stored.source is not None
    caching.ready(module, stored, stored.source, data, torch.float32, fabric)
    caching.write(caching.Job(stored, stored.source, data, fabric, 8), [])
    stored.source = None
    online.setup(data.task(), fabric.device, torch.float32)
    turns = Turns(stored, online, args.steps, args.warm_up)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    steps = (args.rounds + args.warm_up) * 3 * (args.steps + 1)
    pl.Trainer(
        max_steps=steps, max_epochs=-1, devices=1, callbacks=[turns], log_every_n_steps=0, use_distributed_sampler=False, **quiet
    ).fit(module, data)
    assert stored.store is not None
    shards = [shard.manifest for shard in stored.store.shards]
    return turns, sum(shard.bytes for shard in shards) / sum(shard.positions for shard in shards)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=128, help="positions in a row")
    parser.add_argument("--batch", type=int, default=4, help="rows in a batch")
    parser.add_argument("--width", type=int, default=256, help="of the student; the teacher has twice")
    parser.add_argument("--rows", type=int, default=128, help="of the data")
    parser.add_argument("--k", type=int, default=0)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a turn")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds before")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        turns, size = measure(args, Path(name))
    clock, process = ({name: median(times) for name, times in kind.items()} for kind in (turns.clock, turns.process))
    print("| step | ms, clock | ratio | ms, process | ratio |\n|---|--:|--:|--:|--:|")
    for name in turns.kinds:
        ratios = clock[name] / clock[PLAIN], process[name] / process[PLAIN]
        print(f"| {name} | {clock[name] * 1e3:.1f} | {ratios[0]:.3f} | {process[name] * 1e3:.1f} | {ratios[1]:.3f} |")
    called, decoded = (1e3 * median(part) for part in zip(*turns.inside, strict=True))
    print(f"\nOf a step from the store, {called:.1f} ms in the calling thread, and {decoded:.1f} ms decoding in threads beside it.")
    print(f"{size:.1f} bytes a position, V = {args.vocab:,}, k = {args.k}, {args.draws} draws, {args.batch} × {args.length} tokens a step.")


if __name__ == "__main__":
    main()
