"""Writes down what one model says, block by block of positions."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.losses.support import Distribution
from distill.metrics import fidelity, speculative
from distill.metrics.temperature import TEMPERATURES, scaled
from distill.report.evidence import Against, Columns, Ints

LOGITS_UP_TO = 1024
"""Classes up to which the sample's logits are kept."""


@dataclass(frozen=True)
class Block:
    """What a model says of n positions, on its device.

    Attributes:
        logp: `[n, V]`, float32, nats.
        probs: `[n, V]`.
        top_k: `[n, k]`.
    """

    logp: Tensor
    probs: Tensor
    top_k: Tensor


class Pen:
    """Fills the columns of one model.

    Args:
        labels: `[N]`.
        sample: `[S]`, in order.
        num_classes: V.
        top_k: of `Against.overlap`.
        beside: whether there is a teacher to stand beside.
    """

    def __init__(self, labels: Ints, sample: Ints, num_classes: int, top_k: int, beside: bool) -> None:
        self.labels, self.sample, self.top_k = labels, sample, top_k
        self.alone = np.empty((4, len(labels)))
        self.top = np.empty(len(labels), np.int64)
        self.against = np.empty((4, len(labels))) if beside else None
        self.rank = np.full(len(labels), np.nan)
        self.scaled = np.empty((len(sample), 2, len(TEMPERATURES)), np.float32)
        self.logits = np.empty((len(sample), num_classes), np.float32) if num_classes <= LOGITS_UP_TO else None
        self.sampled: list[Tensor] = []  # logits of the sampled positions of the chunk

    def write(self, here: slice, said: Distribution, teacher: Block | None) -> Block:
        """Write down a block of positions.

        Args:
            here: which ones.
            said: what the model says.
            teacher: what the teacher says, where there is one and it is not the model itself.
        """
        logp = said.logp().float()
        y, probs, top = torch.from_numpy(self.labels[here]).to(logp.device), logp.exp(), likeliest(logp)
        self.top[here] = top.cpu().numpy()
        self.alone[:, here] = _numpy(_alone(logp, probs, top, y))
        block = Block(logp, probs, logp.topk(self.top_k, sorted=False).indices)
        if self.against is not None and teacher is not None:
            self.against[:, here] = _numpy(_beside(block, teacher))
        within = self.sample[self._sampled(here)] - here.start
        self.sampled.append(said.logits_NV[torch.from_numpy(within).to(logp.device)])
        return block

    def look_closer(self, here: slice, teacher_ranks: Tensor | None) -> Tensor:
        """Look at the sampled positions of a chunk that is written; give the ranks of its wrong classes.

        Args:
            here: the positions of the chunk.
            teacher_ranks: what this gave for the teacher, where there is one and it is not the model itself.
        """
        places, logits = self._sampled(here), torch.cat(self.sampled).float()
        y = torch.from_numpy(self.labels[self.sample[places]]).to(logits.device)
        self.sampled.clear()
        self.scaled[places] = scaled(logits, y).cpu().numpy()
        if self.logits is not None:
            self.logits[places] = logits.cpu().numpy()
        ranks = fidelity.wrong_ranks(logits, y)
        if teacher_ranks is not None:
            self.rank[self.sample[places]] = _numpy(fidelity.rank_correlation(ranks, teacher_ranks))
        return ranks

    def _sampled(self, here: slice) -> slice:
        return slice(*np.searchsorted(self.sample, [here.start, here.stop]).tolist())

    def columns(self) -> Columns:
        """Give them, when all is written."""
        nll, confidence, entropy, brier = self.alone
        against = None
        if self.against is not None:
            kl, reverse_kl, acceptance, overlap = self.against
            against = Against(kl, reverse_kl, acceptance, overlap, self.rank)
        return Columns(nll, self.top, confidence, entropy, brier, against, self.logits, self.scaled)


def likeliest(logp: Tensor) -> Tensor:
    """The class of the largest value of each row, the first of equals."""
    if logp.device.type != "cpu":
        return logp.argmax(-1)
    return torch.from_numpy(logp.numpy().argmax(-1))  # the same, the first of equals, in a tenth of the time


def _alone(logp: Tensor, probs: Tensor, top: Tensor, y: Tensor) -> Tensor:
    nll = -logp.gather(-1, y[:, None])[:, 0]
    confidence = probs.gather(-1, top[:, None])[:, 0]
    right = probs.gather(-1, y[:, None])[:, 0]
    others = (probs.square().sum(-1) - right.square()).clamp(min=0)
    return torch.stack([nll, confidence, fidelity.entropy(logp, probs), others + (1 - right).square()])


def _beside(model: Block, teacher: Block) -> Tensor:
    kl, reverse_kl = fidelity.divergences(model.logp, model.probs, teacher.logp, teacher.probs)
    return torch.stack([kl, reverse_kl, speculative.acceptance(model.probs, teacher.probs), fidelity.overlap(model.top_k, teacher.top_k)])


def _numpy(values: Tensor) -> NDArray[np.float64]:
    return values.double().cpu().numpy()
