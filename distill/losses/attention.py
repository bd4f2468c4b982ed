"""Terms on self-attention: its maps, and the relations between queries, between keys and between values."""

from abc import ABC, abstractmethod
from math import gcd

import torch
from torch import Tensor

from distill.layers import Layers
from distill.losses.base import Loss, Setting
from distill.losses.divergence import forward_kl
from distill.losses.layer_map import Match, NumberRule, pairs, tapped
from distill.losses.projector import full
from distill.losses.support import position_weights
from distill.types import Batch, ConfigError, Outputs, Target


def documents(batch: Batch, rows: int, length: int) -> Tensor:
    """Number the documents of a batch, `[B, T]`: one per row, or where `position_ids` start again at 0, as packing writes them."""
    first = torch.zeros(rows, length, dtype=torch.bool, device=batch["labels"].device)
    first[:, 0] = True
    if "position_ids" in batch:
        first |= batch["position_ids"] == 0
    return first.flatten().cumsum(0).view(rows, length) - 1


def real(batch: Batch, rows: int, length: int) -> Tensor:
    """Tell which positions are no padding, `[B, T]`."""
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    return torch.ones(rows, length, dtype=torch.bool, device=batch["labels"].device)


def visible(batch: Batch, rows: int, length: int) -> Tensor:
    """Tell which keys count for a query, `[B, T, T]`: the real positions of its own document, and always itself."""
    document = documents(batch, rows, length)
    itself = torch.eye(length, dtype=torch.bool, device=document.device)
    return (document[:, :, None] == document[:, None]) & real(batch, rows, length)[:, None] | itself


class _Attention(Loss, ABC):
    """Averages over pairs of layers; 1 is the first layer, there is no 0."""

    def __init__(self, layers: NumberRule) -> None:
        super().__init__()
        self.layers = layers
        self.matches: list[list[Match]] = []  # of each pair of layers

    def prepare(self, setting: Setting) -> None:
        """Match the layers."""
        student, teacher = setting.student, setting.layers_of_teacher()
        self.check(student, teacher, setting.key)
        key = f"{setting.key}.layers"
        self.matches = [self.match(student, s, teacher, t, key) for s, t in pairs(self.layers, student.count, teacher.count, key, first=1)]
        self.student_taps, self.teacher_taps = (tuple(m.taps[side] for group in self.matches for m in group) for side in (0, 1))

    @abstractmethod
    def check(self, student: Layers, teacher: Layers, key: str) -> None:
        """Refuse models that cannot be compared."""

    @abstractmethod
    def match(self, student: Layers, s: int, teacher: Layers, t: int, key: str) -> list[Match]:
        """Give what is compared between student layer s and teacher layer t."""

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor, visible_BTT: Tensor, weights_BT: Tensor) -> Tensor:
        """Give the weighted sum over valid queries."""

    def summary(self) -> list[str]:
        """Say which layers are matched."""
        return [group[0].text for group in self.matches]

    def forward(self, student: Outputs, teacher: Target, batch: Batch) -> Tensor:
        """Sum over valid queries, averaged over the pairs of layers."""
        some = student.taps[self.student_taps[0]]
        rows, length = some.shape[0], some.shape[-1 if some.ndim == 4 else 1]
        keys, weights = visible(batch, rows, length), position_weights(batch, length)
        with torch.autocast(some.device.type, enabled=False):
            values = [self.compare(*tapped(match, student, teacher), keys, weights) for group in self.matches for match in group]
            return torch.stack(values).sum() / len(self.matches)


def attention_mse(student_NHT: Tensor, teacher_NHT: Tensor, visible_NT: Tensor) -> Tensor:
    """Mean squared difference of attention probabilities, `1/(H K) Σ_h Σ_k (a_hk − b_hk)²` over H heads and K visible keys.

    Args:
        student_NHT: `[N, H, T]`, a of N queries.
        teacher_NHT: `[N, H, T]`, b.
        visible_NT: `[N, T]`, which keys count.

    Returns:
        `[N]`, in [0, 2 / K].

    Reference:
        Jiao et al. 2019, "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv 1909.10351, equation 7 (there on the scores
        before the softmax, which differ between kernels; here on probabilities).
    """
    difference = (full(student_NHT) - full(teacher_NHT)).masked_fill(~visible_NT[:, None], 0)
    return difference.square().sum(-1).mean(-1) / visible_NT.sum(-1)


