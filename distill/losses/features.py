"""Terms on hidden states: the student's, projected where the widths differ, should be the teacher's."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.base import Loss, Setting
from distill.losses.layer_map import LayerRule, Match, match_hidden, tapped
from distill.losses.projector import Kind, describe, full, projector
from distill.losses.support import position_weights
from distill.types import Batch, Outputs, Target


class HiddenStates(Loss, ABC):
    """A distance between hidden states, summed over valid positions and averaged over the pairs of layers; in float32.

    Where a sample has one label, its real positions share a weight of 1 (see `position_weights`).

    Args:
        layers: which layers are matched, see `layer_map.pairs`; or pairs of dotted names of submodules.
        projector: from the student's width to the teacher's, see `projector.projector`; trained along.

    Raises:
        ConfigError: (in `prepare`) a layer does not exist, or the widths differ and there is no projector.
    """

    def __init__(self, layers: LayerRule = "uniform", projector: Kind = "auto") -> None:
        super().__init__()
        self.layers, self.projector = layers, projector
        self.matches: list[Match] = []
        self.projectors = nn.ModuleList()

    def prepare(self, setting: Setting) -> None:
        """Match the layers and make the projectors."""
        if self.matches:
            return
        matches = match_hidden(self.layers, setting)
        self.projectors.extend([self.bridge(match, setting) for match in matches])
        self.student_taps, self.teacher_taps = (tuple(match.taps[side] for match in matches) for side in (0, 1))
        self.matches = matches

    def bridge(self, match: Match, setting: Setting) -> nn.Module:
        """Make what the student's vectors pass through."""
        return projector(self.projector, *match.widths, f"{setting.key}.projector")

    def summary(self) -> list[str]:
        """Say which layers are matched, and how the widths are."""
        return [f"{match.text}, {describe(module)}" for match, module in zip(self.matches, self.projectors, strict=True)]

    def forward(self, student: Outputs, teacher: Target, batch: Batch) -> Tensor:
        """Sum over valid positions, averaged over the pairs."""
        values: list[Tensor] = []
        valid: dict[int, tuple[Tensor, Tensor]] = {}  # by length: found once, not for every layer, as a GPU has to be waited for
        with torch.autocast(student.features.device.type, enabled=False):
            for i, match in enumerate(self.matches):
                sides = tapped(match, student, teacher)
                length = sides[0].shape[1]
                if length not in valid:
                    valid[length] = _valid(batch, length)
                index, weights = valid[length]
                ours, theirs = (full(self.rows(tap, batch, index)) for tap in sides)
                values.append(self.compare(*self.meet(i, ours, theirs), weights))
            return torch.stack(values).mean()

    def rows(self, tap_BTD: Tensor, batch: Batch, index_N: Tensor) -> Tensor:
        """Choose the vectors that are compared, `[N, D]`: those at the valid positions, whose index in `[B · T]` is given."""
        return tap_BTD.flatten(0, 1).index_select(0, index_N)

    def meet(self, i: int, student_ND: Tensor, teacher_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Bring both sides of pair i to one width."""
        return self.projectors[i](student_ND), teacher_ND

    @abstractmethod
    def compare(self, student_ND: Tensor, teacher_ND: Tensor, weights: Tensor) -> Tensor:
        """Give the weighted sum over the vectors.

        Args:
            student_ND: `[N, D]`, projected.
            teacher_ND: `[N, D]`; receives no gradient.
            weights: > 0, one per valid position; their sum is the number of valid labels.
        """


def _valid(batch: Batch, length: int) -> tuple[Tensor, Tensor]:
    """Where the valid positions are in `[B · T]`, and how much each counts."""
    weights = position_weights(batch, length).flatten()
    index = weights.nonzero()[:, 0]
    return index, weights.index_select(0, index)


def unit(x: Tensor) -> Tensor:
    """Divide vectors `[..., D]` by their length; a vector of zeros stays, with a gradient of zero."""
    square = x.square().sum(-1, keepdim=True)
    there = square > 1e-30
    return torch.where(there, x / torch.where(there, square, 1).sqrt(), 0 * x)


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean squared difference, `1/D Σ_d (s_d − t_d)²`: `[N]`, in [0, ∞), in squared units of the activations.

    Reference:
        Romero et al. 2014, "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550, equation 3 (there without 1/D and with ½);
        Jiao et al. 2019, "TinyBERT", arXiv 1909.10351, equations 8 and 9.
    """
    return (student_ND - teacher_ND).square().mean(-1)


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """One minus the cosine, `1 − s·t / (‖s‖ ‖t‖)`: `[N]`, in [0, 2], without a unit.

    Evaluated as `½ ‖s/‖s‖ − t/‖t‖‖²`, which is the same, but exactly 0 where both are equal. The squared distance of normalised states of
    PKD (Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression", arXiv 1908.09355) is twice this; there of the first
    token only, and the authors' program divides by D.

    Reference:
        Sanh et al. 2019, "DistilBERT, a distilled version of BERT", arXiv 1910.01108 (there on the last layer).
    """
    return (unit(student_ND) - unit(teacher_ND)).square().sum(-1) / 2


def hidden_normalized(student_ND: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean squared difference of standardised vectors, `1/D Σ_d (n(s)_d − n(t)_d)²` with `n(x) = (x − mean x) / std x`: `[N]`, in [0, 4].

    The same as `2 (1 − Pearson correlation)`: a shift and a scale of the whole vector do not matter, as they do not to the layer norm that
    the next layer applies.

    Reference:
        Baevski et al. 2022, "data2vec", arXiv 2202.03555 (regression of normalised targets; there only the teacher's side is
        normalised, and averaged over its top layers).
    """
    ours, theirs = (F.layer_norm(x, x.shape[-1:], eps=1e-10) for x in (student_ND, teacher_ND))
    return (ours - theirs).square().mean(-1)


def linear_cka(student_ND: Tensor, teacher_NE: Tensor, weights_N: Tensor) -> Tensor:
    """Linear centred kernel alignment of two sets of N vectors, `‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖)` in Frobenius norms: a scalar in [0, 1].

    X and Y have their mean taken off, so that neither a shift, a rotation nor a scale of either matters, and widths may differ.

    Args:
        student_ND: X, N ≥ 3: two points are always aligned.
        teacher_NE: Y.
        weights_N: how much each vector counts, > 0.

    Reference:
        Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited", arXiv 1905.00414, section 3.
    """
    share = (weights_N / weights_N.sum())[:, None]
    x, y = ((v - (share * v).sum(0)) * share.sqrt() for v in (student_ND, teacher_NE))
    x, y = (unit(v.flatten()).view_as(v) for v in (x, y))  # the scale does not matter; so nothing overflows
    alignment = (y.T @ x).square().sum()
    norms = (x.T @ x).square().sum() * (y.T @ y).square().sum()
    return alignment / norms.clamp(min=1e-30).sqrt()


class HiddenMSE(HiddenStates):
    """Mean squared difference of hidden states, see `hidden_mse`."""

    def compare(self, student_ND: Tensor, teacher_ND: Tensor, weights: Tensor) -> Tensor:
        """Evaluate `hidden_mse`."""
        return (weights * hidden_mse(student_ND, teacher_ND)).sum()


class HiddenCosine(HiddenStates):
    """One minus the cosine of hidden states, see `hidden_cosine`."""

    def compare(self, student_ND: Tensor, teacher_ND: Tensor, weights: Tensor) -> Tensor:
        """Evaluate `hidden_cosine`."""
        return (weights * hidden_cosine(student_ND, teacher_ND)).sum()


class HiddenNormalized(HiddenStates):
    """Mean squared difference of standardised hidden states, see `hidden_normalized`."""

    def compare(self, student_ND: Tensor, teacher_ND: Tensor, weights: Tensor) -> Tensor:
        """Evaluate `hidden_normalized`."""
        return (weights * hidden_normalized(student_ND, teacher_ND)).sum()


class Unprojected(HiddenStates, ABC):
    """A term that looks only at how vectors lie to each other, so that widths may differ; it depends on how a batch is cut.

    Args:
        layers: which layers are matched, see `layer_map.pairs`; or pairs of dotted names of submodules.
    """

    additive = False

    def __init__(self, layers: LayerRule = "uniform") -> None:
        super().__init__(layers, "none")

    def bridge(self, match: Match, setting: Setting) -> nn.Module:
        """Let any width pass."""
        return nn.Identity()


class HiddenCKA(Unprojected):
    """One minus the linear CKA over the valid positions of a micro-batch, times their number. See `linear_cka`; 0 for fewer than three."""

    def compare(self, student_ND: Tensor, teacher_ND: Tensor, weights: Tensor) -> Tensor:
        """Evaluate `linear_cka`."""
        if len(weights) < 3:  # two points are always aligned
            return 0 * student_ND.sum()
        return weights.sum() * (1 - linear_cka(student_ND, teacher_ND, weights))
