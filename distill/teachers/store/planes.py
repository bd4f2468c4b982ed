"""Arrays of small integers as bytes: a plane for each byte of a value, each plane entropy-coded by zstandard."""

import struct
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

# Level 1 is a Huffman code for each plane and few matches, within some per cent of the planes' entropy; higher levels take far longer for
# 5 % less. Neither magic nor size nor checksum: the counts are known, and the shard has its sha256.
_PARAMETERS = zstandard.ZstdCompressionParameters.from_level(
    1, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=False, write_checksum=False
)
_LENGTH = struct.Struct("<I")


class Packer:
    """Takes arrays, and makes one string of bytes of them."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)

    def put(self, values: NDArray[Any], width: int = 1) -> None:
        """Add integers, `width` bytes each, lowest first; 0 ≤ value < 256^width."""
        for byte in range(width):
            plane = ((values >> 8 * byte) if byte else values).astype(np.uint8, order="C")
            frame = self._compressor.compress(plane.tobytes()) if plane.size else b""
            self.parts += [_LENGTH.pack(len(frame)), frame]

    def bytes(self) -> bytes:
        """What `Unpacker` reads."""
        return b"".join(self.parts)


class Unpacker:
    """Gives back what a `Packer` was given, in its order."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0
        self._decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)

    def take(self, count: int, width: int = 1) -> NDArray[Any]:
        """The next `count` integers of `width` bytes each: uint8 where that is 1, else int32."""
        planes = [self._plane(count) for _ in range(width)]
        if width == 1:
            return planes[0]
        values = planes[0].astype(np.int32)
        for byte, plane in enumerate(planes[1:], start=1):
            values |= plane.astype(np.int32) << 8 * byte
        return values

    def _plane(self, count: int) -> NDArray[np.uint8]:
        (length,) = _LENGTH.unpack_from(self.data, self.place)
        start = self.place + _LENGTH.size
        self.place = start + length
        frame = self.data[start : self.place]
        return np.frombuffer(self._decompressor.decompress(frame, max_output_size=count) if count else b"", np.uint8)
