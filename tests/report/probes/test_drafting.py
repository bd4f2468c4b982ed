import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distill.report.page.blocks import Missing
from distill.report.probes import drafting
from tests.report.asked import language, logits


def test_the_draft_by_parameters() -> None:
    found = drafting.figures(language(), ["student distilled"])["student distilled"]
    assert found["cost"] == {"value": 0.1, "source": "parameters"}
    alpha = found["acceptance"]["value"]
    q, p = ((z.flatten(0, 1).softmax(-1)) for z in (logits(0) + 0.3 * logits(2), logits(0)))
    assert alpha == pytest.approx(torch.minimum(p, q).sum(-1).mean().item(), rel=1e-5)
    times = [sum(alpha**i for i in range(g + 1)) / (1 + 0.1 * g) for g in range(17)]
    np.testing.assert_allclose([each["value"] for each in found["speed_up"]], times)
    assert found["best_gamma"] == int(np.argmax(times))
    assert found["tokens_per_call"] == pytest.approx(sum(alpha**i for i in range(found["best_gamma"] + 1)))
    low = found["acceptance"]["low"]
    assert found["speed_up"][3]["low"] == pytest.approx(sum(low**i for i in range(4)) / 1.3)
    assert found["along_text"][0] == 1
    assert found["along_text"][9] is None  # rows are 8 tokens long


def test_the_draft_by_measured_latencies(tmp_path: Path) -> None:
    cost = {"models": {"teacher": {"latency_ms": 8.0}, "student": {"latency_ms": 2.0}}}
    (tmp_path / "cost.json").write_text(json.dumps(cost))
    given = language(folder=tmp_path)
    assert drafting.cost_of(given, "student distilled") == {"value": 0.25, "source": "measured latencies"}
    assert drafting.cost_of(given, "student before") == {"value": 0.1, "source": "parameters"}


def test_a_draft_of_unknown_cost_has_an_acceptance_rate_all_the_same() -> None:
    found = drafting.figures(language(run={}), ["student distilled"])["student distilled"]
    assert "value" in found["acceptance"]
    assert "`distill cost` measures them" in found["cost"]["missing"]
    blocks = drafting.blocks({"student distilled": found}, "student distilled", {})
    assert isinstance(blocks[0], Missing)
