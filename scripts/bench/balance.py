"""What balancing costs: a whole training step with GradNorm beside the same step with FixedWeights, on a four-term objective.

    python scripts/bench/balance.py

Cross-entropy, forward KL, hidden states and query-key-value relations. One training run; each step has the next balancer, so that a
busy machine slows all alike. `naive` measures the gradients on the parameters with one more backward pass per term.
"""

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distill.balance.base import Balancer
from distill.balance.fixed import FixedWeights
from distill.balance.gradnorm import GradNorm
from distill.data.text import TextData
from distill.losses.attention import MiniLMRelations
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.students.load import FromConfig
from distill.teachers.online import OnlineTeacher

TERMS = ["ce", "kd", "hidden", "relations"]
MEASURING, BETWEEN = "GradNorm, a step that measures at the branch points", "GradNorm, a step between"
NAIVE = "naive: one more backward pass per term"


class Turns(pl.Callback):
    """Gives each step to the next balancer, and times it."""

    def __init__(self, balancers: dict[str, Balancer], warm_up: int) -> None:
        self.balancers, self.warm_up = balancers, warm_up
        self.seconds: dict[str, list[float]] = {name: [] for name in balancers}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.name = list(self.balancers)[batch_idx % len(self.balancers)]
        pl_module.balancer = self.balancers[self.name]
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if batch_idx >= self.warm_up * len(self.balancers):
            self.seconds[self.name].append(time.perf_counter() - self.start)


def models(folder: Path, vocab: int, length: int, width: int) -> dict[str, Any]:
    """Save a teacher with its tokenizer and a text of random words; give the student's configuration."""
    words = Tokenizer(WordLevel({f"w{i}.": i for i in range(vocab)}, unk_token="w0."))
    words.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0.", eos_token="w1.").save_pretrained(folder)
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": length, "tie_word_embeddings": True}
    teacher = {"hidden_size": 2 * width, "intermediate_size": 6 * width, "num_hidden_layers": 4, **sizes}
    LlamaForCausalLM(LlamaConfig(**teacher, vocab_size=vocab)).save_pretrained(folder)
    rng = random.Random(0)
    rows = [{"text": " ".join(f"w{rng.randrange(2, vocab)}." for _ in range(length - 1))} for _ in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": 2, **sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--width", type=int, default=256, help="of the student; the teacher has twice")
    parser.add_argument("--turns", type=int, default=24)
    args = parser.parse_args()
    balancers: dict[str, Balancer] = {
        "FixedWeights": FixedWeights(),
        MEASURING: GradNorm(every=1, exact_every=0),
        BETWEEN: GradNorm(every=10**9, exact_every=0),
        NAIVE: GradNorm(exact_every=1),
    }
    for balancer in balancers.values():
        balancer.start(TERMS)
    turns = Turns(balancers, warm_up=2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = models(folder, args.vocab, args.length, args.width)
        losses = dict(zip(TERMS, [CrossEntropy(), ForwardKL(2.0), HiddenMSE(), MiniLMRelations(relation_heads=8)], strict=True))
        module = DistillModule(FromConfig(config), losses, OnlineTeacher(str(folder)))
        data = TextData(
            train_data=str(folder / "rows.jsonl"), tokenizer=str(folder), max_length=args.length, batch_size=args.batch, val_fraction=0
        )
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        steps = (args.turns + 2) * len(balancers)
        pl.Trainer(max_steps=steps, max_epochs=-1, callbacks=[turns], log_every_n_steps=0, use_distributed_sampler=False, **quiet).fit(
            module, data
        )
    base = median(turns.seconds["FixedWeights"])
    ratios = {name: median(seconds) / base for name, seconds in turns.seconds.items()}
    every, exact_every = GradNorm().calibration.every, GradNorm().exact_every
    extra = (ratios[MEASURING] - ratios[BETWEEN]) / every + (ratios[NAIVE] - ratios[BETWEEN]) / exact_every
    ratios[f"GradNorm as it comes: branch points every {every} steps, parameters every {exact_every}"] = ratios[BETWEEN] + extra
    print("| balancer | ms per step | ratio |\n|---|--:|--:|")
    for name, ratio in ratios.items():
        print(f"| {name} | {ratio * base * 1e3:.0f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
