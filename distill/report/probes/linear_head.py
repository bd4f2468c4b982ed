"""The last linear layer of a model and what enters it, where its classes are decided by one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distill.report.evidence import NotMeasured
from distill.report.probes.perturb import at_rest
from distill.tasks import LogitHead, Task, unwrap
from distill.types import IGNORE_INDEX, Batch, Outputs


@dataclass(frozen=True)
class LinearHead:
    """`logits = x Wᵀ + b`, up to what moves no class before another, e.g. a softcap.

    Attributes:
        features: `[N, D]`, x of the valid positions.
        weight: `[V, D]`, W.
        bias: `[V]`, b, or None.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None


@torch.no_grad()
def linear_head(model: nn.Module, task: Task, batch: Batch, num_classes: int) -> LinearHead:
    """Find the linear layer that gives a model's logits, and run the model up to it.

    A language model's output embedding, its scale included: the softcap `c tanh(z / c)` grows with z, and so changes no decision. A
    classifier's last linear layer whose output is the logits, to the bit.

    Args:
        model: of transformers.
        task: how it is run.
        batch: on the model's device.
        num_classes: V; rows of the weights beyond it are left out.

    Raises:
        NotMeasured: no linear layer gives the logits.
    """
    inner = unwrap(model)
    names = [name for name, module in inner.named_modules() if isinstance(module, nn.Linear) and module.out_features == num_classes]
    of_classifier = [tap for name in names for tap in (name, f"{name}:input")] if task.unit == "sample" else []
    with at_rest(model):
        outputs = task.outputs(model, batch, of_classifier)
    valid = batch["labels"] != IGNORE_INDEX
    if isinstance(outputs.head, LogitHead):
        return _of_language_model(outputs.features[valid], outputs.head, num_classes)
    for name in reversed(names):
        features = _enters(name, outputs)
        if features is not None:
            layer: Any = inner.get_submodule(name)
            return LinearHead(features[valid[:, 0]], layer.weight, layer.bias)
    raise NotMeasured(f"no linear layer of {type(inner).__name__} gives its logits, so its margin has no closed form")


def _of_language_model(features: Tensor, head: LogitHead, num_classes: int) -> LinearHead:
    layer = head.projection
    if not isinstance(layer, nn.Linear):
        raise NotMeasured(f"the head is no linear layer but {type(layer).__name__}, so its margin has no closed form")
    bias = None if layer.bias is None else layer.bias[:num_classes] * head.scale
    return LinearHead(features, layer.weight[:num_classes] * head.scale, bias)


def _enters(name: str, outputs: Outputs) -> Tensor | None:
    """What enters a layer where its output is the logits: of the row as a whole, or of the one position that a decoder reads."""
    logits, out, entering = outputs.features[:, 0], outputs.taps.get(name), outputs.taps.get(f"{name}:input")
    if out is None or entering is None:
        return None
    if out.ndim == 2:
        return entering if torch.equal(out, logits) else None
    hits = (out == logits[:, None]).all(-1)
    return entering[torch.arange(len(hits)), hits.int().argmax(1)] if bool(hits.any(1).all()) else None
