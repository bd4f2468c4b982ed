"""What is kept of a row depends on its content and the seed alone."""

from typing import Any

import pytest
import torch
from torch import nn

from distill.report.sources import targets
from distill.report.sources.targets import stored_rows
from distill.teachers.cached import CachedTeacher
from distill.teachers.padded import places
from distill.teachers.store import StoredRow
from distill.types import ConfigError, MixedTarget, Outputs, SparseTarget

CPU, V = torch.device("cpu"), 20


def rows(ids: list[list[int]], keep: CachedTeacher, labels: Any = None, taps: Any = None) -> list[StoredRow]:
    """Of a teacher whose logits at a position are a function of its token: `z_v = cos(token · v)`."""
    tokens = torch.tensor(ids)
    batch = {"input_ids": tokens, "labels": torch.ones_like(tokens) if labels is None else torch.tensor(labels)}
    logits = torch.cos(tokens[..., None] * torch.arange(V + 3.0))  # three columns of padding
    where = places(batch)
    return list(stored_rows(Outputs(logits, nn.Identity(), taps or {}), where, V, keep, CPU))


def test_draws_are_a_function_of_the_row_and_the_seed() -> None:
    keep = CachedTeacher("x", draws=8)
    together, alone = rows([[1, 2, 3], [1, 2, 4]], keep), rows([[1, 2, 4]], keep)
    same = lambda a, b: a.ids.shape == b.ids.shape and bool((a.ids == b.ids).all() and (a.probs == b.probs).all())
    assert same(together[1], alone[0]), "whatever batch it is in"
    assert not (together[0].ids[:2] == together[1].ids[:2, : together[0].ids.shape[1]]).all(), "rows with the same prefix are drawn apart"
    assert not same(rows([[1, 2, 4]], CachedTeacher("x", draws=8, seed=1))[0], alone[0])


def test_a_long_row_is_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [[1, 2, 3, 4, 5, 6, 7], [3, 3, 3, 1, 1, 1, 2]]
    labels = [[1, 1, -100, 1, 1, 1, 1], [-100] * 7]
    logits = torch.cos(torch.tensor(ids)[..., None] * torch.arange(V + 3.0))[0, [0, 1, 3, 4, 5, 6], :V].double()
    for size in (512, 2):
        monkeypatch.setattr(targets, "chunk_size", lambda classes, device, size=size: size)
        row, empty = rows(ids, CachedTeacher("x", k=V, draws=0, temperature=2.0), labels)
        dense = torch.zeros(6, V, dtype=torch.float64).scatter(-1, torch.from_numpy(row.ids).long(), torch.from_numpy(row.probs).double())
        assert torch.allclose(dense, (logits / 2).softmax(-1), atol=1e-6)
        assert (len(empty.ids), len(empty.tail)) == (0, 0), "a row without a label is a row"
        for draws in rows(ids, CachedTeacher("x", draws=16), labels)[:1]:
            assert draws.probs.sum(-1) == pytest.approx([1.0] * 6)


def test_a_teacher_that_does_not_know_all_classes_is_refused() -> None:
    tokens = torch.ones(1, 2, dtype=torch.long)
    where = places({"input_ids": tokens, "labels": tokens})
    sparse = SparseTarget(tokens[..., None], torch.full((1, 2, 1), 0.5), torch.full((1, 2), 0.5))
    for target in (sparse, MixedTarget((sparse, sparse), torch.full((1, 2, 2), 0.5), "apart")):
        with pytest.raises(ConfigError, match="knows all classes at once"):
            list(stored_rows(target, where, V, CachedTeacher("x"), CPU))


def test_the_mean_of_teachers_is_kept_as_such() -> None:
    """At T = 2 the mean of the softened distributions, which is not the softened mean."""
    z = torch.randn(2, 1, 3, V, generator=torch.Generator().manual_seed(0)) * 3
    mixed = MixedTarget(tuple(Outputs(each, nn.Identity()) for each in z), torch.full((1, 3, 2), 0.5), "probabilities")
    tokens = torch.ones(1, 3, dtype=torch.long)
    where = places({"input_ids": tokens, "labels": tokens})
    (row,) = stored_rows(mixed, where, V, CachedTeacher("x", k=V, draws=0, temperature=2.0), CPU)
    dense = torch.zeros(3, V).scatter(-1, torch.from_numpy(row.ids).long(), torch.from_numpy(row.probs))
    assert torch.allclose(dense, (z[:, 0] / 2).softmax(-1).mean(0), atol=1e-6)
