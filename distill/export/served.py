"""The inputs of a served student as other runtimes take them."""

from typing import Any

from distill.report.costs.served import inputs_of
from distill.types import Batch


def arrays_of(batch: Batch) -> dict[str, Any]:
    """What a served model takes of a batch, as NumPy arrays."""
    return {name: value.contiguous().numpy() for name, value in inputs_of(batch).items()}
