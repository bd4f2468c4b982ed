from dataclasses import replace

import numpy as np
import pytest

from distill.report.probes import where_kl
from tests.report.asked import language


def test_where_the_divergence_sits() -> None:
    np.testing.assert_allclose(where_kl.concentration(np.array([1.0, 0.0, 6.0, 3.0])), [0, 0.6, 0.9, 1, 1])
    assert where_kl.concentration(np.zeros(3)) is None
    given = language()
    against = given.observed.models["student distilled"].against
    assert against is not None
    teacher = replace(given.observed.teacher, entropy=np.arange(240)[::-1] / 100)
    student = replace(given.observed.models["student distilled"], against=replace(against, kl=np.arange(240.0)))
    observed = replace(given.observed, models={"teacher": teacher, "student distilled": student})
    found = where_kl.figures(observed, ["student distilled"])
    np.testing.assert_allclose(found["entropy"], [0.115 + 0.24 * i for i in range(10)])  # the surest first
    np.testing.assert_allclose(found["by_entropy"]["student distilled"], [227.5 - 24 * i for i in range(10)])
    assert found["half"]["student distilled"] == pytest.approx(1 - 0.5**0.5, abs=0.005)  # of an even rise
