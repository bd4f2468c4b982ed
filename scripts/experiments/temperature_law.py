"""T ∝ B^(−1/4): the variance of the distillation gradient over the batch size, at a fixed temperature and at the scaled one.

    python scripts/experiments/make_stories.py
    python scripts/experiments/temperature_law.py

Teacher: the story model; student: a small Llama after a few steps of training, so that its logits mean something. The variance is
`E‖g_B − ḡ‖²` of the gradient on the student's parameters over disjoint batches of B rows, in units of its value at B = 8, T = 4.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distill.losses.base import Divergence
from distill.losses.divergence import ForwardKL
from distill.losses.support import Distribution
from distill.schedule import BatchAwareTemperature

REFERENCE_T, REFERENCE_B = 4.0, 8


def rows_of(path: Path, rows: int, length: int) -> Tensor:
    samples = np.load(path)[:rows, :length].astype(np.int64)
    return torch.from_numpy(samples)


def new_student(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 40, "intermediate_size": 104, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=512, initializer_range=0.16, tie_word_embeddings=True))


def distil_loss(student: nn.Module, ids: Tensor, targets: Tensor, loss: Divergence) -> Tensor:
    """The mean over the batch's positions."""
    logits = student(ids, use_cache=False).logits.flatten(0, 1)
    return loss(Distribution(logits), Distribution(targets.flatten(0, 1)), ids.flatten()).mean()


def gradients(student: nn.Module, ids: Tensor, targets: Tensor, loss: Divergence, batch: int) -> Tensor:
    """The gradient of each batch of `batch` rows, `[batches, parameters]`."""
    out = []
    for rows in range(0, len(ids) - batch + 1, batch):
        part = slice(rows, rows + batch)
        found = torch.autograd.grad(distil_loss(student, ids[part], targets[part], loss), list(student.parameters()))
        out.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(out)


def variance(student: nn.Module, ids: Tensor, targets: Tensor, loss: Divergence, batch: int) -> float:
    g = gradients(student, ids, targets, loss, batch)
    return float((g - g.mean(0)).square().sum() / (len(g) - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("../shared/data/stories260K"))
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0, 16.0])
    args = parser.parse_args()
    ids = rows_of(args.source / "teacher_samples_int16.npy", args.rows, args.length)
    teacher = AutoModelForCausalLM.from_pretrained(args.source / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        targets = teacher(ids, use_cache=False).logits
    fixed, scaled = (torch.zeros(args.seeds, len(args.batches)) for _ in range(2))
    over_t = torch.zeros(2, args.seeds, len(args.temperatures))
    for seed in range(args.seeds):
        student = trained(new_student(seed), ids, targets)
        for i, batch in enumerate(args.batches):
            law = BatchAwareTemperature(REFERENCE_T, REFERENCE_B)
            law.prepare(batch)
            fixed[seed, i] = variance(student, ids, targets, ForwardKL(REFERENCE_T, t_squared=False), batch)
            scaled[seed, i] = variance(student, ids, targets, ForwardKL(law, t_squared=False), batch)
        for j, temperature in enumerate(args.temperatures):
            for squared in (0, 1):
                over_t[squared, seed, j] = variance(student, ids, targets, ForwardKL(temperature, bool(squared)), REFERENCE_B)
        print(f"seed {seed} done", flush=True)
    unit = fixed[:, [args.batches.index(REFERENCE_B)]]
    print("\n| B | variance at T = 4 | T ∝ B^(−1/4) | variance at the scaled T |\n|--:|--:|--:|--:|")
    for i, batch in enumerate(args.batches):
        t = REFERENCE_T * (batch / REFERENCE_B) ** -0.25
        print(f"| {batch} | {spread(fixed[:, i] / unit[:, 0])} | {t:.2f} | {spread(scaled[:, i] / unit[:, 0])} |")
    print("\n| T | slope of log variance over log T from the T before, without T² | with T² |\n|--:|--:|--:|")
    steps = torch.tensor(args.temperatures).log().diff()
    slopes = over_t.log().diff(dim=-1) / steps
    for j, temperature in enumerate(args.temperatures[1:]):
        print(f"| {temperature:g} | {spread(slopes[0, :, j])} | {spread(slopes[1, :, j])} |")


def trained(student: nn.Module, ids: Tensor, targets: Tensor) -> nn.Module:
    """Sixty steps, so that the variance is not that of a random start."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for step in range(60):
        part = slice(step * 8 % len(ids), step * 8 % len(ids) + 8)
        optimizer.zero_grad()
        distil_loss(student, ids[part], targets[part], ForwardKL()).backward()
        optimizer.step()
    return student


def spread(values: Tensor) -> str:
    return f"{values.mean():.2f} ± {values.std():.2f}"


if __name__ == "__main__":
    main()
