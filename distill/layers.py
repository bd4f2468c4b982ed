"""Where a model's layers are: what layer maps, projectors and attention losses need to know, whatever the architecture calls them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer
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
        attention: dotted name of the attention inside a layer, or None where there is none.
        projections: names of the projections of query, key and value inside the attention, and the widths of their outputs; empty where
            one fused projection computes all three.
        implementation: of the attention, e.g. `sdpa`; only `eager` gives attention maps.
        widths: dotted name of every submodule that has weights to the width of its output, as far as the weights tell.
    """

    who: str
    blocks: tuple[str, ...]
    width: int
    heads: int
    attention: str | None
    projections: tuple[tuple[str, int], ...]
    implementation: str
    widths: Mapping[str, int] = field(default_factory=dict, repr=False, hash=False)

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
        if self.attention is None:
            raise ConfigError(f"{self.who}: there is no attention in its layers; match hidden states instead")
        return f"{self.blocks[layer - 1]}.{self.attention}:1"

    def projection(self, layer: int, part: int) -> str:
        """The tap of the queries (part 0), keys (1) or values (2) of layer 1 … count, `[B, T, width]`, before any rotation.

        Raises:
            ConfigError: the model computes them in one fused projection.
        """
        if not self.projections:
            raise ConfigError(f"{self.who}: its layers have no separate projections of query, key and value; match hidden states instead")
        return f"{self.blocks[layer - 1]}.{self.attention}.{self.projections[part][0]}"


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
    widths = {name: width for name, module in inner.named_modules() if name and (width := _width(module))}
    implementation = config._attn_implementation or "eager"
    return Layers(
        who, blocks, config.hidden_size, getattr(config, "num_attention_heads", 0), attention, projections, implementation, widths
    )


def _attention(block: nn.Module) -> tuple[str | None, tuple[tuple[str, int], ...]]:
    for name, module in block.named_modules():
        for parts in PROJECTIONS:
            if all(part in dict(module.named_children()) for part in parts):
                return name, tuple((part, int(module.get_submodule(part).out_features)) for part in parts)
    fused = (name for name, module in block.named_modules() if type(module).__name__.endswith("Attention"))
    return next(fused, None), ()


def _width(module: nn.Module) -> int | None:
    """The width of a module's output: of its weight, or of its last child that has one; a wrong guess is found at the first forward."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, nn.Linear):
        return module.out_features  # the weight itself may be packed or sharded
    weight = module._parameters.get("weight")
    if weight is not None:
        return weight.shape[-1] if weight.ndim <= 2 else None  # norms, embeddings, and the transposed linear layer of GPT-2
    return next((width for child in reversed(list(module.children())) if (width := _width(child))), None)
