"""Answers at the end of a worked solution, as in GSM8K: which number is the answer, and whether it is the right one.

Reference: Cobbe et al. 2021, arXiv 2110.14168: the answer stands after `####`.
"""

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MARK = "####"
# A sign counts only where no digit, letter or bracket is before it: "10-5" ends in 5. Then money; then digits, in groups of three or not.
_NUMBER = re.compile(r"(?:(?<![\w)])[-+−])?(?:\$[-−]?)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")


def final_answer(text: str) -> str | None:
    """The number after the first `####`, on its line; else the last number; None where there is none.

    Written plainly, so that equal numbers are equal texts: no thousands separators, no `$`, no `+`, no zeros after the decimals.
    """
    _, mark, rest = text.partition(MARK)
    marked = _NUMBER.search(rest.split("\n")[0]) if mark else None
    if marked is not None:
        return _plain(marked.group())
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def exact_match(answers: Sequence[str | None], wanted: Sequence[str]) -> NDArray[np.float64]:
    """1 where the answer is the wanted one, else 0; `[N]`. No answer is a wrong one.

    Args:
        answers: of `final_answer`.
        wanted: the same of the solutions.
    """
    return np.array([float(answer == right) for answer, right in zip(answers, wanted, strict=True)])


def _plain(number: str) -> str:
    whole, _, decimals = re.sub(r"[^\d.]", "", number).partition(".")
    plain = f"{whole.lstrip('0') or '0'}.{decimals.rstrip('0')}".rstrip(".")
    return f"-{plain}" if re.search("[-−]", number) and plain != "0" else plain
