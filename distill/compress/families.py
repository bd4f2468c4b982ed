"""Where an architecture keeps what can be cut out of it: its layers, the feed-forward network and the attention of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from distill.types import ConfigError


@dataclass(frozen=True)
class Family:
    """The names that architectures of one family share.

    Attributes:
        types: `model_type` of those that were looked at.
        layers: the list of layers, inside the base model.
        ffn_in: inside a layer, the linears whose rows are the neurons of the feed-forward network.
        ffn_out: the one whose columns they are.
        query, key, value: the linears whose rows are the heads.
        out: the one whose columns they are.
        head_dim: whether the config says how wide a head is; without it heads cannot be removed, for their width would follow their number.
    """

    types: tuple[str, ...]
    layers: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    query: str
    key: str
    value: str
    out: str
    head_dim: bool

    @property
    def attention(self) -> str:
        """The attention inside a layer: what holds the query's linear."""
        return self.query.rpartition(".")[0]


LLAMA = Family(
    types=("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "granite"),
    layers="layers",
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    out="self_attn.o_proj",
    head_dim=True,
)
BERT = Family(
    types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    layers="encoder.layer",
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    out="attention.output.dense",
    head_dim=False,
)


def family_of(model: PreTrainedModel) -> Family:
    """Find the family of a model.

    Raises:
        ConfigError: it is of another, whose parts nobody has looked at.
    """
    for family in (LLAMA, BERT):
        if model.config.model_type in family.types:
            return family
    known = ", ".join((*LLAMA.types, *BERT.types))
    raise ConfigError(
        f"neurons, heads and layers cannot be taken out of a model of type '{model.config.model_type}'; of these they can: {known}"
    )


def layers_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Give the layers, first to last."""
    layers = model.base_model.get_submodule(family_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return list(layers)


def linear(layer: nn.Module, name: str) -> nn.Linear:
    """Give a linear of a layer by its name there.

    Raises:
        ConfigError: it is something else.
    """
    found = layer.get_submodule(name)
    if not isinstance(found, nn.Linear):
        raise ConfigError(
            f"'{name}' is a {type(found).__name__}, not a linear layer of its own (a student of LowRank has two there), and rows and "
            "columns cannot be taken out of it; cut first and factor then, or take out layers"
        )
    return found
