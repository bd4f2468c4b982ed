"""Terms between models with different tokenizers, on what both say of the same text; for a teacher such as `OtherTokenizer`."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.losses.base import Loss, Setting
from distill.losses.block import Terms, trainable
from distill.losses.chunked import GradientInForward, Gradients, Tally, chunk_size
from distill.losses.support import FLOOR, cut
from distill.spans import Alignment
from distill.types import Batch, ConfigError, Outputs, Target

TINY = 1e-30  # nats; a likelihood of exactly 1 has no logarithm of its complement


def uld(student_NV: Tensor, teacher_NW: Tensor) -> Tensor:
    """Distance of distributions over different classes, each sorted from the largest down, `Σ_i |p↓_i − q↓_i|`: `[N]`, in [0, 2].

    The shorter is filled up with zeros. This is the Wasserstein distance where all classes lie equally far apart, up to a factor; to which
    class a probability belongs does not count.

    Args:
        student_NV: probabilities q.
        teacher_NW: probabilities p, over as many classes or others.

    Reference:
        Boizard et al. 2024, "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", arXiv 2402.12030.
    """
    width = max(student_NV.shape[-1], teacher_NW.shape[-1])
    ours, theirs = (F.pad(p.sort(-1, descending=True).values, (0, width - p.shape[-1])) for p in (student_NV, teacher_NW))
    return (theirs - ours).abs().sum(-1)


def span_divergence(student_S: Tensor, teacher_S: Tensor, temperature: float = 100.0) -> Tensor:
    """Divergence of two likelihoods of the same spans, `τ KL((p, 1 − p) ‖ (q, 1 − q))`: `[S]`, nats, in [0, ∞), 0 where both are equal.

    `p = P_teacher^(1/τ)` and `q = P_student^(1/τ)`. A span is seen as one event, that it comes or does not. With τ = 1 it is the KL
    divergence of that event; towards τ → ∞ it becomes `b − a + a log(a / b)` with a = −log P_teacher and b = −log P_student, so that rare
    spans count as much as likely ones. The factor τ keeps the size about independent of τ; the paper leaves it to the weights of the terms.

    Args:
        student_S: −log P of each span, the sum over its tokens, in nats.
        teacher_S: the teacher's.
        temperature: τ > 0; 100 in the paper's experiments.

    Reference:
        Minixhofer, Vulić, Ponti 2025, "Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching", arXiv 2503.20083: the
        binarised f-divergence, with the KL divergence for f. The authors' program prints the cross-entropy, which is larger by the
        teacher's entropy and has the same gradient, and takes 1e-6 off both logarithms.
    """
    ours, theirs = (nll.clamp(min=TINY) / temperature for nll in (student_S, teacher_S))
    comes = (-theirs).exp() * (ours - theirs)
    comes_not = -torch.expm1(-theirs) * (_log_complement(theirs) - _log_complement(ours))
    return temperature * (comes + comes_not)


def _log_complement(nll: Tensor) -> Tensor:
    """`log(1 − exp(−x))`, exact for small x as for large."""
    small = nll < 0.693
    return torch.where(small, (-torch.expm1(-torch.where(small, nll, 1.0))).log(), torch.log1p(-(-torch.where(small, 1.0, nll)).exp()))


def token_nll(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """`−log softmax(z)_y`: `[N]`, nats; exact for labels that are nearly certain, where `1 − P` counts, in value and in gradient."""
    label = logits_NV.gather(-1, labels_N[:, None])
    others = logits_NV.scatter(-1, labels_N[:, None], 2 * FLOOR).logsumexp(-1)
    return F.softplus(others - label[:, 0], threshold=50)


class Piece(NamedTuple):
    """Some spans, and the rows of both sides that belong to them."""

    spans: slice
    student: slice
    teacher: slice


class AcrossTokenizers(Loss, ABC):
    """A term on the spans of text that student and teacher both cut out, see `spans.align`; summed over spans.

    Both heads are applied to a piece of the spans at a time and the gradient is computed there and then, as in `chunked_objective`, so
    that no tensor `[N, V]` is kept. Special tokens, prompts, and text that does not survive the way to the other tokenizer take no part.

    Args:
        chunk: rows of either side at a time, about; None chooses.
    """

    supports = frozenset({"text"})
    on_features = True

    def __init__(self, chunk: int | None = None) -> None:
        super().__init__()
        if chunk is not None and chunk < 1:
            raise ConfigError(f"chunk must be at least 1, got {chunk}; leave it out to have it chosen")
        self.chunk = chunk

    def prepare(self, setting: Setting) -> None:
        """Note how many tokens the student's tokenizer has."""
        self.num_classes = setting.num_classes

    def rows(self, alignment: Alignment) -> Alignment:
        """Choose which of the aligned positions are looked at."""
        return alignment

    @abstractmethod
    def compare(self, student_NV: Tensor, teacher_MW: Tensor, labels: tuple[Tensor, Tensor], spans: tuple[Tensor, Tensor]) -> Tensor:
        """Evaluate some spans, and sum.

        Args:
            student_NV: logits of the rows of these spans, in float32, without the vocabulary's padding.
            teacher_MW: the teacher's; without gradient.
            labels: the tokens that they predict, `[N]` and `[M]`.
            spans: which of these spans each belongs to, from 0, `[N]` and `[M]`.
        """

    def forward(self, student: Outputs, teacher: Target, batch: Batch) -> Tensor:
        """Sum over all spans of the batch."""
        assert isinstance(teacher, Outputs), "a teacher on other tokens gives features"
        found = self.rows(Alignment.of(teacher.taps))
        ours, theirs = student.features.flatten(0, 1)[found.student_at], teacher.features.flatten(0, 1)[found.teacher_at]
        labels = batch["labels"].flatten()[found.student_at], found.teacher_labels
        cuts = pieces(found, self.chunk or chunk_size(max(self.num_classes, _columns(teacher.head, theirs)), ours.device))

        def evaluate(logits_NV: Tensor, piece: Piece) -> Tensor:
            with torch.no_grad():
                logits_MW = teacher.head(theirs[piece.teacher])
            spans = found.student_span[piece.student] - piece.spans.start, found.teacher_span[piece.teacher] - piece.spans.start
            known = labels[0][piece.student], labels[1][piece.teacher]
            return self.compare(cut(logits_NV, self.num_classes), cut(logits_MW, logits_MW.shape[-1]), known, spans)

        return summed(ours, student.head, cuts, evaluate)


