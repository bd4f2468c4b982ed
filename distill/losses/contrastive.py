"""Contrastive distillation: tell the teacher's vector of the same sample from those of other samples."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.base import Setting
from distill.losses.features import unit
from distill.losses.layer_map import LayerRule, Match
from distill.losses.projector import FullLinear
from distill.losses.relational import Relational
from distill.types import ConfigError


def crd(student_SD: Tensor, teacher_SD: Tensor, temperature: float, num_samples: int) -> Tensor:
    """Noise-contrastive estimation, `−1/S Σ_i [log h(t_i, s_i) + Σ_{j≠i} log(1 − h(t_j, s_i))]`: a scalar, nats, ≥ 0.

    `h(t, s) = e^{t·s/τ} / (e^{t·s/τ} + N/M)` with N = S − 1 negatives: the other samples of the micro-batch, in place of the paper's memory
    bank of thousands. In log space, `log h = log σ(t·s/τ − log(N/M))`. The authors' program adds the same with student and teacher
    exchanged, and divides `e^{t·s/τ}` by a constant that it estimates from the first batch; neither is here.

    Args:
        student_SD: `[S, D]`, S ≥ 2, of length 1.
        teacher_SD: `[S, D]`, of length 1.
        temperature: τ > 0.
        num_samples: M, rows of the training data.

    Reference:
        Tian, Krishnan, Isola 2019, "Contrastive Representation Distillation", arXiv 1910.10699; code
        github.com/HobbitLong/RepDistiller, `CRDLoss`.
    """
    S = len(student_SD)
    logits = student_SD @ teacher_SD.T / temperature - math.log((S - 1) / num_samples)
    positive = F.logsigmoid(logits.diagonal())
    itself = torch.eye(S, dtype=torch.bool, device=logits.device)
    negative = F.logsigmoid(-logits).masked_fill(itself, 0).sum(-1)
    return -(positive + negative).mean()


class CRD(Relational):
    """Contrastive representation distillation, see `crd`: on linear embeddings of both sides' samples, trained along.

    Each sample is the mean of a hidden state over its real tokens (see `relational.pooled`). The negatives are those of the micro-batch on
    one device: take as many rows as fit.

    Args:
        layers: which layers are matched, see `layer_map.pairs`; or pairs of dotted names of submodules.
        dim: width of the embeddings.
        temperature: τ > 0.

    Raises:
        ConfigError: dim or the temperature is not positive.
    """

    def __init__(self, layers: LayerRule = "last", dim: int = 128, temperature: float = 0.07) -> None:
        super().__init__(layers)
        if dim < 1 or not 0 < temperature < math.inf:
            raise ConfigError(f"CRD: want dim ≥ 1 and temperature > 0, got {dim} and {temperature}; the authors take 128 and 0.07")
        self.dim, self.temperature = dim, temperature
        self.embeddings = nn.ModuleList()  # of the teacher; the student's are its projectors

    def prepare(self, setting: Setting) -> None:
        """Match the layers, make the embeddings, and see how many samples there are."""
        super().prepare(setting)
        self.num_samples = setting.num_samples
        if not self.embeddings:
            self.embeddings.extend([FullLinear(match.widths[1], self.dim) for match in self.matches])

    def bridge(self, match: Match, setting: Setting) -> nn.Module:
        """Make the student's embedding."""
        return FullLinear(match.widths[0], self.dim)

    def summary(self) -> list[str]:
        """Say which layers are matched, and the widths of both embeddings."""
        return [f"{line} and {match.widths[1]}→{self.dim}" for line, match in zip(super().summary(), self.matches, strict=True)]

    def meet(self, i: int, student_ND: Tensor, teacher_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Embed both sides, and give them length 1."""
        return unit(self.projectors[i](student_ND)), unit(self.embeddings[i](teacher_ND))

    def relation(self, student_SD: Tensor, teacher_SD: Tensor) -> Tensor:
        """Evaluate `crd`."""
        return crd(student_SD, teacher_SD, self.temperature, self.num_samples)
