"""The classification sets of the experiments, as rows in memory: what each file says, and the deterministic cuts made of it."""

import csv
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Row = tuple[str, str]  # a text and its label


@dataclass(frozen=True)
class Rows:
    """A set in three parts; the test part is the one its authors made."""

    train: list[Row]
    val: list[Row]
    test: list[Row]

    def parts(self) -> dict[str, list[Row]]:
        """The parts by name."""
        return {"train": self.train, "val": self.val, "test": self.test}


def goemotions(folder: Path) -> Rows:
    """GoEmotions, only the comments with exactly one label: 28 classes with a long tail of their own."""
    names = (folder / "labels.txt").read_text(encoding="utf-8").splitlines()

    def read(name: str) -> list[Row]:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            return [(text, names[int(label)]) for text, label, _ in rows if "," not in label]

    return Rows(read("train.tsv"), read("dev.tsv"), read("test.tsv"))


def banking77(folder: Path) -> Rows:
    """Banking77 as it is; nothing is held out here."""

    def read(name: str) -> list[Row]:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            return [(row["text"], row["category"]) for row in csv.DictReader(file)]

    return Rows(read("train.csv"), [], read("test.csv"))


def hold_out(rows: Iterable[Row], per_class: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Split off `per_class` random rows of every class: the rest, and what was held out, both in the order given."""
    rows = list(rows)
    held = {i for places in _places(rows, seed).values() for i in places[:per_class]}
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def exponential_tail(rows: list[Row], imbalance: float, seed: int) -> list[Row]:
    """Cut to an exponential long tail: the k-th most frequent of K classes keeps `n_0 · imbalance^(−k / (K − 1))` random rows.

    n_0 is the size of the most frequent class (Cui et al. 2019, arXiv 1901.05555, section 5); ties are broken by name, and a class that
    has fewer rows keeps them all.
    """
    places = _places(rows, seed)
    order = [name for name, _ in sorted(Counter(label for _, label in rows).items(), key=lambda item: (-item[1], item[0]))]
    most = len(places[order[0]])
    kept: set[int] = set()
    for k, name in enumerate(order):
        kept |= set(places[name][: max(1, round(most * imbalance ** (-k / (len(order) - 1))))])
    return [row for i, row in enumerate(rows) if i in kept]


def _places(rows: list[Row], seed: int) -> dict[str, list[int]]:
    """Where the rows of each class are, shuffled; a class's order depends on its name, its size and the seed only."""
    places: dict[str, list[int]] = defaultdict(list)
    for i, (_, label) in enumerate(rows):
        places[label].append(i)
    for name, found in places.items():
        random.Random(f"{seed}/{name}").shuffle(found)
    return dict(places)
