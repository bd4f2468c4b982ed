"""Where a model's layers are: what layer maps, projectors and attention losses need to know, whatever the architecture calls them."""

from dataclasses import dataclass

from torch import nn

from distill.tasks import unwrap
from distill.types import ConfigError

PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


@dataclass(frozen=True)
class Layers:
    """The transformer layers of a model.

    Attributes:
        who: key of the model, for messages.
        blocks: dotted names of the layers, first to last.
        width: of the hidden states.
        heads: attention heads of a layer.
        attention: dotted name of the attention inside a layer, or None where it has no separate projections of query, key and value.
        projections: names of these three inside the attention, and the widths of their outputs.
        implementation: of the attention, e.g. `sdpa`; only `eager` gives attention maps.
    """

    who: str
    blocks: tuple[str, ...]
    width: int
    heads: int
    attention: str | None
    projections: tuple[tuple[str, int], ...]
    implementation: str

    @property
    def count(self) -> int:
        """How many layers there are; hidden states are numbered from 0, the embedding output, to this."""
        return len(self.blocks)

    def hidden(self, index: int) -> str:
        """The tap of hidden state `index`: 0 is what enters the first layer, i what leaves the i-th, before any final norm."""
        return f"{self.blocks[0]}:input" if index == 0 else self.blocks[index - 1]

    def attention_map(self, layer: int) -> str:
        """The tap of the attention probabilities `[B, heads, T, T]` of layer 1 … count.

        Raises:
            ConfigError: the model does not give them.
        """
        if self.implementation != "eager":
            raise ConfigError(
                f"{self.who} runs attention as '{self.implementation}', which gives no attention maps; set {self.who}.attn_implementation: "
                "eager, or take MiniLMRelations, which needs none"
            )
        return f"{self.blocks[layer - 1]}.{self._attention()}:1"

    def projection(self, layer: int, part: int) -> str:
        """The tap of the queries (part 0), keys (1) or values (2) of layer 1 … count, `[B, T, width]`, before any rotation.

        Raises:
            ConfigError: the model computes them in one fused projection.
        """
        return f"{self.blocks[layer - 1]}.{self._attention()}.{self.projections[part][0]}"

    def _attention(self) -> str:
        if self.attention is None:
            raise ConfigError(f"{self.who}: its layers have no separate projections of query, key and value; match hidden states instead")
        return self.attention


def layers_of(model: nn.Module, who: str) -> Layers:
    """Find the layers: the list of modules that is as long as the config says there are layers.

    Args:
        model: of transformers, possibly wrapped by peft.
        who: key of the model, for messages.

    Returns:
        The layers; none (`count` 0) where the architecture keeps them in no such list.
    """
    inner = unwrap(model)
    config = inner.config.get_text_config()
    count = config.num_hidden_layers
    lists = [(name, module) for name, module in inner.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    name, found = min(lists, key=lambda item: item[0].count("."), default=("", nn.ModuleList()))
    blocks = tuple(f"{name}.{i}" for i in range(len(found)))
    attention, projections = _attention(found[0]) if blocks else (None, ())
    return Layers(who, blocks, config.hidden_size, config.num_attention_heads, attention, projections, config._attn_implementation or "eager")


def _attention(block: nn.Module) -> tuple[str | None, tuple[tuple[str, int], ...]]:
    for name, module in block.named_modules():
        for parts in PROJECTIONS:
            if all(part in dict(module.named_children()) for part in parts):
                return name, tuple((part, int(module.get_submodule(part).out_features)) for part in parts)  # type: ignore[arg-type]
    return None, ()
