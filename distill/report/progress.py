"""How far long work has come: a bar on a terminal, a plain line now and then in a log file."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from distill.teachers.store import Header, Manifest

Item = TypeVar("Item")


class Progress:
    """Counts rows and bytes of one rank, and prints them on the first: `512/2048 rows · 0:41 left · 12.3 MB, 36.9 MB to come`.

    Args:
        header: of the store.
        shards: that this rank will write.
        shown: whether anything is printed.
        every_s: seconds between two lines in a log file.
    """

    def __init__(self, header: Header, shards: list[int], shown: bool, every_s: float = 10.0) -> None:
        self.rows, self.bytes, self.every_s, self.shown = 0, 0, every_s, shown
        self.total = sum(len(header.rows_of(shard)) for shard in shards)
        self.start = self.due = time.monotonic()
        self.bar = tqdm(total=self.total, unit="row", desc="Caching", disable=not shown or not sys.stderr.isatty())
        self.sized = 0  # rows whose bytes are known

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def row(self) -> None:
        """Count a row."""
        self.rows += 1
        self.bar.update()
        if self.shown and self.bar.disable and time.monotonic() > self.due + self.every_s:
            self.due = time.monotonic()
            seconds = (self.total - self.rows) * (self.due - self.start) / self.rows
            print(f"{self.rows:,}/{self.total:,} rows · {tqdm.format_interval(seconds)} left · {self.size()}", flush=True)

    def written(self, manifest: Manifest) -> None:
        """Count a shard's bytes."""
        self.bytes, self.sized = self.bytes + manifest.bytes, self.sized + manifest.rows
        self.bar.set_postfix_str(self.size())

    def size(self) -> str:
        """Say how large this rank's part is, and what is to come if the rest is like it."""
        if not self.sized:
            return "no shard yet"
        return f"{self.bytes / 1e6:,.1f} MB, about {self.bytes * (self.total / self.sized - 1) / 1e6:,.1f} MB to come"


def steps(items: Sequence[Item], name: Callable[[Item], str]) -> Iterator[Item]:
    """Go through a few long steps: a bar with the name of the one at hand on a terminal, a line for each in a log file."""
    bar = tqdm(items, desc="Report", disable=not sys.stderr.isatty(), leave=False)
    for item in bar:
        bar.set_postfix_str(name(item))
        if bar.disable:
            print(f"Report: {name(item)}", flush=True)
        yield item