class ULD(AcrossTokenizers):
    """Universal Logit Distillation: distance of the sorted probabilities at positions before the same text, see `uld`.

    `Σ_spans Σ_i |p↓_i − q↓_i|`, of the positions that predict the first token of a span: on both sides the same text lies before them. The
    paper pairs the t-th token of one answer with the t-th of the other, up to the end of the shorter, which are at different places of the
    text as soon as one word is cut in other ways; GOLD (TRL) pairs spans, and multiplies the first position's probabilities by those of
    the later tokens. There is no factor T².

    Args:
        temperature: T > 0 of both softmaxes; 1 in the paper.
        chunk: see `AcrossTokenizers`.

    Raises:
        ConfigError: T is not positive.
    """

    def __init__(self, temperature: float = 1.0, chunk: int | None = None) -> None:
        super().__init__(chunk)
        self.temperature = _positive(temperature)

    def rows(self, alignment: Alignment) -> Alignment:
        """Keep the first position of every span."""
        ours, theirs = (span.diff(prepend=span.new_tensor([-1])) > 0 for span in (alignment.student_span, alignment.teacher_span))
        student = alignment.student_at[ours], alignment.student_span[ours]
        return Alignment(*student, alignment.teacher_at[theirs], alignment.teacher_span[theirs], alignment.teacher_labels[theirs])

    def compare(self, student_NV: Tensor, teacher_MW: Tensor, labels: tuple[Tensor, Tensor], spans: tuple[Tensor, Tensor]) -> Tensor:
        """Evaluate `uld`."""
        return uld((student_NV / self.temperature).softmax(-1), (teacher_MW / self.temperature).softmax(-1)).sum()

    def summary(self) -> list[str]:
        """Say what is compared."""
        return [f"sorted probabilities at T = {self.temperature:g}, where both tokenizers begin a token"]


