"""Packing is lossless on whatever safetensors can hold, small on weights like trained ones, and notices damage."""

import hashlib
import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.export import codec
from distill.types import DataError
from tests.data.helpers import SHARED
from tests.disk import largest_file

pytest.importorskip("zstandard", reason="packing needs zstandard")

STORIES = SHARED / "stories260K" / "hf" / "model.safetensors"
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def weights(count: int = 400_000) -> torch.Tensor:
    """Normal with a width of its own for each row, as layers have."""
    rng = torch.Generator().manual_seed(0)
    return (torch.randn(400, count // 400, generator=rng) * torch.rand(400, 1, generator=rng) / 20).contiguous()


def of_every_kind() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    tensors = {str(dtype): (torch.randn(37, 11, generator=rng) * 20).to(dtype) for dtype in DTYPES}
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3.4e38, -1e-40])
    tensors |= {"special": special, "special half": special.bfloat16(), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}
    pruned = weights(40_000)
    pruned[pruned.abs() < 0.02] = 0.0
    # a mask that multiplies leaves −0.0 behind
    tensors |= {
        "pruned": pruned,
        "negative zeros": pruned.bfloat16() * (torch.rand(pruned.shape, generator=rng) < 0.1),
        "zeros": torch.zeros(999),
    }
    return tensors | {"noise": torch.randint(0, 256, (5000,), generator=rng, dtype=torch.uint8)}


