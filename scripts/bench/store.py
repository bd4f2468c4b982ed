"""Size and speed of a store of a teacher's targets: bytes per position and milliseconds of CPU, for several ways to keep them.

    python scripts/bench/store.py [--text corpus.txt …] > table.md

Without `--text` the teacher is a Pitman–Yor process: at each position another random distribution around one Zipf-like unigram, as
hierarchical Pitman–Yor language models assume. Its likeliest classes have nothing in common from one position to the next but the unigram:
harder to code than a language model's.

With `--text` it is a trigram model of that text (Witten–Bell, interpolated with bigrams and unigrams), in tokens of a BPE tokenizer that is
trained on it; the positions are of the last part of the text, which the model has not seen. Where it knows no trigram its likeliest classes
are those of shorter contexts, over and over: easier to code than a language model's.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from distill.teachers.sparse import sparse_target
from distill.teachers.store import Header, Store, StoredRow, create, finish, finished_shards, row_key, write_shard

SETTINGS = ((50, 0), (128, 0), (0, 8), (0, 16), (0, 64), (8, 16))  # k, draws
Floats = NDArray[np.float64]


class PitmanYor:
    """Distributions over `v` classes: stick lengths of discount d and strength θ on classes drawn from a Zipf-like unigram."""

    def __init__(self, v: int, discount: float = 0.6, strength: float = 1.0, sticks: int = 600) -> None:
        self.rng, self.v, self.discount = np.random.default_rng(0), v, discount
        self.betas = strength + discount * np.arange(1, sticks + 1)
        unigram = 1 / (np.arange(v) + 2.7)
        self.unigram = unigram / unigram.sum()
        self.counts = self.unigram * 1e9

    def position(self, number: int) -> Floats:
        broken = self.rng.beta(1 - self.discount, self.betas)
        sticks = broken * np.concatenate([[1.0], np.cumprod(1 - broken[:-1])])
        classes = self.rng.choice(self.v, len(sticks), p=self.unigram)
        probs = self.unigram * (1 - sticks.sum())
        np.add.at(probs, classes, sticks)
        return probs


class Trigram:
    """`p(w | u v) = λ c(u v w) / c(u v) + (1 − λ) p(w | v)` and so on, `λ = c / (c + different w)`; counted on all tokens but the last."""

    def __init__(self, text: str, v: int, held_out: int) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(text.split("\n"), trainers.BpeTrainer(vocab_size=v, show_progress=False, initial_alphabet=alphabet))
        ids = np.array(tokenizer.encode(text).ids)
        self.v = tokenizer.get_vocab_size()
        seen, self.ids = ids[: len(ids) - held_out - 2], ids[len(ids) - held_out - 2 :]
        self.counts = np.bincount(seen, minlength=self.v).astype(float)
        self.unigram = (self.counts + 0.1) / (self.counts + 0.1).sum()
        self.tables = [self._count(seen, n) for n in (1, 2)]

    def position(self, number: int) -> Floats:
        before, last = self.ids[number : number + 2].tolist()
        probs = self.unigram
        for (contexts, following, counts), context in zip(self.tables, (last, before * self.v + last), strict=True):
            found = slice(*np.searchsorted(contexts, (context, context + 1)))
            total, different = counts[found].sum(), found.stop - found.start
            if different:
                probs = probs * (different / (total + different))
                probs[following[found]] += counts[found] / (total + different)
        return probs

    def _count(self, ids: NDArray[np.int64], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        grams = np.zeros(len(ids) - n, np.int64)
        for i in range(n + 1):
            grams = grams * self.v + ids[i : len(ids) - n + i]
        grams, counts = np.unique(grams, return_counts=True)
        return grams // self.v, grams % self.v, counts


def rows_of(teacher: PitmanYor | Trigram, rows: int, length: int) -> Iterator[Tensor]:
    """Log-probabilities of one row of positions after another."""
    for row in range(rows):
        probs = np.array([teacher.position(row * length + i) for i in range(length)])
        yield torch.from_numpy(probs).log().float()


def kept(teacher: PitmanYor | Trigram, rows: int, length: int) -> tuple[dict[tuple[int, int], list[StoredRow]], float]:
    """What each setting keeps, and the teacher's mean entropy in nats."""
    found: dict[tuple[int, int], list[StoredRow]] = {setting: [] for setting in SETTINGS}
    generator, entropy = torch.Generator().manual_seed(0), 0.0
    for logp in rows_of(teacher, rows, length):
        entropy -= float((logp.exp() * logp).sum(-1).mean()) / rows
        for (k, draws), into in found.items():
            ids, probs, tail = sparse_target(logp, k, draws, 1.0, generator)
            into.append(StoredRow(ids.int().numpy(), probs.numpy(), tail.numpy()))
    return found, entropy


