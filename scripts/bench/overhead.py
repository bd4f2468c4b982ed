"""What the framework costs: a step of ours, in a real Trainer with logger and callbacks, beside a bare PyTorch loop.

    python scripts/bench/overhead.py

Same models, same batches, same loss (cross-entropy and T² · forward KL), same optimizer and schedule. The bare loop is what one would
write by hand: both forward passes, the loss, `backward`, `step`, `zero_grad`. Ours reads the data, logs to `metrics.jsonl`, prints
progress, counts tokens and measures the terms' gradients for the log, as every run does. Both run in turn in one process, a block of
steps each, so that a busy machine slows them alike; the ratio is the median over pairs of neighbouring blocks. Beside the clock's time
stands the process's own (`time.process_time`), which other processes do not lengthen. `--profile` adds where the time of ours goes.
"""

import argparse
import copy
import cProfile
import json
import pstats
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.balance.fixed import FixedWeights
from distill.callbacks.metrics import JsonlLogger, Throughput
from distill.callbacks.progress import ProgressLines
from distill.data.text import TextData
from distill.losses.chunked import chunked_objective
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.optim import AdamW
from distill.students.load import FromConfig
from distill.tasks import CausalLM
from distill.teachers.online import OnlineTeacher

T, WEIGHTS = 2.0, {"ce": 0.3, "kd": 0.7}
Batch = dict[str, Tensor]


class Spent(NamedTuple):
    """Seconds of the clock, and of this process."""

    clock: float
    process: float


class Bare:
    """The loop without a framework, on a copy of the student and the same teacher."""

    def __init__(self, module: DistillModule, steps: int) -> None:
        assert module.student is not None
        assert module.teacher is not None
        self.student, self.teacher = copy.deepcopy(module.student), module.teacher.models()[0]
        made = module.optimizer.build(self.student.named_parameters(), steps)
        self.optimizer, self.schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        self.losses: nn.ModuleDict = nn.ModuleDict({"ce": CrossEntropy(), "kd": ForwardKL(T)})
        self.classes = module.data.num_classes
        self.task = CausalLM()
        self.last = 0.0

    def step(self, batch: Batch) -> None:
        """One optimizer step."""
        student = self.task.outputs(self.student, batch)
        with torch.no_grad():
            teacher = self.task.outputs(self.teacher, batch)
        losses: Any = dict(self.losses.items())
        total = chunked_objective(student, teacher, batch["labels"], losses, WEIGHTS, self.classes).total
        loss = total / batch["num_valid"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        self.last = float(loss.detach())


class Turns(pl.Callback):
    """Times blocks of steps of the Trainer, and after each runs a block of bare steps on the same batches.

    A block of ours reaches from the end of this hook to the start of the one that ends the block, so that everything of k steps is in
    it: loading, hooks, logging.
    """

    def __init__(self, block: int, warm_up: int, total: int) -> None:
        self.block, self.warm_up, self.total = block, warm_up, total
        self.ours: list[Spent] = []
        self.bare: list[Spent] = []
        self.gaps: list[float] = []
        self.batches: list[Batch] = []
        self.loop: Bare | None = None
        self.profile: cProfile.Profile | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, DistillModule)
        self.loop = Bare(pl_module, self.total)
        self.start = now()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if len(self.batches) < self.block:
            return
        spent = since(self.start, self.block)
        if self.profile is not None:
            self.profile.disable()
        assert self.loop is not None
        start = now()
        for each in self.batches:
            self.loop.step(each)
        if trainer.global_step > self.warm_up:
            self.ours.append(spent)
            self.bare.append(since(start, self.block))
        self.gaps.append(abs(self.loop.last - float(outputs["loss"])) / self.loop.last)
        self.batches = []
        if self.profile is not None and trainer.global_step >= self.warm_up:
            self.profile.enable()
        self.start = now()


def now() -> Spent:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Spent(time.perf_counter(), time.process_time())


def since(start: Spent, steps: int) -> Spent:
    end = now()
    return Spent((end.clock - start.clock) / steps, (end.process - start.process) / steps)


def make(folder: Path, classes: int) -> None:
    """A teacher with random weights, its tokenizer, and a text."""
    words = Tokenizer(WordLevel({"[PAD]": 0, "[EOS]": 1} | {f"w{i}": i for i in range(2, classes)}, unk_token="[PAD]"))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]").save_pretrained(folder)
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=classes, eos_token_id=1, pad_token_id=0, bos_token_id=None)).save_pretrained(folder)
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(2, classes, (1200, 300), generator=rng).tolist()
    lines = (json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in rows)
    (folder / "text.jsonl").write_text("\n".join(lines))


def measure(args: argparse.Namespace, folder: Path) -> Turns:
    """Train, in turn."""
    make(folder, args.v)
    student = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    student |= {"num_key_value_heads": 4, "tie_word_embeddings": True, "max_position_embeddings": args.length}
    steps = args.warm_up + args.blocks * args.block
    module = DistillModule(
        FromConfig(student),
        {"ce": CrossEntropy(), "kd": ForwardKL(T)},
        OnlineTeacher(str(folder)),
        FixedWeights(WEIGHTS),
        AdamW(lr=1e-4, warmup=0, schedule="constant"),
    )
    data = TextData(train_data=str(folder / "text.jsonl"), tokenizer=str(folder), max_length=args.length, batch_size=args.batch)
    turns = Turns(args.block, args.warm_up, steps)
    turns.profile = cProfile.Profile() if args.profile else None
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        callbacks=[Throughput(), ProgressLines(), turns],
        logger=JsonlLogger(folder),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        devices=1,
    )
    with_output = sys.stdout
    sys.stdout = sys.stderr  # the progress lines
    try:
        trainer.fit(module, datamodule=data)
    finally:
        sys.stdout = with_output
    return turns


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--v", type=int, default=8192, help="vocabulary")
    parser.add_argument("--length", type=int, default=256, help="positions in a row")
    parser.add_argument("--batch", type=int, default=2, help="rows in a batch")
    parser.add_argument("--block", type=int, default=5, help="steps in a block")
    parser.add_argument("--blocks", type=int, default=20, help="blocks of each")
    parser.add_argument("--warm-up", type=int, default=5, help="steps before")
    parser.add_argument("--profile", action="store_true", help="show where the time of ours goes; the times are not to be used then")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        turns = measure(args, Path(folder))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {len(turns.ours)} blocks of {args.block} steps each\n")
    print("| time of | ours, ms a step | bare loop, ms a step | ours ÷ bare | 10 % to 90 % of the blocks | largest gap of the loss |")
    print("| --- | --: | --: | --: | --: | --: |")
    for what in Spent._fields:
        ours, bare = ([getattr(spent, what) for spent in each] for each in (turns.ours, turns.bare))
        ratios = sorted(a / b for a, b in zip(ours, bare, strict=True))
        spread = f"{ratios[len(ratios) // 10]:.3f} to {ratios[-1 - len(ratios) // 10]:.3f}"
        times = f"{median(ours) * 1e3:.1f} | {median(bare) * 1e3:.1f}"
        print(f"| the {what} | {times} | {median(ratios):.3f} | {spread} | {max(turns.gaps):.0e} |")
    if turns.profile is not None:
        pstats.Stats(turns.profile).sort_stats("tottime").print_stats(40)


if __name__ == "__main__":
    main()
