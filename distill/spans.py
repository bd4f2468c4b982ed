"""Where two tokenizations of one text meet: the shortest spans of bytes that both cut out. Pure; works on whole batches at once."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Stream:
    """The tokens of a batch as one tokenizer cuts its texts, in order. The texts lie one after the other, with a gap between them.

    Attributes:
        ends: `[n]`, int64, not decreasing: the byte that each token ends at, counted over all texts.
        at: `[n]`, int64: the flattened position that predicts the token.
        ids: `[n]`, int64: the token.
        usable: `[n]`, whether its probability is known and wanted. A span with a token that is not takes no part.
    """

    ends: NDArray[np.int64]
    at: NDArray[np.int64]
    ids: NDArray[np.int64]
    usable: NDArray[np.bool_]


class Alignment(NamedTuple):
    """S spans of bytes, and the n student and m teacher positions that predict their tokens. Both lists are in the order of the text.

    Attributes:
        student_at: `[n]`, int64: flattened positions of the student's batch, `b · T + t`.
        student_span: `[n]`, int64: which span, 0 … S − 1; every span has a token on both sides.
        teacher_at: `[m]`, int64: flattened positions of the teacher's batch.
        teacher_span: `[m]`, int64.
        teacher_labels: `[m]`, int64: the teacher's token that each of its positions predicts.
    """

    student_at: Tensor
    student_span: Tensor
    teacher_at: Tensor
    teacher_span: Tensor
    teacher_labels: Tensor

    def to(self, device: torch.device) -> "Alignment":
        """Put it on a device."""
        return Alignment(*(index.to(device, non_blocking=True) for index in self))

    def taps(self) -> dict[str, Tensor]:
        """Give it in the form in which a teacher's `Outputs` carries it."""
        return self._asdict()

    @classmethod
    def of(cls, taps: dict[str, Tensor]) -> "Alignment":
        """Take it out of a teacher's taps."""
        return cls(*(taps[name] for name in cls._fields))


def align(student: Stream, teacher: Stream, closes: NDArray[np.int64]) -> Alignment:
    """Cut the texts at every byte at which both tokenizations cut, and keep the spans between in which every token is usable.

    A token belongs to the first such cut at or after its own end. A token without bytes (the empty word that some tokenizers begin with)
    goes to the span that it stands in front of.

    Args:
        student: its tokens.
        teacher: its tokens of the same texts.
        closes: `[d]`, one byte in the gap behind each text: closes what no common cut does, which takes no part. A token whose bytes are
            not the same on both sides ends there.
    """
    cuts = np.union1d(np.intersect1d(student.ends, teacher.ends), closes)
    good = ~np.isin(cuts, closes, assume_unique=True)
    spans = [np.searchsorted(cuts, side.ends) for side in (student, teacher)]
    for span, side in zip(spans, (student, teacher), strict=True):
        good[span[~side.usable]] = False
    number = np.cumsum(good) - 1
    kept = [good[span] for span in spans]
    ours, theirs = (number[span[keep]] for span, keep in zip(spans, kept, strict=True))
    found = (student.at[kept[0]], ours, teacher.at[kept[1]], theirs, teacher.ids[kept[1]])
    return Alignment(*(torch.from_numpy(index.astype(np.int64)) for index in found))
