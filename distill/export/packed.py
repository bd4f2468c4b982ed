"""Entropy-coded safetensors, for storage and transfer: unpacked they are the same files to the bit."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from distill.export.base import Format, Run, Source, need
from distill.export.codec import Coder, Sizes, pack, unpack
from distill.export.hf import HuggingFace
from distill.export.torchao import TorchAO
from distill.tasks import Task

SUFFIX = ".packed"
INNER: dict[str, type[Format]] = {
    **dict.fromkeys(HuggingFace.precisions, HuggingFace),
    **dict.fromkeys(TorchAO.precisions, TorchAO),
}


class Packed(Format):
    """The files of `hf` or `torchao` in the precision asked for, coded by `codec.pack`; `-zipnn` takes that coder instead of zstd."""

    name = "packed"
    precisions: ClassVar[Mapping[str, float]] = {
        f"{name}{coder}": kind.precisions[name] for coder in ("", "-zipnn") for name, kind in INNER.items()
    }

    def __init__(self, precision: str | None = None) -> None:
        super().__init__(precision)
        self.coder: Coder = "zipnn" if self.precision.endswith("-zipnn") else "zstd"
        inner = self.precision.removesuffix("-zipnn")
        self.inner = INNER[inner](inner)

    def check(self, source: Source) -> None:
        """Look for the coder."""
        need("zstandard", self.name)
        if self.coder == "zipnn":
            need("zipnn", self.name)
        self.inner.check(source)

    def write(self, source: Source, folder: Path) -> None:
        """Write what is packed, and pack it."""
        self.inner.write(source, folder)
        sizes = pack_folder(folder, self.coder)
        print(
            f"packed {self.precision}: {sizes.packed:,} of {sizes.raw:,} bytes, {sizes.packed / sizes.raw:.3f}; "
            f"order-0 entropy of the planes: {sizes.bound / sizes.raw:.3f}"
        )

    def load(self, folder: Path, task: Task) -> Run:
        """Unpack into a temporary folder, and load from there."""
        with tempfile.TemporaryDirectory() as place:
            unpack_folder(folder, Path(place))
            return self.inner.load(Path(place), task)


def pack_folder(folder: Path, coder: Coder = "zstd") -> Sizes:
    """Replace every safetensors file of a folder by its packed form.

    Returns:
        The sizes of all together.
    """
    sizes = Sizes()
    for file in sorted(folder.glob("*.safetensors")):
        sizes += pack(file, file.with_name(file.name + SUFFIX), coder)
        file.unlink()
    return sizes


def unpack_folder(folder: Path, target: Path) -> None:
    """Make the folder that was packed: `from_pretrained` loads it.

    Raises:
        DataError: a file is damaged.
    """
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.name.endswith(SUFFIX):
            unpack(file, target / file.name.removesuffix(SUFFIX))
        elif file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