def measure(rows: list[StoredRow], header: Header, counts: Floats, folder: Path) -> str:
    """A line of the table; stops where what is read is not what was written."""
    keys = [row_key([i], None, [True]) for i in range(len(rows))]
    thousands = sum(len(row.ids) for row in rows) / 1000
    start = time.process_time()
    create(folder, header, counts)
    write_shard(folder, 0, keys, rows, header)
    finish(folder, {})
    middle = time.process_time()
    store = Store(folder)
    store[keys[0]]  # the shard's sha256 is checked once
    ready = time.process_time()
    for key in keys * 3:
        store[key]
    end = time.process_time()
    size = finished_shards(folder)[0].bytes / thousands / 1000
    classes = np.mean([(row.ids >= 0).sum(1).mean() for row in rows])
    lost = np.mean([divergence(row, store[key]) for row, key in zip(rows, keys, strict=True)])
    times = f"{1000 * (middle - start) / thousands:.2f} | {1000 * (end - ready) / thousands / 3:.2f}"
    return f"| {header.k} | {header.draws} | {header.bits} | {classes:.1f} | {size:.1f} | {times} | {lost:.1e} |"


def divergence(row: StoredRow, read: StoredRow) -> float:
    """KL of what is read from what was written, in nats."""
    by_class, same = row.ids.argsort(1), read.ids.argsort(1)
    p, q = np.take_along_axis(row.probs, by_class, 1), np.take_along_axis(read.probs, same, 1)
    width = min(p.shape[1], q.shape[1])  # what is more is filled up, and comes first
    if not np.array_equal(np.take_along_axis(row.ids, by_class, 1)[:, -width:], np.take_along_axis(read.ids, same, 1)[:, -width:]):
        raise SystemExit("the classes that were read are not those that were written")
    p = np.concatenate([p[:, -width:], row.tail[:, None]], 1).astype(float)
    q = np.concatenate([q[:, -width:], read.tail[:, None]], 1).astype(float)
    return float((p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)) - p + q).sum(1).mean())  # float32 sums to 1 to 1e-7 alone


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="files of text, of some MB together")
    parser.add_argument("--v", type=int, default=32768, help="classes")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="positions in a row")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 16], choices=[8, 16, 32])
    args = parser.parse_args(argv)
    teacher: PitmanYor | Trigram = PitmanYor(args.v)
    if args.text:
        teacher = Trigram("\n".join(path.read_text(encoding="utf-8") for path in args.text), args.v, args.rows * args.length)
    found, entropy = kept(teacher, args.rows, args.length)
    what = "a trigram model of the given text" if args.text else "random distributions of a Pitman–Yor process, no language model"
    print(
        f"Teacher: {what}; {teacher.v:,} classes, {entropy:.2f} nats of entropy on average; {args.rows} rows of {args.length} positions.\n"
    )
    print("| k | draws | bits | classes kept | bytes/position | writing, ms of CPU/1,000 positions | reading | KL of the rounding, nats |")
    print("| --: | --: | --: | --: | --: | --: | --: | --: |")
    for (k, draws), rows in found.items():
        for bits in args.bits if k else args.bits[:1]:
            with tempfile.TemporaryDirectory() as folder:
                header = Header("", None, "", "", teacher.v, 1.0, k, draws, bits, "", len(rows), len(rows))
                print(measure(rows, header, teacher.counts, Path(folder)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
