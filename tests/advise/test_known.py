"""Every figure that is carried along stands in the table that it names."""

import re
from pathlib import Path

import pytest

from distill.advise import known
from distill.advise.parts import Loss

DOCS = Path(__file__).parents[2] / "docs"
COMPRESSION = (DOCS / "compression.md").read_text(encoding="utf-8")


def row(text: str, first: str) -> list[str]:
    """The cells of the first row of a Markdown table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("scheme", ["int4", "int3", "ternary"])
def test_what_training_in_few_bits_costs_and_wins_back(scheme: str) -> None:
    _, _, whole, rounded, _, distilled, _, back = row(COMPRESSION, scheme)
    mean, spread = map(float, distilled.split(" ± "))
    float_loss = float(whole.split(" ± ")[0])
    assert known.TRAINED_IN["causal-lm", scheme].value == pytest.approx(mean + spread - float_loss, abs=1e-9)
    assert distilled.removesuffix(" ± 0.000") in known.TRAINED_IN["causal-lm", scheme].basis
    assert round(100 * known.WON_BACK[scheme]) == int(back.split(" ± ")[0])
    if scheme == "int4":
        assert known.ROUNDED["causal-lm", "int4"].value == pytest.approx(float(rounded.split(" ± ")[0]) - float_loss, abs=1e-9)


@pytest.mark.parametrize("export", ["onnx:int8", "openvino:int8"])
def test_what_int8_costs_an_encoder(export: str) -> None:
    table = COMPRESSION[COMPRESSION.index("points lost to int8") :]
    _, runs, _, lost = row(table, export.replace(":", "-"))
    mean, spread = map(float, lost.split(" ± "))
    found = known.ROUNDED["classification", export]
    assert found.value == pytest.approx(mean + spread, abs=1e-9)
    assert lost in found.basis
    assert runs == "3"
    assert "three seeds" in found.basis
    assert not found.measured


def test_factors_of_packed_files() -> None:
    assert row(COMPRESSION, "float32")[2].split(" / ")[0] == str(known.PACKED["fp32"])
    assert row(COMPRESSION, "bfloat16")[2].split(" / ")[0] == str(known.PACKED["bf16"])


def test_students_name_figures_of_their_page_or_a_paper() -> None:
    for line in known.STUDENTS:
        if page := re.search(r"\(docs/(\w+\.md)\)", line):
            text = (DOCS / page[1]).read_text(encoding="utf-8")
            numbers = set(re.findall(r"\d+\.\d+", line.split("(docs")[0])) - {"2.0", "0.23"}  # sizes stand in the configs
            assert len(numbers) > 3
            assert all(number in text for number in numbers)
        else:
            assert re.search(r"arXiv \d{4}\.\d{5}", line)


def test_every_loss_says_where_it_is_from() -> None:
    losses: list[Loss] = [*known.ROUNDED.values(), *known.TRAINED_IN.values()]
    assert all("docs/" in loss.basis and "parameters" in loss.basis for loss in losses)
