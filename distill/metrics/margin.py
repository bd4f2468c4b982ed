"""How far a linear head is from another answer: the ℓ∞ margin of its features, in closed form.

A head `wᵀx + b` on features that an opponent may move by ε each: moved against a weight w, `wᵀx` falls by `ε Σ_d |w_d| = ε‖w‖₁`, and by no
more. So two classes y ∈ {−1, 1} are told apart rightly at ε exactly where

    y · (wᵀx + b) > ε ‖w‖₁

and of several classes y is right at ε exactly where, for every other class j,

    (w_y − w_j)ᵀx + (b_y − b_j) > ε ‖w_y − w_j‖₁.

The largest such ε is the certified radius `ε* = min_j margin_j / ‖w_y − w_j‖₁`; it is 0 or less where the head is wrong.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ALL = 2**29  # products that the distances of all pairs of weights may take: about two seconds on one core
NEAREST = 50
ROOM = 2**24  # numbers that are held at a time


def binary_radius(features_ND: Tensor, weight_D: Tensor, bias: float, signs_N: Tensor) -> Tensor:
    """The ε up to which two classes are told apart: `y (wᵀx + b) / ‖w‖₁`.

    Args:
        features_ND: `[N, D]`, x.
        weight_D: `[D]`, w.
        bias: b.
        signs_N: `[N]`, y: −1 or 1.

    Returns:
        `[N]`, in the units of the features.

    Reference: Goodfellow et al. 2015, arXiv 1412.6572, section 5.
    """
    return signs_N * (features_ND @ weight_D + bias) / weight_D.abs().sum()


@dataclass(frozen=True)
class Radii:
    """The certified radius of each position.

    Attributes:
        values: `[N]`, ε* in the units of the features, −∞ never.
        competitors: how many other classes were looked at; with fewer than V − 1 the radius is an upper bound.
        exact: whether it was all of them.
    """

    values: Tensor
    competitors: int
    exact: bool


@torch.no_grad()
def radii(features_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_N: Tensor, budget: int = ALL) -> Radii:
    """The ε up to which each position is right: `min_j ((w_y − w_j)ᵀx + b_y − b_j) / ‖w_y − w_j‖₁`.

    Over all classes where the distances of the labels' weights from all others take no more products than `budget`, U · V · D for U
    different labels; else over the 50 classes with the largest logits besides the label's. Nothing of size `[N, V, D]` is made, and
    `[N, V]` for some positions at a time.

    Args:
        features_ND: `[N, D]`, x.
        weight_VD: `[V, D]`, w.
        bias_V: `[V]`, b, or None.
        labels_N: `[N]`, y.
        budget: products.

    Returns:
        Float32 or float64, as wide as the features.
    """
    wide = torch.promote_types(features_ND.dtype, torch.float32)
    features, weight = features_ND.to(wide), weight_VD.to(wide)
    bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if bias_V is None else bias_V.to(wide)
    num_classes, width = weight.shape
    labels, which = labels_N.unique(return_inverse=True)
    distances = torch.cdist(weight[labels], weight, p=1.0) if len(labels) * num_classes * width <= budget else None
    others = num_classes - 1 if distances is not None else min(NEAREST, num_classes - 1)
    found = []
    for rows in torch.arange(len(labels_N), device=weight.device).split(max(1, ROOM // max(num_classes, NEAREST * width))):
        y = labels_N[rows]
        logits = torch.addmm(bias, features[rows], weight.T)
        right = logits.gather(1, y[:, None])
        rivals = logits.scatter(1, y[:, None], -torch.inf)
        if distances is not None:
            found.append(_ratio(right - rivals, distances[which[rows]]).amin(1))
            continue
        nearest = rivals.topk(others, dim=1)
        gaps = (weight[y][:, None] - weight[nearest.indices]).abs().sum(-1)
        found.append(_ratio(right - nearest.values, gaps).amin(1))
    return Radii(torch.cat(found), others, others == num_classes - 1)


def _ratio(margins: Tensor, distances: Tensor) -> Tensor:
    """margin / distance; of equal weights, which no ε tells apart, what the biases say: ∞ where the margin is positive, else 0 or less."""
    same = torch.where(margins > 0, torch.inf, margins)
    return torch.where(distances > 0, margins / distances.clamp(min=torch.finfo(distances.dtype).tiny), same)


def robust(radii_N: Tensor, epsilon: float) -> Tensor:
    """Whether each position is right whatever moves its features by no more than ε each: `ε* > ε`, boolean `[N]`."""
    return radii_N > epsilon
