"""Terms on how the samples of a micro-batch lie to each other."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.attention import documents, real
from distill.losses.base import Setting
from distill.losses.features import Unprojected, unit
from distill.losses.layer_map import LayerRule
from distill.losses.projector import full
from distill.losses.support import position_weights
from distill.types import Batch, ConfigError


def pooled(tap_BTD: Tensor, batch: Batch) -> Tensor:
    """One vector per sample, `[S, D]`: the mean over its real tokens.

    A sample is a row, or a document of a packed row; samples without a valid label are left out.
    """
    rows, length, _ = tap_BTD.shape
    document, there = documents(batch, rows, length), real(batch, rows, length)
    valid = document[position_weights(batch, length) > 0].unique()
    weight = (document == valid[:, None, None]) & there
    values = tap_BTD.masked_fill(~there[..., None], 0).flatten(0, 1)
    return weight.flatten(1).to(values) @ values / weight.sum((1, 2))[:, None]


def distances(x_SD: Tensor) -> Tensor:
    """Euclidean distances divided by their mean over pairs of different samples: `[S, S]`, S ≥ 2."""
    distance = torch.cdist(x_SD, x_SD, compute_mode="donot_use_mm_for_euclid_dist")  # exactly 0, with gradient 0, where two are equal
    return distance / (distance.sum() / (len(x_SD) * (len(x_SD) - 1))).clamp(min=1e-12)


def angles(x_SD: Tensor) -> Tensor:
    """Cosines of the angles `∠ i j k` at j: `[S, S, S]` in the order j, i, k; 0 where two of the three coincide."""
    edges = unit(x_SD - x_SD[:, None])
    return edges @ edges.transpose(1, 2)


def rkd_distance(student_SD: Tensor, teacher_SE: Tensor) -> Tensor:
    """Huber distance (δ = 1) of relative distances, `mean_{i≠j} l(ψ(t_i, t_j), ψ(s_i, s_j))`, `ψ = ‖x_i − x_j‖ / mean`: a scalar, ≥ 0.

    Args:
        student_SD: `[S, D]`, S ≥ 2.
        teacher_SE: `[S, E]`.

    Reference:
        Park et al. 2019, "Relational Knowledge Distillation", arXiv 1904.05068, section 3.2, as a mean over pairs (there a sum; the
        authors' program takes the mean over all S², the diagonal included).
    """
    huber = F.huber_loss(distances(student_SD), distances(teacher_SE), reduction="sum")
    return huber / (len(student_SD) * (len(student_SD) - 1))


def rkd_angle(student_SD: Tensor, teacher_SE: Tensor) -> Tensor:
    """Huber distance (δ = 1) of the angles in triangles, `mean_{i≠j≠k} l(cos ∠ t_i t_j t_k, cos ∠ s_i s_j s_k)`: a scalar, ≥ 0.

    Args:
        student_SD: `[S, D]`, S ≥ 3. Memory grows with S² D and S³.
        teacher_SE: `[S, E]`.

    Reference:
        Park et al. 2019, "Relational Knowledge Distillation", arXiv 1904.05068, section 3.2, as a mean over triplets (there a sum; the
        authors' program takes the mean over all S³, with those that coincide).
    """
    S = len(student_SD)
    itself = torch.eye(S, dtype=torch.bool, device=student_SD.device)  # i = k: the angle is 0 on both sides, unless points coincide
    huber = F.huber_loss(angles(student_SD), angles(teacher_SE), reduction="none").masked_fill(itself, 0)
    return huber.sum() / (S * (S - 1) * (S - 2))


def similarity_preserving(student_SD: Tensor, teacher_SE: Tensor) -> Tensor:
    """Squared distance of similarity matrices, `1/S² ‖G_t − G_s‖²`, G the matrix `X Xᵀ` with rows of length 1: a scalar in [0, 4 / S].

    Reference:
        Tung & Mori 2019, "Similarity-Preserving Knowledge Distillation", arXiv 1907.09682, equation 4.
    """
    ours, theirs = (unit(x @ x.T) for x in (student_SD, teacher_SE))
    return (ours - theirs).square().mean()


class Relational(Unprojected, ABC):
    """A relation between the samples of a micro-batch, each the mean of a hidden state over its real tokens (see `pooled`).

    The value is multiplied by the number of valid labels, so that the module's division gives it back. 0 for too few samples: in training
    with small micro-batches there is little to relate, and more accumulation does not help.

    Args:
        layers: which layers are matched, see `layer_map.pairs`; or pairs of dotted names of submodules.

    Raises:
        ConfigError: (in `prepare`) a micro-batch never has enough samples.
    """

    fewest: int = 2  # samples that it can compare

    def __init__(self, layers: LayerRule = "last") -> None:
        super().__init__(layers)

    def prepare(self, setting: Setting) -> None:
        """See that there is something to relate, and match the layers."""
        if not setting.packed and setting.micro_batch < self.fewest:
            raise ConfigError(
                f"{setting.key}: {type(self).__name__} compares the samples of a micro-batch, at least {self.fewest}, but "
                f"data.batch_size is {setting.micro_batch}; raise it, accumulation does not help"
            )
        super().prepare(setting)

    def rows(self, tap_BTD: Tensor, batch: Batch, index_N: Tensor) -> Tensor:
        """Give one vector per sample."""
        return pooled(full(tap_BTD), batch)

    @abstractmethod
    def relation(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Give the mean of the relation, a scalar."""

    def compare(self, student_ND: Tensor, teacher_ND: Tensor, weights: Tensor) -> Tensor:
        """Evaluate the relation, where there is one."""
        if len(student_ND) < self.fewest:
            return 0 * (student_ND.sum() + teacher_ND.sum())
        return weights.sum() * self.relation(student_ND, teacher_ND)


class RKDDistance(Relational):
    """Relative distances between samples, see `rkd_distance`."""

    def relation(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Evaluate `rkd_distance`."""
        return rkd_distance(student_SD, teacher_SD)


class RKDAngle(Relational):
    """Angles between samples, see `rkd_angle`."""

    fewest = 3

    def relation(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Evaluate `rkd_angle`."""
        return rkd_angle(student_SD, teacher_SD)


class SimilarityPreserving(Relational):
    """Similarities between samples, see `similarity_preserving`."""

    def relation(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Evaluate `similarity_preserving`."""
        return similarity_preserving(student_SD, teacher_SD)
