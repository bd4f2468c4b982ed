"""Temperature scaling: the one number that would make a model's probabilities most likely, and what it would mend."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from distill.metrics.bootstrap import Floats, Interval, Resampler

STEP = 2 ** (1 / 8)
TEMPERATURES: Floats = 2 ** (np.arange(-16, 17) / 8)  # from 1/4 to 4, 1 among them
ONE = 16  # where it is


def scaled(logits_NV: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """What a model would say at each of K temperatures: `−log softmax(z / T)_label` and `max_v softmax(z / T)_v`.

    Args:
        logits_NV: `[N, V]`, finite or −∞.
        labels_N: `[N]`, the class of each position, int64.

    Returns:
        `[N, 2, K]` float32: NLL of the label in nats, and the top probability, at each of `TEMPERATURES`.
    """
    below = logits_NV.float() - logits_NV.float().amax(dim=-1, keepdim=True)
    label = below.gather(-1, labels_N[:, None])[:, 0]
    room, found = torch.empty_like(below), []
    for T in TEMPERATURES.tolist():
        total = torch.mul(below, 1 / T, out=room).exp_().sum(dim=-1)  # at least 1: the largest is among them
        found.append(torch.stack([total.log() - label / T, 1 / total], dim=-1))
    return torch.stack(found, dim=-1)


@dataclass(frozen=True)
class Fitted:
    """A temperature, and what it does to positions that it was not fitted on.

    Attributes:
        temperature: T > 1 where the model is too sure, T < 1 where it is not sure enough.
        edge: whether it is the least or greatest of `TEMPERATURES`, so that the best lies at or beyond it.
        nll: `[S]`, nats, each half of the rows at the temperature of the other half.
        confidence: `[S]`, the top probability, likewise.
    """

    temperature: Interval
    edge: bool
    nll: Floats
    confidence: Floats


def fitted(resampler: Resampler, scaled_S2K: NDArray[np.float32]) -> Fitted:
    """Fit the temperature with the least NLL, `argmin_T Σ −log softmax(z / T)_label`.

    Args:
        resampler: of the S positions.
        scaled_S2K: `[S, 2, K]`, of `scaled`.

    Raises:
        DataError: there is one row alone, or a label has a probability of 0.

    Reference: Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    nll_SK = scaled_S2K[:, 0].astype(np.float64)
    drawn = resampler.sums(nll_SK)
    T = best(nll_SK.sum(axis=0)).item()
    interval = resampler.interval(T, best(drawn))
    after = np.empty(scaled_S2K.shape[:2])
    odd = np.unique(resampler.rows, return_inverse=True)[1] % 2 == 1
    for half in (odd, ~odd):
        after[half] = at(scaled_S2K[half], best(nll_SK[~half].sum(axis=0)).item())
    return Fitted(interval, T in TEMPERATURES[[0, -1]], *after.T)


def best(curves: Floats) -> Floats:
    """Where NLL is least: it is convex in 1/T, so the least of the grid has the minimum beside it; a parabola in log T finds it.

    Args:
        curves: `[..., K]`, NLL at `TEMPERATURES`, in any unit.

    Returns:
        `[...]`, T; the first or last of `TEMPERATURES` where NLL is least there.
    """
    lowest = curves.argmin(axis=-1)
    middle = lowest.clip(1, len(TEMPERATURES) - 2)
    left, mid, right = (np.take_along_axis(curves, (middle + step)[..., None], -1)[..., 0] for step in (-1, 0, 1))
    bend = left - 2 * mid + right
    shift = np.divide(left - right, 2 * bend, out=np.zeros_like(mid), where=bend > 0)
    return np.where(lowest == middle, TEMPERATURES[middle] * STEP**shift, TEMPERATURES[lowest])


def at(scaled_S2K: NDArray[np.float32], T: float) -> Floats:
    """NLL and top probability at a temperature between those of the grid, `[S, 2]`: a parabola through the nearest three, in log T."""
    place = float(np.log(T / TEMPERATURES[0]) / np.log(STEP))
    middle = min(max(round(place), 1), len(TEMPERATURES) - 2)
    x = place - middle
    return scaled_S2K[:, :, middle - 1 : middle + 2].astype(np.float64) @ np.array([x * (x - 1) / 2, 1 - x * x, x * (x + 1) / 2])