class SpanLikelihood(AcrossTokenizers):
    """Approximate likelihood matching: both models give the same span of text the same likelihood, see `span_divergence`.

    `Σ_spans τ KL((p, 1 − p) ‖ (q, 1 − q))`, over the shortest spans of bytes that both tokenizers cut out, the likelihood of a span being
    the product over its tokens. A span counts once, however many tokens it has, as in the paper; the module divides by the student's valid
    positions as it does for every term, the paper by the number of spans, which is smaller. Left out are the paper's correction for what
    a tokenization tells of the text after it (`chunk debiasing`), and its merging of spans. With the student's own tokenizer each span is a
    token, and the term sees of each distribution the probability of the label alone.

    Args:
        temperature: τ > 0; 100 in the paper.
        chunk: see `AcrossTokenizers`.

    Raises:
        ConfigError: τ is not positive.
    """

    def __init__(self, temperature: float = 100.0, chunk: int | None = None) -> None:
        super().__init__(chunk)
        self.temperature = _positive(temperature)

    def compare(self, student_NV: Tensor, teacher_MW: Tensor, labels: tuple[Tensor, Tensor], spans: tuple[Tensor, Tensor]) -> Tensor:
        """Sum −log P within each span, and evaluate `span_divergence`."""
        sides = zip((student_NV, teacher_MW), labels, spans, strict=True)
        count = int(spans[0][-1]) + 1
        nlls = [logits.new_zeros(count).index_add(0, span, token_nll(logits, label)) for logits, label, span in sides]
        return span_divergence(nlls[0], nlls[1].to(nlls[0]), self.temperature).sum()

    def summary(self) -> list[str]:
        """Say what is compared."""
        return [f"likelihood of the shortest common spans of text at τ = {self.temperature:g}"]


def pieces(alignment: Alignment, size: int) -> list[Piece]:
    """Cut the rows of both sides between spans, into pieces of about `size` rows a side; a span is never cut."""
    count = int(alignment.student_span[-1]) + 1 if len(alignment.student_span) else 0
    sides = (alignment.student_span.cpu(), alignment.teacher_span.cpu())
    ends = torch.stack([torch.bincount(span, minlength=count).cumsum(0) for span in sides])
    last = (torch.div(ends.sum(0) - 1, 2 * size, rounding_mode="floor").diff(append=torch.tensor([-1])) != 0).nonzero()[:, 0]
    found, before = [], (0, 0, 0)
    for after in zip((last + 1).tolist(), *ends[:, last].tolist(), strict=True):
        found.append(Piece(*(slice(a, b) for a, b in zip(before, after, strict=True))))
        before = after
    return found


def summed(features_ND: Tensor, head: nn.Module, cuts: list[Piece], evaluate: Callable[[Tensor, Piece], Tensor]) -> Tensor:
    """Sum a function of the student's logits over pieces, with the gradient computed in the forward pass; to be differentiated once.

    Args:
        features_ND: the student's, of the rows that the pieces index.
        head: the student's.
        cuts: the pieces.
        evaluate: gives a scalar for the logits of a piece's rows.
    """
    of_head = trainable(head)

    def walk(with_gradient: bool) -> tuple[Tensor, Tensor, Tensor, Gradients]:
        tally = Tally(features_ND, of_head, Terms({}, {}, 0), with_gradient, norms=False)
        total = features_ND.new_zeros((), dtype=torch.promote_types(features_ND.dtype, torch.float32))
        for piece in cuts:
            with torch.set_grad_enabled(with_gradient):
                part = features_ND[piece.student].detach().requires_grad_(with_gradient)
                logits = head(part)
                leaf = logits.detach().to(total.dtype).requires_grad_(with_gradient)
                value = evaluate(leaf, piece)
            total += value.detach()
            if with_gradient:
                flow = torch.autograd.grad(value, leaf)[0]
                flow = flow if logits.dtype == torch.float16 else flow.to(logits.dtype)
                tally.through_the_head(piece.student, part, logits, [flow])
        return total, total.clone(), total.clone(), tally.gradients()

    if torch.is_grad_enabled() and (features_ND.requires_grad or of_head):
        total: Tensor = GradientInForward.apply(walk, features_ND, *of_head)[0]
        return total
    return walk(False)[0]


def _columns(head: nn.Module, features: Tensor) -> int:
    with torch.no_grad():
        return int(head(features[:1]).shape[-1]) if len(features) else 1


def _positive(temperature: float) -> float:
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be > 0, got {temperature}; use 1.0 for none")
    return temperature
