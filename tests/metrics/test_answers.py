import json
import re

import pytest

from distill.metrics.answers import exact_match, final_answer
from tests.data.helpers import SHARED


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### 72", "72"),
        ("####72.", "72"),
        ("#### 1,450,000", "1450000"),
        ("#### -10", "-10"),
        ("#### −10", "-10"),
        ("#### +5", "5"),
        ("#### $1,234.50", "1234.5"),
        ("#### -$3", "-3"),
        ("#### $-3", "-3"),
        ("#### .5", "0.5"),
        ("#### 0.50", "0.5"),
        ("#### 007", "7"),
        ("#### -0.0", "0"),
        ("#### 18 dollars", "18"),
        ("#### 20%", "20"),
        ("#### The answer is 5", "5"),
        ("#### 3\n#### 4", "3"),
        ("9 of 10\n####\nnothing 8", "8"),
        ("#### none\nit was 5 of 6", "6"),
        ("She has 5 apples, and then 1,080.", "1080"),
        ("It is 10-5", "5"),
        ("x=-5", "-5"),
        ("(3)-4", "4"),
        ("12,34", "34"),
        ("a1b2", "2"),
        ("no number at all", None),
        ("", None),
        ("123456789012345678901234567890", "123456789012345678901234567890"),
    ],
)
def test_final_answer(text: str, answer: str | None):
    assert final_answer(text) == answer


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_row_of_gsm8k_has_the_answer_that_stands_after_the_mark(split: str):
    path = SHARED / "gsm8k" / f"{split}.jsonl"
    if not path.is_file():
        pytest.skip("GSM8K is not on this machine")
    rows = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == {"train": 7473, "test": 1319}[split]
    for row in rows:
        # as the authors of GSM8K find it, with the thousands separators taken out
        wanted = re.search(r"#### (\-?[0-9\.\,]+)", row).group(1).replace(",", "")
        assert float(final_answer(row)) == float(wanted)


def test_exact_match_counts_equal_numbers_and_no_answer_as_wrong():
    answers = [final_answer(text) for text in ("#### 72.0", "#### 1,080", "I do not know", "#### 7")]
    assert exact_match(answers, ["72", "1080", "5", "8"]).tolist() == [1.0, 1.0, 0.0, 0.0]
