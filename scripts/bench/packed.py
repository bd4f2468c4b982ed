"""Sizes and speed of packed safetensors: trained weights in float32, bfloat16, pruned, and quantised.

    python scripts/bench/packed.py path/to/model.safetensors > table.md

Every file is unpacked again and compared byte by byte before its line is printed. The bound is the order-0 entropy of the planes. Pruned:
the smallest 80 % of the magnitudes over all matrices. Quantised: int4 in groups of 32, as the floats that QAT leaves, and as the integers
of `torchao`'s files, a byte each.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.compress.fake_quant import weight_quantiser
from distill.compress.integers import integers
from distill.compress.schemes import SCHEMES
from distill.export.codec import Coder, pack, unpack

Weights = dict[str, Tensor]


def variants(weights: Weights) -> Iterator[tuple[str, Weights]]:
    matrices = [value.abs().flatten() for value in weights.values() if value.ndim == 2]
    smallest = torch.cat(matrices)
    border = smallest.kthvalue(int(0.8 * len(smallest))).values
    pruned = {name: torch.where(value.abs() > border, value, 0.0) if value.ndim == 2 else value for name, value in weights.items()}
    quantise = weight_quantiser(SCHEMES["int4"])
    fits = {name for name, value in weights.items() if value.ndim == 2 and value.shape[1] % 32 == 0}
    quantised = {name: quantise(value) if name in fits else value for name, value in weights.items()}
    stored = {}
    for name, value in quantised.items():
        stored |= dict(zip((name, f"{name}.scales"), integers(value, SCHEMES["int4"]), strict=True)) if name in fits else {name: value}
    yield "float32", weights
    yield "bfloat16", halved(weights)
    yield "80 % zeros, float32", pruned
    yield "80 % zeros, bfloat16", halved(pruned)
    yield "int4, as bfloat16", halved(quantised)
    yield "int4, as int8", stored


def halved(weights: Weights) -> Weights:
    return {name: value.bfloat16() for name, value in weights.items()}


def row(name: str, weights: Weights, coder: Coder, folder: Path) -> str:
    """A line of the table; stops where the round trip is not exact."""
    raw, packed, again = folder / "raw", folder / "packed", folder / "again"
    save_file(weights, raw)
    start = time.perf_counter()
    sizes = pack(raw, packed, coder)
    middle = time.perf_counter()
    unpack(packed, again)
    end = time.perf_counter()
    if raw.read_bytes() != again.read_bytes():
        raise SystemExit(f"{name}, {coder}: not the same bytes")
    rates = " | ".join(f"{sizes.raw / 1e6 / spent:.0f}" for spent in (middle - start, end - middle))
    return f"| {name} | {coder} | {sizes.raw / 1e6:.1f} | {sizes.packed / sizes.raw:.3f} | {sizes.bound / sizes.raw:.3f} | {rates} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="trained weights, of safetensors")
    parser.add_argument("--coders", nargs="+", default=["zstd", "zipnn"], choices=["zstd", "zipnn"])
    args = parser.parse_args(argv)
    weights = {name: value.float() for name, value in load_file(args.file).items() if value.is_floating_point()}
    print("| weights | coder | MB raw | packed ÷ raw | entropy ÷ raw | MB/s packing | MB/s unpacking |")
    print("| --- | --- | --: | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as folder:
        for name, values in variants(weights):
            for coder in args.coders:
                print(row(name, values, coder, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
