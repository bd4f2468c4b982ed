"""The plan's memory beside what a small Llama pair really allocates on a CPU, part by part.

    python scripts/bench/memory.py > table.md

Two steps of one process: teacher and student forward, the objective, backward, AdamW. Peak: the highest running sum of the profiler's
allocation records, everything counted from the first parameter on (see `loss.py`).
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jsonargparse import Namespace
from loss import peak_bytes, row
from torch import Tensor
from transformers import AutoConfig

from distill import objective
from distill.balance.gradnorm import GradNorm
from distill.balance.gram import gradients_of
from distill.data.embedded import StdlibText
from distill.losses.base import Term
from distill.losses.divergence import ForwardKL
from distill.losses.features import HiddenMSE
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.plan.describe import describe
from distill.plan.job import ALONE
from distill.plan.measure import MicroStep
from distill.plan.memory import memory
from distill.students.load import FromConfig
from distill.teachers.online import OnlineTeacher

LLAMA = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}
STUDENT = LLAMA | {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "tie_word_embeddings": True}
TEACHER = LLAMA | {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6}
CASES: list[dict[str, Any]] = [
    {},
    {"accumulate": 2},
    {"checkpointing": True},
    {"precision": "bf16-mixed"},
    {"precision": "bf16-true"},
    {"norms": True},
    {"features": True},
    {"exact": True},
    {"exact": True, "accumulate": 2},
    {"batch": 1, "classes": 32768},
]


def compare(
    classes: int = 8192,
    batch: int = 4,
    length: int = 512,
    precision: str = "32-true",
    accumulate: int = 1,
    checkpointing: bool = False,
    norms: bool = False,
    features: bool = False,
    exact: bool = False,
) -> dict[str, tuple[int, int]]:
    """Estimated and measured bytes by part."""
    student = FromConfig(STUDENT, gradient_checkpointing=checkpointing)
    terms: dict[str, Term] = {"ce": CrossEntropy(), "kd": ForwardKL(2.0)} | ({"hidden": HiddenMSE()} if features else {})
    trainer = Namespace(precision=precision, accumulate_grad_batches=accumulate, log_every_n_steps=int(norms))
    config = Namespace(trainer=trainer, data=Namespace(init_args=Namespace(vocab_size=classes, max_length=length, pack=True)))
    data = StdlibText(vocab_size=classes, max_length=length, batch_size=batch)
    with tempfile.TemporaryDirectory() as folder:
        AutoConfig.for_model(**TEACHER, vocab_size=classes).save_pretrained(folder)
        balancer = GradNorm(exact_every=1) if exact else None
        module = DistillModule(student, terms, OnlineTeacher(folder), balancer)
        plan = describe(module, data, config, lambda path: (module, None), device="cpu")
    guess, found = memory(plan.job, ALONE, 1), {}
    assert plan.job.teacher is not None

    def run() -> None:
        step = MicroStep(plan, student)
        ours, theirs = step.models
        params = [*ours.parameters(), *(p for term in plan.terms.values() for p in term.parameters())]
        optimizer = torch.optim.AdamW(params, lr=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            window = None
            for _ in range(accumulate):
                if exact:
                    window = gradients_of(each_alone(step), list(plan.terms), ours, window)
                step()
            del window
            optimizer.step()
        found["parameters"] = guess.parameters, size(params)
        found["gradients"] = guess.gradients, size(p.grad for p in params if p.grad is not None)
        found["optimizer"] = guess.optimizer, size(state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
        found["teacher"] = plan.job.teacher_bytes * plan.job.teacher.parameters, size(theirs.parameters())

    peak = peak_bytes(run, cuda=False)
    return found | {"peak": (guess.peak, peak)}


def each_alone(step: MicroStep) -> Callable[[str], Tensor]:
    """What evaluates a term by itself, on one forward pass of both models, as `DistillModule.objective` does for exact norms."""
    plan, (student, teacher) = step.described, step.models
    with torch.no_grad():
        target = plan.task.outputs(teacher, step.batch)
    outputs = plan.task.outputs(student, step.batch)
    given = (outputs, target, step.batch, plan.job.classes, plan.job.chunk)
    return lambda name: objective.evaluate({name: plan.terms[name]}, {name: 1.0}, *given).total


def size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)), help="which of the cases, from 0")
    args = parser.parse_args(argv)
    row("case", "part", "estimated, MiB", "measured, MiB", "estimated ÷ measured")
    row("---", "---", "--:", "--:", "--:")
    for case in (CASES[i] for i in args.cases):
        name = ", ".join(f"{key} {value}" for key, value in case.items()) or "plain"
        for part, (guess, seen) in compare(**case).items():
            row(name, part, f"{guess / 2**20:.1f}", f"{seen / 2**20:.1f}", f"{guess / seen:.2f}")


if __name__ == "__main__":
    main()
