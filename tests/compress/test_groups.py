import pytest
import torch
from torch import Tensor

from distill.compress.factors import put_factors
from distill.compress.groups import choose, groups_of, kept_groups, loadable_counts
from distill.compress.structured import heads_config
from distill.types import ConfigError
from tests.compress.test_structured import new


def scores_of(model: torch.nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight.detach().abs() for name in names}


def test_a_neuron_is_worth_the_sum_of_its_rows_and_its_column() -> None:
    model = new("llama")
    group = groups_of(model, "neurons")[1]
    mlp = model.model.layers[1].mlp
    gate, up, down = (linear.weight.detach().abs() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    wanted = [float(gate[j].sum() + up[j].sum() + down[:, j].sum()) for j in range(20)]
    assert group.worth(scores_of(model, group.linears)).tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_group_of_heads_is_worth_its_queries_key_value_and_output() -> None:
    model = new("qwen2")
    group, attention = groups_of(model, "kv_groups")[0], model.model.layers[0].self_attn
    query, key, value, out = (getattr(attention, f"{name}_proj").weight.detach().abs() for name in "qkvo")
    two, one = [slice(8 * g, 8 * g + 8) for g in range(3)], [slice(4 * i, 4 * i + 4) for i in range(6)]
    wanted = [float(query[two[g]].sum() + key[one[g]].sum() + value[one[g]].sum() + out[:, two[g]].sum()) for g in range(3)]
    assert group.worth(scores_of(model, group.linears)).tolist() == pytest.approx(wanted, rel=1e-5)
    head = groups_of(model, "heads")[0]
    wanted = [float(query[one[h]].sum() + out[:, one[h]].sum()) for h in range(6)]
    assert head.worth(scores_of(model, head.linears)).tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_layer_is_worth_all_its_linears() -> None:
    model = new("bert")
    group = groups_of(model, "layers")[2]
    linears = [module for module in model.bert.encoder.layer[2].modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == 6
    assert group.worth(scores_of(model, group.linears)).item() == pytest.approx(
        sum(float(m.weight.detach().abs().sum()) for m in linears), rel=1e-5
    )


def test_as_many_stay_in_each_layer_and_in_each_group() -> None:
    worths = [torch.tensor([5.0, 1.0, 2.0, 9.0, 8.0, 7.0]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])]
    assert [kept.int().tolist() for kept in choose(worths, "neurons", 6, 3)] == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert [kept.int().tolist() for kept in choose(worths, "heads", 3, 1)] == [[1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]]
    assert [kept.item() for kept in choose([torch.tensor([w]) for w in (3.0, 1.0, 2.0)], "layers", 3, 2)] == [True, False, True]


def test_only_as_many_stay_as_transformers_can_load() -> None:
    """Llama wants a hidden size (24) that its heads divide, so 5 of 6 groups are no choice, and 6 stay."""
    assert kept_groups(new("llama", num_key_value_heads=6), "kv_groups", 0.2) == 6
    assert kept_groups(new("mistral", num_key_value_heads=6), "kv_groups", 0.2) == 5
    assert kept_groups(new("llama", num_key_value_heads=6), "kv_groups", 0.5) == 3
    assert kept_groups(new("llama"), "neurons", 0.5) == 10
    assert kept_groups(new("llama"), "layers", 0.9) == 1
    assert kept_groups(new("llama"), "heads", 0.0) == 2, "of each group of 2"


def test_without_grouped_queries_a_head_is_a_group() -> None:
    model = new("llama", num_key_value_heads=6)
    assert groups_of(model, "heads") == groups_of(model, "kv_groups")


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="a single one of its kv_groups"):
        groups_of(new("llama", num_key_value_heads=1), "kv_groups")
    with pytest.raises(ConfigError, match="computes the width of a head"):
        groups_of(new("bert"), "heads")
    assert heads_config(new("qwen2"), 4, 2) == {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}


def test_numbers_that_transformers_can_load() -> None:
    """Llama's hidden size of 24 is divided by 1, 2, 3 and 4 of 6 heads."""
    assert loadable_counts(new("llama", num_key_value_heads=6), "kv_groups") == [1, 2, 3, 4]


def test_factored_layers_cannot_be_cut() -> None:
    model = new("llama")
    put_factors(model, {"model.layers.0.mlp.gate_proj": 2})
    with pytest.raises(ConfigError, match=r"'mlp\.gate_proj' is a Factored, not a linear layer of its own"):
        groups_of(model, "neurons")
    assert len(groups_of(model, "heads")) == len(groups_of(model, "layers")) == 3, "what is not factored can"
