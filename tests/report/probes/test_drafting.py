import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from distill.report.evidence import Subject
from distill.report.page.blocks import Missing
from distill.report.probes import drafting
from distill.types import Outputs
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


def test_the_draft_by_the_time_of_one_token() -> None:
    """A model that sleeps four times as long costs four times as much, whatever its parameters are."""
    given, seen = language(), []

    def slow(seconds: float, batch: Any) -> Outputs:
        seen.append(batch["input_ids"].shape)
        time.sleep(seconds)
        return Outputs(torch.zeros(*batch["input_ids"].shape, 6), nn.Identity())

    times = {"teacher": 0.02, "student before": 0.005, "student distilled": 0.005}
    subjects = {name: Subject(partial(slow, seconds), nn.Linear(1, 1)) for name, seconds in times.items()}
    subjects["student before"] = given.subjects["student before"]  # no module: by parameters
    given = replace(given, subjects=subjects, batches=[{"input_ids": torch.zeros(3, 8).long()}])
    found = drafting.costs_of(given, ["student before", "student distilled"])
    assert found["student distilled"]["source"] == "the time of one token"
    assert 0.2 < found["student distilled"]["value"] < 0.5
    assert found["student before"]["source"] == "parameters"
    assert set(seen) == {(1, 1)}


def test_a_draft_of_unknown_cost_has_an_acceptance_rate_all_the_same() -> None:
    found = drafting.figures(language(run={}), ["student distilled"])["student distilled"]
    assert "value" in found["acceptance"]
    assert "is no model in this process" in found["cost"]["missing"]
    blocks = drafting.blocks({"student distilled": found}, "student distilled", {})
    assert isinstance(blocks[0], Missing)
