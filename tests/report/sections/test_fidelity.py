import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import entropy, spearmanr  # type: ignore[import-untyped]

from distill.report.evidence import NotMeasured
from distill.report.page.blocks import Block, Grid, Missing, Note, Picture
from distill.report.sections.fidelity import Fidelity
from tests.report.asked import V, evidence, language, logits, saying


def shown(figures: dict[str, Any]) -> list[Block]:
    return Fidelity().blocks(json.loads(json.dumps(figures, allow_nan=False)))


def of(kind: type, blocks: list[Block]) -> list[Any]:
    return [block for block in blocks if isinstance(block, kind)]


def test_figures_are_those_of_scipy() -> None:
    given = language()
    found = Fidelity().figures(given)["models"]["student distilled"]
    logq, logp = (z.flatten(0, 1).double().log_softmax(-1).numpy() for z in (logits(0) + 0.3 * logits(2), logits(0)))
    q, p, y = np.exp(logq), np.exp(logp), given.observed.labels
    n = range(len(y))
    true = {
        "kl": entropy(p, q, axis=-1).mean(),
        "reverse_kl": entropy(q, p, axis=-1).mean(),
        "agreement": (q.argmax(-1) == p.argmax(-1)).mean(),
        "overlap": (q.argmax(-1) == p.argmax(-1)).mean(),  # k is 1 of 6
        "rank": np.mean([spearmanr(np.delete(q[i], y[i]), np.delete(p[i], y[i])).statistic for i in n]),
        "entropy": entropy(q, axis=-1).mean(),
        "entropy_gap": entropy(q, axis=-1).mean() - entropy(p, axis=-1).mean(),
    }
    wrong = p.argmax(-1) != y
    for key, hit in (("same", p.argmax(-1)), ("right", y)):
        true[f"mistakes_{key}"] = (q.argmax(-1) == hit)[wrong].mean()
    true["mistakes_other"] = 1 - true["mistakes_same"] - true["mistakes_right"]
    assert {key: figure["value"] for key, figure in found.items()} == pytest.approx(true, rel=1e-4)
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in found.values())


def test_a_student_that_is_its_teacher() -> None:
    labels = torch.randint(V, (30, 1), generator=torch.Generator().manual_seed(3))
    found = Fidelity().figures(evidence({"teacher": logits(0, length=1), "student distilled": logits(0, length=1)}, labels))
    model = found["models"]["student distilled"]
    assert (model["kl"]["value"], model["agreement"]["value"], model["mistakes_same"]["value"]) == (0, 1, 1)
    assert model["rank"]["value"] == pytest.approx(1)
    assert found["where"]["kl"] == {}
    blocks = shown(found)
    assert not of(Picture, blocks)
    assert "drafting" not in found  # of a classifier


def test_without_a_teacher_there_is_no_chapter() -> None:
    with pytest.raises(NotMeasured, match="no teacher"):
        Fidelity().figures(evidence({"student after": logits(0)}, torch.zeros(30, 8, dtype=torch.long)))


def test_what_cannot_be_measured_says_why() -> None:
    labels = torch.arange(30)[:, None] % 2
    blocks = shown(Fidelity().figures(evidence({"teacher": saying(labels, 2), "student distilled": logits(1, 30, 1, 2)}, labels)))
    missing = {block.what: block.why for block in of(Missing, blocks)}
    assert "the teacher makes none" in missing["agreement on the teacher's mistakes"]
    assert "of two classes one is wrong" in missing["the rank correlation of wrong classes"]


def test_what_is_said_and_shown(tmp_path: Path) -> None:
    figures = Fidelity().figures(language())
    blocks = shown(figures)
    first, draft = of(Note, blocks)
    ours = figures["models"]["student distilled"]
    assert f"{100 * ours['agreement']['value']:.1f} %" in first.text
    assert f"{ours['kl']['value']:.3f} nats" in first.text
    assert "times as fast" in draft.text
    table, mistakes, drafts = of(Grid, blocks)
    assert [row[0] for row in table.rows] == [row[0] for row in mistakes.rows] == [row[0] for row in drafts.rows]
    assert "top-1 overlap" not in table.head  # it is the agreement
    assert all(len(row) == len(grid.head) for grid in (table, mistakes, drafts) for row in grid.rows)
    where, speed = of(Picture, blocks)
    for number, figure in enumerate([*where.figure, speed.figure]):
        assert figure.axes[0].get_legend_handles_labels()[1] == ["student distilled"]  # and not the untrained one
        figure.savefig(tmp_path / f"{number}.png")


def test_a_sample_is_told() -> None:
    given = language()
    given = replace(given, observed=replace(given.observed, sample=np.arange(50)))
    assert "on 50 of 240 positions" in of(Grid, shown(Fidelity().figures(given)))[0].caption


def test_a_draft_that_does_not_pay_is_a_warning() -> None:
    run = {"models": {"teacher": {"parameters": 1000}, "student before": {"parameters": 990}, "student distilled": {"parameters": 990}}}
    notes = of(Note, shown(Fidelity().figures(language(run=run))))
    assert notes[-1].tone == "warning"
    assert "does not pay" in notes[-1].text