class AttentionMaps(_Attention):
    """Mean squared difference of attention maps, see `attention_mse`; both models need `attn_implementation: eager` and as many heads.

    A student that drops out attention probabilities gives maps with holes: set its attention dropout to 0.

    Args:
        layers: which layers are matched, see `layer_map.pairs`; without the embeddings.

    Raises:
        ConfigError: (in `prepare`) another attention kernel, or different numbers of heads.
    """

    def __init__(self, layers: NumberRule = "uniform") -> None:
        super().__init__(layers)

    def check(self, student: Layers, teacher: Layers, key: str) -> None:
        """Compare the heads."""
        if student.heads != teacher.heads:
            raise ConfigError(
                f"{key}: the student has {student.heads} attention heads and the teacher {teacher.heads}, so their maps cannot be "
                "compared; take MiniLMRelations"
            )

    def match(self, student: Layers, s: int, teacher: Layers, t: int, key: str) -> list[Match]:
        """Match the maps of two layers."""
        taps = student.attention_map(s), teacher.attention_map(t)
        return [
            Match(taps, (student.width, teacher.width), f"attention of student layer {s} ↔ teacher layer {t}, {student.heads} heads", key)
        ]

    def compare(self, student: Tensor, teacher: Tensor, visible_BTT: Tensor, weights_BT: Tensor) -> Tensor:
        """Evaluate `attention_mse` on the valid queries."""
        valid = weights_BT > 0
        ours, theirs = (maps.transpose(1, 2)[valid] for maps in (student, teacher))
        return (weights_BT[valid] * attention_mse(ours, theirs, visible_BTT[valid])).sum()


def relations(x_BTD: Tensor, heads: int, visible_BTT: Tensor) -> Tensor:
    """How much each position relates to each other one, `log softmax_k (x_q · x_k / √d)` in `heads` slices of width d = D / heads.

    Args:
        x_BTD: queries, keys or values, before any rotation.
        heads: A_r, relation heads.
        visible_BTT: which keys count for which query.

    Returns:
        `[B, T, A_r, T]`, nats; −1e30 at keys that do not count.
    """
    x = full(x_BTD).unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = x @ x.transpose(2, 3) / x.shape[-1] ** 0.5
    return scores.transpose(1, 2).masked_fill(~visible_BTT[:, :, None], -1e30).log_softmax(-1)


class MiniLMRelations(_Attention):
    """The relations between queries, between keys and between values, student against teacher: `Σ_{Q,K,V} 1/A_r Σ_a KL(R_t,a ‖ R_s,a)`.

    Summed over valid queries; see `relations`, with keys in both directions whatever the model's own mask. Widths, numbers of heads and
    attention kernels may differ, and keys and values may be narrower than queries. The memory grows with `A_r T²` per sequence.

    Args:
        layers: which layers are matched, see `layer_map.pairs`; without the embeddings. The paper takes the student's last layer, and an
            upper middle one of a large teacher (21 of 24 for BERT).
        relation_heads: A_r; more heads than the teacher has are fine (in the paper 48 for a base teacher, 64 for a large one).

    Raises:
        ConfigError: (in `prepare`) relation_heads does not divide a width, or a model computes Q, K and V in one fused projection.

    Reference:
        Wang et al. 2020, "MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers",
        arXiv 2012.15828, section 3, all three terms with weight 1.
    """

    def __init__(self, layers: NumberRule = "last", relation_heads: int = 12) -> None:
        super().__init__(layers)
        self.relation_heads = relation_heads

    def check(self, student: Layers, teacher: Layers, key: str) -> None:
        """Look whether the relation heads divide every width."""
        widths = [width for layers in (student, teacher) for _, width in layers.projections]
        if self.relation_heads < 1 or any(width % self.relation_heads for width in widths):
            common = gcd(*widths)
            fitting = [n for n in range(1, common + 1) if common % n == 0]
            raise ConfigError(
                f"{key}.relation_heads: {self.relation_heads} does not divide the widths of queries, keys and values, {widths} "
                f"(student, then teacher); take one of {fitting}"
            )

    def match(self, student: Layers, s: int, teacher: Layers, t: int, key: str) -> list[Match]:
        """Match queries, keys and values of two layers."""
        taps = [(student.projection(s, part), teacher.projection(t, part)) for part in range(3)]
        text = f"relations of student layer {s} ↔ teacher layer {t}, {self.relation_heads} relation heads"
        widths = [(student.projections[part][1], teacher.projections[part][1]) for part in range(3)]
        return [Match(names, both, text, key) for names, both in zip(taps, widths, strict=True)]

    def compare(self, student: Tensor, teacher: Tensor, visible_BTT: Tensor, weights_BT: Tensor) -> Tensor:
        """Evaluate the divergence of the relations at the valid queries."""
        valid = weights_BT > 0
        ours, theirs = (relations(x, self.relation_heads, visible_BTT)[valid].flatten(0, 1) for x in (student, teacher))
        return (weights_BT[valid] * forward_kl(ours, theirs).unflatten(0, (-1, self.relation_heads)).mean(-1)).sum()
