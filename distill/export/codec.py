"""Lossless coding of safetensors: each tensor's bytes in planes, each plane entropy-coded.

A float is rotated left by a bit, so that its exponent fills one byte and its sign joins the mantissa; the exponents, of which a trained
model has few, are then a plane of their own. A tensor with many zeros (pruned) is stored as a bitmap and the planes of the others. A file:

    magic · safetensors header · blocks of at most `BLOCK` bytes, in the order of the file · sha256 of the original · sha256 of all before
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from distill.export.base import need
from distill.report.files import write_file
from distill.types import ConfigError, DataError

MAGIC = b"DSTPACK1"
BLOCK = 1 << 23  # bytes of a tensor that are coded at once: memory stays at a few times this
RAW, ZSTD, ZIPNN = 0, 1, 2
PLANES, SPARSE, WHOLE, END = 0, 1, 2, 255
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "C64": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}  # others: 1
FLOATS = ("F64", "F32", "C64", "F16", "BF16")
ZIPNN_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Coder = Literal["zstd", "zipnn"]
Bytes = NDArray[np.uint8]


@dataclass
class Sizes:
    """What came out.

    Attributes:
        raw: bytes before.
        packed: bytes after.
        bound: order-0 entropy of the planes and the header, `Σ n · H(byte)`, in bytes: what a coder of single bytes cannot beat.
    """

    raw: int = 0
    packed: int = 0
    bound: float = 0.0

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(self.raw + other.raw, self.packed + other.packed, self.bound + other.bound)


def pack(source: Path, target: Path, coder: Coder = "zstd") -> Sizes:
    """Code a safetensors file.

    Args:
        source: the file.
        target: the new file; replaced at once, when it is whole.
        coder: `zstd`, or `zipnn`, which comes nearer to the bound on dense floats.

    Raises:
        ConfigError: the coder's package is not installed.
        DataError: the file is not of safetensors.
    """
    sizes = Sizes()

    def write(beside: Path) -> None:
        with source.open("rb") as read, beside.open("wb") as file:
            out, original = _Writer(file, coder), hashlib.sha256()
            out.raw(MAGIC)
            head, tensors = _header(read, source)
            original.update(head)
            out.part(np.frombuffer(head, np.uint8))
            for dtype, block in _blocks(read, tensors, source):
                original.update(block)
                out.block(dtype, np.frombuffer(block, np.uint8))
            out.raw(bytes([END]) + original.digest())
            file.write(out.hash.digest())
            sizes.bound = out.bound

    write_file(target, write)
    sizes.raw, sizes.packed = source.stat().st_size, target.stat().st_size
    return sizes


def unpack(source: Path, target: Path) -> None:
    """Give the original file back, to the bit.

    Raises:
        DataError: a byte of it has changed, or it is of another version; nothing is written then.
        ConfigError: the package of the coder that made it is not installed.
    """
    _check(source)

    def write(beside: Path) -> None:
        original = hashlib.sha256()
        with source.open("rb") as file, beside.open("wb") as out:
            file.seek(len(MAGIC))
            try:
                for piece in _pieces(file):
                    original.update(piece)
                    out.write(piece)
            except ConfigError:  # a coder is missing
                raise
            except (ValueError, TypeError, IndexError, struct.error, need("zstandard", "packed").ZstdError) as error:
                raise DataError(f"{source} is whole, but cannot be read ({error}): it was made by another version of `pack`") from error
            if file.read(32) != original.digest():
                raise DataError(f"{source} does not give back what was packed: it was made by another version of its coder")

    try:
        write_file(target, write)
    except BaseException:
        target.with_name(f".{target.name}.tmp").unlink(missing_ok=True)
        raise


# ---- reading safetensors


def _header(file: BinaryIO, path: Path) -> tuple[bytes, list[tuple[str, int]]]:
    """The header's bytes, and dtype and length of each tensor in the order of the file."""
    first = file.read(8)
    length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
    if not 0 < length <= path.stat().st_size - 8:
        raise DataError(f"{path} is no safetensors file")
    text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{path} is no safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise DataError(f"{path} is no safetensors file: its header is a {type(header).__name__}, not an object of tensors by name")
    spans = sorted(_span(name, entry, path) for name, entry in header.items() if name != "__metadata__")
    if any(start != before for (start, _, _), (_, before, _) in zip(spans, [(0, 0, ""), *spans], strict=False)):
        raise DataError(f"{path} is no safetensors file: its tensors do not lie end to end")
    return first + text, [(dtype, end - start) for start, end, dtype in spans]


def _span(name: str, entry: Any, path: Path) -> tuple[int, int, str]:
    """Start, end and dtype of a tensor."""
    match entry:
        case {"dtype": str(dtype), "data_offsets": [int(start), int(end)]}:
            size = SIZES.get(dtype, 1)
            if start <= end and (end - start) % size == 0:
                return start, end, dtype
            raise DataError(
                f"{path} is no safetensors file: '{name}' goes from {start} to {end}, which is no number of {size}-byte {dtype}"
            )
    raise DataError(f"{path} is no safetensors file: its header gives '{name}' no dtype and data_offsets, but {str(entry)[:100]}")


def _blocks(file: BinaryIO, tensors: list[tuple[str, int]], path: Path) -> Iterator[tuple[str, bytes]]:
    for dtype, length in tensors:
        for start in range(0, length, BLOCK):
            block = file.read(min(BLOCK, length - start))
            if len(block) < min(BLOCK, length - start):
                raise DataError(f"{path} ends before its last tensor does")
            yield dtype, block
    if file.read(1):
        raise DataError(f"{path} goes on after its last tensor")


