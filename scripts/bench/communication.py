"""Bytes per optimizer step that go through each collective, counted on two CPU ranks, beside the plan's formula.

    python scripts/bench/communication.py --strategies ddp zero1 zero2 zero3 > table.md

A Llama pair is trained by the real Trainer over gloo; every call of `torch.distributed` is seen, also those of DDP's reducer and of
DeepSpeed. What is counted is the size of the whole; what a rank sends of it in a ring follows (`distill.plan.communication`). The few bytes
that the loss, the count of valid tokens and the log send are in the measured column alone. The paper's column is section 7 of
Rajbhandari et al. 2019, arXiv 1910.02054: 2 Ψ for DDP, ZeRO-1 and ZeRO-2, 3 Ψ for ZeRO-3, times (n − 1) / n.
"""

import argparse
import json
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64}
STUDENT = LLAMA | {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 2, "tie_word_embeddings": True}
TEACHER = LLAMA | {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2}
CLASSES, STEPS = 1024, 3
HEAD = ("strategy", "precision", "accumulate", "collective", "calls", "counted, kB", "formula, kB", "counted ÷ formula")
RING = ("strategy", "precision", "accumulate", "sent per rank, kB", "formula, kB", "the paper, kB", "counted ÷ paper")


def train(strategy: str, precision: str, accumulate: int, folder: Path) -> dict[str, Any]:
    """Train a few steps on this rank; give bytes and calls of one step by kind, and the formula's."""
    import pytorch_lightning as pl
    from jsonargparse import Namespace

    import distill.parallel
    from distill.data.text import TextData
    from distill.losses.divergence import ForwardKL
    from distill.losses.hard import CrossEntropy
    from distill.module import DistillModule
    from distill.plan import communication
    from distill.plan.counted import Collectives
    from distill.plan.describe import describe
    from distill.plan.job import STRATEGIES
    from distill.plan.table import named
    from distill.students.load import FromConfig
    from distill.teachers.online import OnlineTeacher

    assert distill.parallel.__path__, "imported so that strategies are known by name"

    class Count(pl.Callback):
        """Counts the second optimizer step: the first one also sets things up."""

        def __init__(self) -> None:
            self.seen = Collectives()
            self.open = False

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1 and not self.open:
                self.seen.__enter__()
                self.open = True

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 2 and self.open:
                self.seen.__exit__(None, None, None)
                self.open = False

    count = Count()
    data = TextData(train_data=str(folder / "text.txt"), tokenizer=str(folder), max_length=32, batch_size=2, val_fraction=0.0, pack=False)
    student = FromConfig(STUDENT)
    module = DistillModule(student, {"ce": CrossEntropy(), "kd": ForwardKL(2.0)}, OnlineTeacher(str(folder)))
    names = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=_strategy(strategy),
        precision=precision,
        accumulate_grad_batches=accumulate,
        max_steps=STEPS,
        callbacks=[count],
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=1000,
        **names,
    )
    trainer.fit(module, datamodule=data)
    given = Namespace(precision=precision, accumulate_grad_batches=accumulate, log_every_n_steps=1000)
    config = Namespace(trainer=given, data=Namespace(init_args=Namespace(vocab_size=CLASSES, max_length=32)))
    plan = DistillModule(student, {"ce": CrossEntropy(), "kd": ForwardKL(2.0)}, OnlineTeacher(str(folder)))
    name, _, live = strategy.partition(":")
    row = next(s for s in STRATEGIES if s.name == named(name, 2))
    row = replace(row, live=int(live)) if live else row
    job = describe(plan, data, config, lambda path: (plan, None), device="cpu").job.under(row)
    width = job.compute if row.zero else job.weight
    paper = communication.by_the_paper(job, row) * width * job.trainable / 2
    return {"bytes": count.seen.bytes, "calls": count.seen.calls, "formula": communication.collectives(job, row), "paper": paper}


def _strategy(name: str) -> Any:
    """A strategy by its name; `zero3:0` keeps no parameter gathered, as it is with models that are large."""
    from distill.parallel.deepspeed import DeepSpeedCPU

    kind, _, live = name.partition(":")
    if not live:
        return kind
    limits = {"stage3_max_live_parameters": int(live), "stage3_max_reuse_distance": int(live), "stage3_prefetch_bucket_size": 0}
    return DeepSpeedCPU(config={"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **limits}})


def _rank(rank: int, port: int, folder: str, strategy: str, precision: str, accumulate: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    found = train(strategy, precision, accumulate, Path(folder))
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))


def make(folder: Path) -> None:
    """A teacher with random weights, its tokenizer, and a text."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"[PAD]": 0, "[EOS]": 1} | {f"w{i}": i for i in range(2, CLASSES)}, unk_token="[PAD]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]").save_pretrained(folder)
    config = AutoConfig.for_model(**TEACHER, vocab_size=CLASSES, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    (folder / "text.txt").write_text("\n\n".join(" ".join(f"w{2 + (i * j) % 1000}" for j in range(200)) for i in range(40)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--strategies", nargs="+", default=["ddp", "zero1", "zero2", "zero3", "zero3:0", "fsdp2"], help="as in trainer.strategy"
    )
    parser.add_argument("--precision", nargs="+", default=["32-true"])
    parser.add_argument("--accumulate", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    multiprocessing.set_forkserver_preload(["distill.module", "distill.parallel", "distill.plan.describe", "transformers"])
    from distill.plan.communication import sent

    ring: list[tuple[object, ...]] = []
    _row(*HEAD)
    _row(*["---"] * 4, *["--:"] * 4)
    with tempfile.TemporaryDirectory() as name:
        make(Path(name))
        for strategy in args.strategies:
            for precision in args.precision:
                for accumulate in args.accumulate:
                    found = _run(name, strategy, precision, accumulate)
                    where = strategy, precision, accumulate
                    for kind in sorted(found["bytes"] | found["formula"]):
                        seen, guess = found["bytes"].get(kind, 0), found["formula"].get(kind, 0)
                        ratio = f"{seen / guess:.3f}" if guess else "–"
                        _row(*where, kind, found["calls"].get(kind, 0), f"{seen / 1e3:.1f}", f"{guess / 1e3:.1f}", ratio)
                    seen, guess = (sum(sent(kind, size, 2) for kind, size in found[which].items()) for which in ("bytes", "formula"))
                    kilobytes = (f"{size / 1e3:.1f}" for size in (seen, guess, found["paper"]))
                    ring.append((*where, *kilobytes, f"{seen / found['paper']:.3f}"))
    print()
    _row(*RING)
    _row(*["---"] * 2, *["--:"] * 5)
    for line in ring:
        _row(*line)


def _run(folder: str, strategy: str, precision: str, accumulate: int) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # forked from one process that has imported everything once
    torch.multiprocessing.start_processes(_rank, (port, folder, strategy, precision, accumulate), nprocs=2, start_method="forkserver")
    found: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
    return found


def _row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
