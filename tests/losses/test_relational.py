from itertools import permutations

import pytest
import torch
from torch import Tensor

from distill.losses.relational import RKDDistance, angles, distances, pooled, rkd_angle, rkd_distance, similarity_preserving
from distill.types import IGNORE_INDEX
from tests.losses.taps import Sample, count, labelled, make, mean_of

settings_RKDDistance = settings_RKDAngle = settings_SimilarityPreserving = [{}, {"layers": [[0, 0], [1, 3]]}]  # noqa: N816


def vectors(samples: list[Sample], i: int) -> tuple[list[Tensor], list[Tensor]]:
    """The mean over positions of every labelled sample, of student and teacher."""
    kept = labelled(samples)
    return [s.student[i].mean(0) for s in kept], [s.teacher[i].detach().mean(0) for s in kept]


def huber(a: Tensor, b: Tensor) -> Tensor:
    """½ (a − b)² where |a − b| ≤ 1, else |a − b| − ½."""
    gap = (a - b).abs()
    return gap**2 / 2 if gap <= 1 else gap - 0.5


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def reference_RKDDistance(samples: list[Sample], parameters: dict[str, Tensor], **_: object) -> Tensor:  # noqa: N802
    """The mean over pairs of l(|t_i − t_j| / μ_t, |s_i − s_j| / μ_s), times the number of labels."""

    def one(i: int) -> Tensor:
        s, t = vectors(samples, i)
        order = list(permutations(range(len(s)), 2))
        far_s, far_t = ([(x[a] - x[b]).norm() for a, b in order] for x in (s, t))
        values = [huber(b / _mean(far_t), a / _mean(far_s)) for a, b in zip(far_s, far_t, strict=True)]
        return count(samples) * _mean(values)

    return mean_of(samples, one)


def reference_RKDAngle(samples: list[Sample], parameters: dict[str, Tensor], **_: object) -> Tensor:  # noqa: N802
    """The mean over triplets of l(cos ∠ t_i t_j t_k, cos ∠ s_i s_j s_k), times the number of labels."""

    def cosine(x: list[Tensor], i: int, j: int, k: int) -> Tensor:
        a, b = x[i] - x[j], x[k] - x[j]
        return a.dot(b) / (a.norm() * b.norm())

    def one(i: int) -> Tensor:
        s, t = vectors(samples, i)
        return count(samples) * _mean([huber(cosine(t, *three), cosine(s, *three)) for three in permutations(range(len(s)), 3)])

    return mean_of(samples, one)


def reference_SimilarityPreserving(samples: list[Sample], parameters: dict[str, Tensor], **_: object) -> Tensor:  # noqa: N802
    """1/b² Σ_ij (G_t,ij − G_s,ij)², G_ij = x_i·x_j / √Σ_k (x_i·x_k)², times the number of labels."""

    def rows(x: list[Tensor]) -> list[Tensor]:
        gram = [torch.stack([a.dot(b) for b in x]) for a in x]
        return [row / row.norm() for row in gram]

    def one(i: int) -> Tensor:
        s, t = vectors(samples, i)
        pairs = [(a - b) ** 2 for ours, theirs in zip(rows(s), rows(t), strict=True) for a, b in zip(ours, theirs, strict=True)]
        return count(samples) * _mean(pairs if len(s) > 1 else [])

    return mean_of(samples, one)


def test_by_hand() -> None:
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])  # sides 3, 4, 5 with mean 4
    torch.testing.assert_close(distances(triangle), torch.tensor([[0, 3, 4], [3, 0, 5], [4, 5, 0]]) / 4)
    cosines = angles(triangle)
    assert [cosines[0, 1, 2].item(), cosines[1, 0, 2].item(), cosines[2, 0, 1].item()] == [pytest.approx(x) for x in (0, 0.6, 0.8)]
    line = torch.tensor([[0.0], [1.0], [2.0]])  # distances 1, 1, 2 with mean 4/3
    by_hand = ((3 / 4 - 3 / 4) ** 2 + (1 - 6 / 4) ** 2 + (5 / 4 - 3 / 4) ** 2) / 3 / 2
    assert rkd_distance(line, triangle).item() == pytest.approx(by_hand)
    # student's cosines: 1 at both ends, −1 in the middle; there the distance to 0.6 is more than 1
    assert rkd_angle(line, triangle).item() == pytest.approx(((1 - 0) ** 2 / 2 + (1.6 - 0.5) + (1 - 0.8) ** 2 / 2) / 3)
    orthogonal, same = torch.eye(2), torch.ones(2, 2)
    assert similarity_preserving(orthogonal, same).item() == pytest.approx(2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4)


def test_relations_know_no_scale_or_rotation() -> None:
    x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = 7 * x @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    for relation in (rkd_distance, rkd_angle, similarity_preserving):
        assert relation(x, turned).item() == pytest.approx(0, abs=1e-20)


def test_a_sample_is_the_mean_of_its_real_tokens() -> None:
    tap = torch.arange(8.0).view(2, 4, 1)
    batch = {"labels": torch.tensor([[1], [2]]), "attention_mask": torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])}
    assert pooled(tap, batch).tolist() == [[0.5], [6.0]]
    batch["labels"][0] = IGNORE_INDEX
    assert pooled(tap, batch).tolist() == [[6.0]]


def test_documents_of_a_packed_row_are_samples() -> None:
    labels = torch.tensor([[1, IGNORE_INDEX, 3, 4, IGNORE_INDEX, IGNORE_INDEX]])
    batch = {"labels": labels, "position_ids": torch.tensor([[0, 1, 0, 1, 0, 1]])}
    assert pooled(torch.arange(6.0).view(1, 6, 1), batch).tolist() == [[0.5], [2.5]]


def test_points_that_coincide_have_a_finite_gradient() -> None:
    other = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for relation in (rkd_distance, rkd_angle, similarity_preserving):
        for points in (torch.ones(4, 3), torch.zeros(4, 3), torch.cat([other[:2], other[:2]])):
            leaf = points.clone().requires_grad_()
            relation(leaf, other).backward()
            assert leaf.grad is not None
            assert leaf.grad.abs().max() < 1e3


def test_what_was_matched_is_said() -> None:
    assert make(RKDDistance).summary() == ["student layer 2 ↔ teacher layer 4, no projector"]
