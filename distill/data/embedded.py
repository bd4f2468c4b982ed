"""The corpus that every machine has: the source code and the documentation of Python's standard library."""

import functools
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill import hub
from distill.data import digest
from distill.data.base import Splits
from distill.data.language import LanguageData
from distill.data.packing import Document
from distill.types import ConfigError, DataError

LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__", "encodings"})
END, PAD = "<|endoftext|>", "<|pad|>"
TOKENIZER_BYTES = 2_000_000  # the tokenizer learns from this much of the training files; more does not change a small vocabulary much


class StdlibText(LanguageData):
    """Python's standard library as text: no download, the same on every machine with the same Python.

    Files are split by a hash of their path, so that validation is on files never trained on. A byte-level BPE tokenizer is trained
    on training files only; it and the rows are kept in `$XDG_CACHE_HOME/distill` (`~/.cache/distill`), under a hash of the contents.

    Args:
        vocab_size: tokens of the vocabulary, at least 258 (the bytes, an end and a padding token).
        max_bytes: about how much of the corpus to take; None for all of it (about 10 MB).
        val_fraction: share of the files that is held out.
        **common: see `LanguageData` and `DistillData`.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(self, vocab_size: int = 2048, max_bytes: int | None = 6_000_000, val_fraction: float = 0.05, **common: Any) -> None:
        super().__init__(**common)
        if vocab_size < 258:
            raise ConfigError(f"data.vocab_size must be at least 258 (256 bytes, an end and a padding token), got {vocab_size}")
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction must be between 0 and 1, got {val_fraction}")
        if max_bytes is not None and max_bytes < 1:
            raise ConfigError(f"data.max_bytes must be at least 1, got {max_bytes}; leave it out for the whole corpus")
        self.vocab_size, self.max_bytes, self.val_fraction = vocab_size, max_bytes, val_fraction

    def read(self) -> Splits:
        """Read the files, train or load the tokenizer, encode or load the rows.

        Raises:
            DataError: the part of the corpus taken is too small to split.
        """
        train, held = split(corpus(Path(sysconfig.get_path("stdlib")), self.max_bytes), self.val_fraction)
        if not train or not held:
            raise DataError(f"data.max_bytes={self.max_bytes} takes {len(train) + len(held)} files, too few to hold some out; take more")
        contents = digest.of(*train)
        folder = cache_folder() / f"stdlib-{digest.of(contents, self.vocab_size, Path(__file__).read_bytes())}"
        create(folder, functools.partial(_save_tokenizer, train, self.vocab_size))
        self.tokenizer = hub.load(AutoTokenizer, str(folder), "data.tokenizer")
        self.num_classes = self.num_tokens
        rows = [
            self.token_rows(functools.partial(_documents, self.tokenizer, texts), digest.of(folder.name, *texts), cache_dir=folder / "rows")
            for texts in (train, held)
        ]
        return Splits(rows[0], rows[1], None)


def corpus(root: Path, max_bytes: int | None) -> dict[str, str]:
    """Read `.py` files below a folder, in the order of a hash of their relative path, up to about `max_bytes`.

    Args:
        root: the folder; tests, packages and tables that are no prose are left out.
        max_bytes: the last file is the one that passes this size; None for all.

    Returns:
        Relative path -> text, without empty files.
    """
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT and not name.startswith("config-")]
        paths += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    texts: dict[str, str] = {}
    size = 0
    for path in sorted(paths, key=digest.of):
        text = (root / path).read_text(encoding="utf-8", errors="replace")
        if text.strip():
            texts[path] = text
            size += len(text)
        if max_bytes is not None and size >= max_bytes:
            break
    return texts


def split(texts: dict[str, str], fraction: float) -> tuple[list[str], list[str]]:
    """Hold out about a share of the files, by a hash of their path, whatever other files there are."""
    held = {path for path in texts if int(digest.of("split", path), 16) < fraction * 2**64}
    return [text for path, text in texts.items() if path not in held], [text for path, text in texts.items() if path in held]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which can encode any text."""
    tokenizer = Tokenizer(models.BPE(cache_capacity=200_000))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END, PAD], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)


def cache_folder() -> Path:
    """Give the folder for what can be made again: `$XDG_CACHE_HOME/distill` or `~/.cache/distill`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill"


def create(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder and its content at once, unless it is there: under another name, then renamed, so that nobody sees a half."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        fill(temporary)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, and made the same
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_tokenizer(texts: Sequence[str], vocab_size: int, folder: Path) -> None:
    train_tokenizer(list(_up_to(texts, TOKENIZER_BYTES)), vocab_size).save_pretrained(folder)


def _up_to(texts: Sequence[str], size: int) -> Iterator[str]:
    for text in texts:
        if size <= 0:
            return
        yield text
        size -= len(text)


def _documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Iterator[Document]:
    for start in range(0, len(texts), 32):
        # straight to the library below, without offsets: nearly twice as fast
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(texts[start : start + 32], add_special_tokens=False):
            ids = np.array([*encoding.ids, tokenizer.eos_token_id], np.int32)
            yield Document(ids, np.ones(len(ids), np.bool_))
