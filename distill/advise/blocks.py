"""Two layers of the model's own shapes in every runtime that is here, timed in turn: what is fast on this machine, in a minute."""

import copy
import io
import logging as py_logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from distill.compress.families import family_of
from distill.compress.structured import head_dim
from distill.export.base import Format, Source
from distill.export.driver import all_formats
from distill.report.costs import cost
from distill.report.costs.served import logits_of
from distill.students.sizes import sizes_of, smaller_config
from distill.tasks import Task
from distill.types import Batch, DistillError

LAYERS = 2  # one alone would be half overhead
VOCABULARY = 1024  # the head's time is the whole model's, not the layers'
LARGEST = 60_000_000  # parameters of a layer that is exported within a minute
EXPORTS = ("openvino:fp32", "openvino:int8", "onnx:int8", "onnx:int4", "torchao:int8-dynamic", "torchao:int8", "torchao:int4")
ROUNDS = 15
WHOLE = "whole"


def small_config(config: Any, layers: int = LAYERS) -> Any:
    """A model's config with few layers and a small vocabulary, its layers' shapes unchanged."""
    found = copy.deepcopy(config)
    text = found.get_text_config()
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: text.num_hidden_layers]
    text.vocab_size = min(VOCABULARY, text.vocab_size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if getattr(text, name, None) is not None:  # they must be rows of the small embedding
            setattr(text, name, 0)
    return found


def random_batch(config: Any, rows: int, length: int, device: str = "cpu", below: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Rows of random ids, none of them padding."""
    ids = torch.randint(1, min(below, config.get_text_config().vocab_size), (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(device), "attention_mask": torch.ones_like(ids).to(device)}


def measure(
    task: Task, config: Any, length: int, device: str, whole: cost.Run | None = None, rounds: int = ROUNDS
) -> tuple[dict[str, float], dict[str, str]]:
    """Time two layers as they are and in other forms, one row at a time, in turn with the whole model.

    Args:
        task: of the model.
        config: of the whole model.
        length: positions of the row.
        device: `cpu` or `cuda`; exported graphs run on the CPU and are left out on a GPU.
        whole: the model itself; None where it does not fit into memory.
        rounds: how often each is timed.

    Returns:
        Milliseconds of `whole`, and of one layer by form: `fp32`, `bf16`, `half the neurons`, `90 % zeros`, and the exports; and why others
        are missing.
    """
    small = small_config(config)
    model: Any = task.build(small).eval().to(device)
    candidates = _in_torch(task, model, device)
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as place:
        if device == "cuda":
            missing |= dict.fromkeys(EXPORTS, "exported graphs run on the CPU; give this a machine without a GPU to look at them")
        elif sum(p.numel() for p in model.parameters()) > LARGEST * LAYERS:
            missing |= dict.fromkeys(EXPORTS, f"a layer of more than {LARGEST / 1e6:.0f}M parameters is not exported within a minute")
        else:
            missing |= _exported(task, model, small, length, Path(place), candidates)
        one = random_batch(small, 1, length, device)
        with torch.inference_mode():
            if whole is not None:
                candidates[WHOLE] = whole
            found = cost.measure({name: cost.Candidate(run) for name, run in candidates.items()}, one, one, rounds)
    layers = small.get_text_config().num_hidden_layers
    return {name: each.latency_ms / (1 if name == WHOLE else layers) for name, each in found.items()}, missing


def _in_torch(task: Task, model: PreTrainedModel, device: str) -> dict[str, cost.Run]:
    runs: dict[str, cost.Run] = {"fp32": partial(logits_of, model)}
    runs["bf16"] = partial(logits_of, copy.deepcopy(model).to(torch.bfloat16))
    runs["90 % zeros"] = partial(logits_of, _with_zeros(model, 0.9))
    try:
        family_of(model)
    except DistillError:
        return runs
    whole = sizes_of(model)
    fewer = replace(whole, intermediate=whole.intermediate // 2)
    half = smaller_config(model.config, fewer, list(range(whole.layers)), head_dim(model))
    runs["half the neurons"] = partial(logits_of, task.build(half).eval().to(device))
    return runs


@torch.no_grad()
def _with_zeros(model: PreTrainedModel, share: float) -> PreTrainedModel:
    found = copy.deepcopy(model)
    for module in found.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(torch.rand_like(module.weight) >= share)
    return found


def _exported(task: Task, model: Any, config: Any, length: int, place: Path, candidates: dict[str, cost.Run]) -> dict[str, str]:
    """Export to each format and load it again; gives why some could not be."""
    rows: list[Batch] = [random_batch(config, 2, length) for _ in range(4)]
    nobody: Any = None
    source = Source(model, nobody, task, lambda: rows, {})  # a tokenizer is for what is shipped
    missing: dict[str, str] = {}
    logging.disable_progress_bar()
    for name in EXPORTS:
        print(f"measuring {name} on {LAYERS} layers …", file=sys.stderr, flush=True)
        kind, _, precision = name.partition(":")
        made: Format = all_formats()[kind](precision)
        folder = place / name.replace(":", "-")
        folder.mkdir()
        try:
            with _quiet():
                made.check(source)
                made.write(source, folder)
                candidates[name] = made.load(folder, task)
        except DistillError as error:
            missing[name] = str(error)
    return missing


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print and log of their own workings."""
    before = py_logging.root.manager.disable
    py_logging.disable(py_logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        py_logging.disable(before)


def gains(layer_ms: Mapping[str, float]) -> dict[str, float]:
    """Speed of every form, × the float32 layer in PyTorch."""
    return {name: layer_ms["fp32"] / ms for name, ms in layer_ms.items() if name not in ("fp32", WHOLE)}
