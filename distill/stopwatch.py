"""How much of a step one part of it takes, looked at only where it is logged: on a GPU the clock has to wait for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Times a step, and laps within it; costs nothing while it is not running."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._laps = 0.0
        self._cuda = False

    def start(self, device: torch.device) -> None:
        """Begin a step on a device."""
        self._cuda = device.type == "cuda"
        self._laps, self._start = 0.0, self._now()

    @contextmanager
    def lap(self) -> Iterator[None]:
        """Count what runs inside."""
        if self._start is None:
            yield
            return
        before = self._now()
        yield
        self._laps += self._now() - before

    def stop(self) -> float | None:
        """End the step, and give the share of it that the laps took, in [0, 1]; None where it was not begun."""
        if self._start is None:
            return None
        seconds, self._start = self._now() - self._start, None
        return self._laps / seconds if seconds > 0 else None

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()
