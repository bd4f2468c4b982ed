"""Rows that name their teacher: a column of the data becomes numbers, one for each position."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from distill.types import DataError

ROUTE = "route"  # the column of token rows, and of batches


def named(rows: datasets.Dataset, source: str, column: str) -> datasets.Dataset:
    """Turn the column into text: the hub's class labels into their names, whole numbers into digits.

    Raises:
        DataError: a row, counted from 1, holds something else.
    """
    feature = rows.features[column]
    classes = feature.names if isinstance(feature, datasets.ClassLabel) else None
    values = rows.with_format(None)[column][:]
    for number, value in enumerate(values, start=1):
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise DataError(
                f"'{source}' row {number}: '{column}' must name a teacher, in text or as a whole number, but is {type(value).__name__} "
                f"({value!r:.60})"
            )
        if classes is not None and value not in range(len(classes)):
            raise DataError(f"'{source}' row {number}: '{column}' is {value}, but its names go from 0 to {len(classes) - 1}")
    names = [str(value) if classes is None else classes[value] for value in values]
    return rows.remove_columns(column).add_column(column, names)


def of(column: str | None, *splits: datasets.Dataset | None) -> list[str]:
    """List the different values of the column, sorted; their indices are the numbers. None where there is no column."""
    return [] if column is None else sorted({name for rows in splits if rows is not None for name in rows[column]})


@dataclass(frozen=True)
class WithRoute:
    """A map over batches of rows that adds the numbers to what another makes of them. Picklable.

    Args:
        encode: the other.
        column: holds a name.
        names: all there are.
    """

    encode: Callable[..., dict[str, list[Any]]]
    column: str
    names: tuple[str, ...]

    def __call__(self, batch: Mapping[str, Sequence[Any]], *more: Any) -> dict[str, list[Any]]:
        """Encode, and add `[[number], …]`."""
        index = {name: i for i, name in enumerate(self.names)}
        return {**self.encode(batch, *more), ROUTE: [[index[name]] for name in batch[self.column]]}
