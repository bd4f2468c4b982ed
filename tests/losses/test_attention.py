from dataclasses import replace

import pytest
import torch
from torch import Tensor

from distill.losses.attention import AttentionMaps, MiniLMRelations, documents, relations, visible
from distill.losses.base import Loss
from distill.types import ConfigError
from tests.losses.taps import Sample, make, mean_of, student_layers, teacher_layers

settings_AttentionMaps = [{}, {"layers": [[1, 2], [2, -1]]}]  # noqa: N816
settings_MiniLMRelations = [{"relation_heads": 2}, {"relation_heads": 4, "layers": [[1, 2], [-1, -1]]}, {"relation_heads": 1}]  # noqa: N816


def reference_AttentionMaps(samples: list[Sample], parameters: dict[str, Tensor], **_: object) -> Tensor:  # noqa: N802
    """The sum over queries of the mean over heads and keys of (a − b)²."""

    def one(i: int) -> Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for sample in samples:
            for q, weight in enumerate(sample.weights()):
                for ours, theirs in zip(sample.student[i], sample.teacher[i].detach(), strict=True):
                    for k in range(sample.length):
                        value = value + weight * (ours[q, k] - theirs[q, k]) ** 2 / (sample.length * len(sample.student[i]))
        return value

    return mean_of(samples, one)


def reference_MiniLMRelations(  # noqa: N802
    samples: list[Sample], parameters: dict[str, Tensor], relation_heads: int, **_: object
) -> Tensor:
    """The sum over queries, and over Q, K and V, of 1/A Σ_a Σ_k p_k log(p_k / q_k), with softmax(x_q · x_k / √d) in every slice."""

    def log_relation(x: Tensor, a: int, q: int) -> Tensor:
        d = x.shape[1] // relation_heads
        part = x[:, a * d : (a + 1) * d]
        scores = part @ part[q] / d**0.5
        return scores - scores.exp().sum().log()

    def one(i: int) -> Tensor:
        value = torch.zeros((), dtype=torch.float64)
        for sample in samples:
            for q, weight in enumerate(sample.weights()):
                for a in range(relation_heads):
                    log_q, log_p = log_relation(sample.student[i], a, q), log_relation(sample.teacher[i].detach(), a, q)
                    value = value + weight / relation_heads * (log_p.exp() * (log_p - log_q)).sum()
        return value

    return 3 * mean_of(samples, one)  # three taps belong to one pair of layers


def test_documents_start_where_positions_do() -> None:
    labels = torch.zeros(2, 5)
    assert documents({"labels": labels}, 2, 5).tolist() == [[0] * 5, [1] * 5]
    positions = torch.tensor([[0, 1, 0, 1, 2], [0, 0, 1, 2, 3]])
    assert documents({"labels": labels, "position_ids": positions}, 2, 5).tolist() == [[0, 0, 1, 1, 1], [2, 3, 3, 3, 3]]
    cut = torch.tensor([[3, 4, 0, 1, 2]])  # a row that begins in the middle is a document all the same
    assert documents({"labels": labels[:1], "position_ids": cut}, 1, 5).tolist() == [[0, 0, 1, 1, 1]]


def test_visible_keys() -> None:
    batch = {"labels": torch.zeros(1, 4), "attention_mask": torch.tensor([[0, 1, 1, 0]])}
    assert visible(batch, 1, 4).int().tolist() == [[[1, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 1]]]
    batch = {"labels": torch.zeros(1, 4), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    assert visible(batch, 1, 4).int().tolist() == [[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]]


def test_relations_are_the_attention_of_torch() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    heads = x.unflatten(-1, (2, 4)).transpose(1, 2)
    eye = torch.eye(5, dtype=torch.float64).expand(2, 2, 5, 5)  # values of the identity give the probabilities
    expected = torch.nn.functional.scaled_dot_product_attention(heads, heads, eye)
    everything = torch.ones(2, 5, 5, dtype=torch.bool)
    torch.testing.assert_close(relations(x, 2, everything).exp().transpose(1, 2), expected)


def test_what_was_matched_is_said() -> None:
    assert make(AttentionMaps).summary() == [
        "attention of student layer 1 ↔ teacher layer 2, 2 heads",
        "attention of student layer 2 ↔ teacher layer 4, 2 heads",
    ]
    loss = make(MiniLMRelations, {"relation_heads": 4})
    assert loss.summary() == ["relations of student layer 2 ↔ teacher layer 4, 4 relation heads"]
    assert loss.student_taps == ("layers.1.attn.q", "layers.1.attn.k", "layers.1.attn.v")
    assert loss.teacher_taps == ("layers.3.attn.q", "layers.3.attn.k", "layers.3.attn.v")


def test_models_whose_maps_cannot_be_compared() -> None:
    with pytest.raises(ConfigError, match=r"model\.losses\.it: the student has 3 attention heads and the teacher 2"):
        make(AttentionMaps, student=replace(student_layers(), heads=3))
    with pytest.raises(ConfigError, match=r"model\.teacher runs attention as 'sdpa'.*set model\.teacher\.attn_implementation: eager"):
        make(AttentionMaps, teacher=replace(teacher_layers(), implementation="sdpa"))
    with pytest.raises(ConfigError, match="no attention in its layers"):
        make(AttentionMaps, student=replace(student_layers(), attention=None))


def test_relation_heads_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"it\.relation_heads: 3 does not divide .* \[8, 4, 4, 12, 8, 8\] .* take one of \[1, 2, 4\]"):
        make(MiniLMRelations, {"relation_heads": 3})
    with pytest.raises(ConfigError, match=r"relation_heads: 0 does not divide"):
        make(MiniLMRelations, {"relation_heads": 0})
    with pytest.raises(ConfigError, match="no separate projections"):
        make(MiniLMRelations, {"relation_heads": 2}, teacher=replace(teacher_layers(), projections=()))


@pytest.mark.parametrize(("cls", "given"), [(AttentionMaps, {}), (MiniLMRelations, {"relation_heads": 2})])
def test_the_embeddings_have_no_attention(cls: type[Loss], given: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"it\.layers: student layer 0 is out of range; there are 1 to 2, or -2 to -1"):
        make(cls, {"layers": [[0, 1]], **given})