# ---- writing


class _Writer:
    def __init__(self, file: BinaryIO, coder: Coder) -> None:
        self.file, self.coder, self.hash, self.bound = file, coder, hashlib.sha256(), 0.0
        self.zstd = need("zstandard", "packed").ZstdCompressor(level=1)  # higher levels look for repetitions, and there are none
        self.zipnn: Any = need("zipnn", "packed --precision …-zipnn") if coder == "zipnn" else None

    def raw(self, data: bytes) -> None:
        self.hash.update(data)
        self.file.write(data)

    def part(self, plane: Bytes) -> None:
        """Code some bytes, or leave them where that makes them longer."""
        data = plane.tobytes()
        coded, how = self.zstd.compress(data), ZSTD
        if len(coded) >= len(data):
            coded, how = data, RAW
        self.bound += entropy(plane)
        self.raw(struct.pack("<BQQ", how, len(data), len(coded)) + coded)

    def block(self, dtype: str, block: Bytes) -> None:
        """Code a block of a tensor."""
        size = SIZES.get(dtype, 1)
        values = _rotated(block.view(f"<u{size}")) if dtype in FLOATS else block.view(f"<u{size}")
        zero = values <= 1 if dtype in FLOATS else values == 0  # of floats the sign is the last bit by now
        parts, mode = _planes(values), PLANES
        if zero.mean() > 1 / 8:
            # −0.0 must come back as it was
            parts, mode = [np.packbits(zero), np.packbits(values[zero].astype(bool)), *_planes(values[~zero])], SPARSE
        elif self.zipnn is not None and dtype in ZIPNN_TYPES:
            self._whole(dtype, block, parts)
            return
        self.raw(struct.pack("<BB?Q", mode, size, dtype in FLOATS, len(values)))
        for plane in parts:
            self.part(plane)

    def _whole(self, dtype: str, block: Bytes, planes: list[Bytes]) -> None:
        self.bound += sum(map(entropy, planes))
        coded = bytes(self.zipnn.ZipNN(input_format="byte", bytearray_dtype=ZIPNN_TYPES[dtype]).compress(bytearray(block.tobytes())))
        self.raw(struct.pack("<BB?Q", WHOLE, block.itemsize, True, len(block)))
        self.raw(struct.pack("<BQQ", ZIPNN, len(block), len(coded)) + coded)


def entropy(plane: Bytes) -> float:
    """Order-0 entropy in bytes, `n · H / 8` with `H = −Σ_v f_v log2 f_v` bits over the 256 values of a byte."""
    share = np.bincount(plane, minlength=256) / max(1, len(plane))
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) * len(plane) / 8


def _rotated(values: NDArray[Any]) -> NDArray[Any]:
    return (values << 1) | (values >> (8 * values.itemsize - 1))


def _rotated_back(values: NDArray[Any]) -> NDArray[Any]:
    return (values >> 1) | (values << (8 * values.itemsize - 1))


def _planes(values: NDArray[Any]) -> list[Bytes]:
    """Byte k of every value, for each k."""
    return list(np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize).T))


# ---- reading back


def _check(path: Path) -> None:
    """Read the whole file and compare its hash, so that nothing damaged reaches a decoder."""
    left, seen = path.stat().st_size - 32, hashlib.sha256()
    with path.open("rb") as file:
        if left < len(MAGIC) or file.read(len(MAGIC)) != MAGIC:
            raise DataError(f"{path} was not made by `pack`")
        seen.update(MAGIC)
        left -= len(MAGIC)
        while left > 0 and (piece := file.read(min(BLOCK, left))):
            seen.update(piece)
            left -= len(piece)
        if file.read(32) != seen.digest():
            raise DataError(f"{path} is damaged: its sha256 is not the one it was written with; copy or export it again")


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    yield _part(file)
    while (mode := file.read(1)[0]) != END:
        size, rotated, count = struct.unpack("<B?Q", file.read(10))
        if mode == WHOLE:
            yield _part(file)
            continue
        values = _sparse(file, size, count) if mode == SPARSE else _joined(file, size, count)
        yield (_rotated_back(values) if rotated else values).tobytes()


def _part(file: BinaryIO) -> bytes:
    how, length, stored = struct.unpack("<BQQ", file.read(17))
    if stored > os.fstat(file.fileno()).st_size - file.tell():
        raise ValueError(f"a part of {stored} bytes is longer than the file")
    data = file.read(stored)
    if how == RAW:
        return data
    if how == ZSTD:
        decoded: bytes = need("zstandard", "packed").ZstdDecompressor().decompress(data, max_output_size=length)
        return decoded
    return bytes(need("zipnn", "packed --precision …-zipnn").ZipNN(input_format="byte").decompress(data))


def _joined(file: BinaryIO, size: int, count: int) -> NDArray[Any]:
    planes = np.empty((count, size), np.uint8)
    for k in range(size):
        planes[:, k] = np.frombuffer(_part(file), np.uint8)
    return planes.view(f"<u{size}").reshape(count)


def _sparse(file: BinaryIO, size: int, count: int) -> NDArray[Any]:
    zero = np.unpackbits(np.frombuffer(_part(file), np.uint8), count=count).astype(bool)
    zeros = int(zero.sum())
    values = np.empty(count, f"<u{size}")
    values[zero] = np.unpackbits(np.frombuffer(_part(file), np.uint8), count=zeros)
    values[~zero] = _joined(file, size, count - zeros)
    return values
