"""An optimizer step on a CPU: AdamW as the framework builds it (fused, one pass over the memory) beside torch's default loop.

    OMP_NUM_THREADS=1 python scripts/bench/optimizer.py

Both step the same new Llamas in turn; milliseconds are medians.
"""

import copy
import time
from statistics import median

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from distill.optim import AdamW

SIZES = {"128 × 4": (128, 4), "384 × 6": (384, 6), "768 × 6": (768, 6)}


def llama(width: int, layers: int) -> nn.Module:
    """A Llama with 8,192 classes, and a gradient for every parameter."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, num_attention_heads=4, tie_word_embeddings=True, **sizes))
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


def milliseconds(optimizer: torch.optim.Optimizer) -> float:
    start = time.perf_counter()
    optimizer.step()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Print a table."""
    print("| width × layers | parameters | torch's loop, ms | fused, ms | × |\n|---|--:|--:|--:|--:|")
    for name, size in SIZES.items():
        model = llama(*size)
        plain = copy.deepcopy(model)
        for given, param in zip(model.parameters(), plain.parameters(), strict=True):
            param.grad = given.grad
        fused = AdamW().build(model.named_parameters(), 100)["optimizer"]
        loop = torch.optim.AdamW(plain.parameters(), lr=1e-4, betas=(0.9, 0.95))
        times = [(milliseconds(loop), milliseconds(fused)) for _ in range(9)][2:]
        slow, fast = (median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {sum(p.numel() for p in model.parameters()):,} | {slow:.1f} | {fast:.1f} | {slow / fast:.1f} |", flush=True)


if __name__ == "__main__":
    main()