@pytest.mark.parametrize("coder", ["zstd", "zipnn"])
@pytest.mark.parametrize("block", [codec.BLOCK, 4096], ids=["one block", "many"])
def test_every_dtype_comes_back_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coder: codec.Coder, block: int) -> None:
    if coder == "zipnn":
        pytest.importorskip("zipnn", reason="the coder is not installed")
    monkeypatch.setattr(codec, "BLOCK", block)
    save_file(of_every_kind(), tmp_path / "a", {"format": "pt", "more": "ünïcode"})
    sizes = codec.pack(tmp_path / "a", tmp_path / "b", coder)
    codec.unpack(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()
    assert (sizes.raw, sizes.packed) == ((tmp_path / "a").stat().st_size, (tmp_path / "b").stat().st_size)
    back = load_file(tmp_path / "c")
    assert all(back[name].dtype == value.dtype for name, value in of_every_kind().items())


def test_sizes_are_those_asked_for_and_near_the_entropy(tmp_path: Path) -> None:
    dense = weights()
    sparse = torch.where(dense.abs() >= dense.abs().flatten().kthvalue(int(0.8 * dense.numel())).values, dense, 0.0)
    reached = {}
    for name, tensor in {
        "bf16": dense.bfloat16(),
        "fp32": dense,
        "sparse": sparse.bfloat16(),
        "masked": dense.bfloat16() * (sparse != 0),
    }.items():
        save_file({"w": tensor}, tmp_path / name)
        sizes = codec.pack(tmp_path / name, tmp_path / f"{name}.packed")
        reached[name] = sizes.packed / sizes.raw
        assert sizes.bound / sizes.raw - 0.01 < reached[name] < sizes.bound / sizes.raw + 0.03
    assert reached["bf16"] <= 0.70
    assert reached["fp32"] <= 0.86  # these rows differ more in width than those of a trained model, see below
    assert reached["sparse"] <= 0.24
    assert reached["masked"] <= 0.24


@pytest.mark.skipif(not STORIES.exists(), reason="the shared data are not here")
@pytest.mark.parametrize(("dtype", "coder", "most"), [("bfloat16", "zstd", 0.70), ("bfloat16", "zipnn", 0.68), ("float32", "zstd", 0.84)])
def test_a_trained_model_is_as_small_as_asked_for(tmp_path: Path, dtype: str, coder: codec.Coder, most: float) -> None:
    if coder == "zipnn":
        pytest.importorskip("zipnn", reason="the coder is not installed")
    trained = {name: value.to(getattr(torch, dtype)) for name, value in load_file(STORIES).items()}
    save_file(
        {"w": torch.cat([value.flatten() for value in trained.values()])}, tmp_path / "a"
    )  # its layers alone are a few kilobytes each
    sizes = codec.pack(tmp_path / "a", tmp_path / "b", coder)
    assert sizes.packed / sizes.raw <= most
    codec.unpack(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == (tmp_path / "a").read_bytes()


def test_the_bound_is_the_entropy_of_bytes() -> None:
    assert codec.entropy(np.zeros(100, np.uint8)) == 0
    assert codec.entropy(np.arange(256, dtype=np.uint8)) == pytest.approx(256)
    # three of four bytes alike: −0.75 log2 0.75 − 0.25 log2 0.25 = 0.8113 bits each
    assert codec.entropy(np.array([1, 1, 1, 9] * 8, np.uint8)) == pytest.approx(32 * 0.811278 / 8, rel=1e-5)


def test_any_flipped_byte_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    save_file({"w": weights(4000).bfloat16(), "i": torch.arange(50)}, tmp_path / "a")
    codec.pack(tmp_path / "a", tmp_path / "b")
    good = (tmp_path / "b").read_bytes()
    (tmp_path / "c").write_bytes(b"before")
    places = [0, 5, 9, len(good) // 3, len(good) // 2, len(good) - 70, len(good) - 40, len(good) - 1]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        (tmp_path / "b").write_bytes(bad)
        with pytest.raises(DataError, match=r"damaged|not made by"):
            codec.unpack(tmp_path / "b", tmp_path / "c")
    for cut in (good[:-1], good[:40], b"", good + b"x"):
        (tmp_path / "b").write_bytes(cut)
        with pytest.raises(DataError):
            codec.unpack(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"before"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not safetensors at all",
        (2).to_bytes(8, "little") + b"{]",
        (1 << 40).to_bytes(8, "little") + b"{}",
        *(
            len(head := json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [start, 8]}}).encode()).to_bytes(8, "little")
            + head
            + data
            for start, data in ((0, b"short"), (0, b"too long" * 2), (4, b"a" * 8))
        ),
        *(
            len(head := json.dumps(header).encode()).to_bytes(8, "little") + head + b"a" * 8
            for header in (
                [1],
                {"w": 1},
                {"w": {"dtype": "F32", "shape": [2]}},
                {"w": {"shape": [2], "data_offsets": [0, 8]}},
                {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, "8"]}},
                {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 7]}},
                {"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
            )
        ),
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
    ids=[
        *("empty", "text", "json", "length", "cut", "more", "hole"),
        *("a list", "no entry", "no offsets", "no dtype", "a word", "part of a float", "backwards", "deep"),
    ],
)
def test_what_is_no_safetensors_is_said_so(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=r"is no safetensors file|ends before|goes on after"):
        codec.pack(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_whole_file_of_another_version_is_said_so(tmp_path: Path) -> None:
    bodies = (
        b"",  # no header
        struct.pack("<BQQ", codec.ZSTD, 4, 4) + b"nope",  # not of zstandard
        struct.pack("<BQQ", codec.RAW, 1, 1) + b"h" + struct.pack("<BB?Q", codec.PLANES, 3, False, 1),  # integers of three bytes
        struct.pack("<BQQ", codec.RAW, 1, 1) + b"h" + bytes([codec.END]) + bytes(32),  # the sha256 of something else
    )
    for body in bodies:
        whole = codec.MAGIC + body
        (tmp_path / "b").write_bytes(whole + hashlib.sha256(whole).digest())
        with pytest.raises(DataError, match="another version"):
            codec.unpack(tmp_path / "b", tmp_path / "c")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "BLOCK", 1 << 16)
    save_file({"w": weights(4_000_000).bfloat16()}, tmp_path / "a")  # 8 MB, 123 blocks
    tracemalloc.start()
    codec.pack(tmp_path / "a", tmp_path / "b")
    codec.unpack(tmp_path / "b", tmp_path / "c")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * codec.BLOCK


def test_a_disk_that_fills_leaves_the_packed_file_that_was_there(tmp_path: Path) -> None:
    save_file({"w": weights(40_000)}, tmp_path / "a")
    (tmp_path / "b").write_bytes(b"before")
    with largest_file(30_000), pytest.raises(OSError, match="too large"):
        codec.pack(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"before"
