"""What a forward pass keeps, counted tensor by tensor."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from distill.plan import activations, models
from distill.tasks import CausalLM
from tests.plan.jobs import LLAMA_1B, job, shape

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "head_dim": 16}


def saved(precision: str, layers: int, length: int) -> int:
    """Bytes of the distinct storages that autograd saves, parameters aside."""
    config = AutoConfig.for_model(**(LLAMA_1B | SMALL | {"num_hidden_layers": layers}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if precision == "bf16-true" else torch.float32).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"),
    ):
        model.base_model(input_ids=torch.zeros(2, length, dtype=torch.long), use_cache=False)
    return sum(size for size, _ in seen.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_layer_keeps_what_autograd_saves(precision: str) -> None:
    per_layer = (saved(precision, 4, 64) - saved(precision, 2, 64)) / 2
    if precision == "bf16-mixed":  # casts of the weights are counted with the weights
        per_layer -= 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    plan = job(shape(LLAMA_1B | SMALL), precision=precision, batch=2, length=64)
    assert activations.of_layer(plan.student, plan) == per_layer / plan.positions


def test_with_checkpointing_a_layer_keeps_its_input() -> None:
    plan = job(shape(LLAMA_1B), checkpointing=True, batch=2, length=8)
    last = (4 + 4) * 2048
    assert activations.kept(plan) == 16 * (16 * 4 * 2048 + last)


def test_maps_grow_with_the_square_of_the_length() -> None:
    of = lambda length: activations.of_layer(replace(shape(LLAMA_1B), maps=True), job(shape(LLAMA_1B), length=length))
    assert of(200) - of(100) == 2 * 2 * 32 * 100


def test_the_workspace_of_the_logits_does_not_grow_with_the_tokens_but_for_the_features() -> None:
    plan = job(shape(LLAMA_1B), batch=8, length=4096, classes=128256, chunk=1024, block=256, terms=2)
    more = replace(plan, batch=16)
    assert activations.logits(more) - activations.logits(plan) == 8 * 4096 * 2048 * (4 + 4)
    dense = 2 * 4 * plan.positions * plan.classes
    assert activations.logits(plan) < dense / 10


def test_a_teacher_and_measured_norms_cost_a_chunk_each() -> None:
    plan = job(shape(LLAMA_1B), batch=1, length=4096, classes=1000, chunk=512, block=8, terms=3)
    chunk = 512 * 1000 * 2
    assert activations.logits(replace(plan, teacher=plan.student)) - activations.logits(plan) == chunk
    assert activations.logits(replace(plan, norms=True)) - activations.logits(plan) == 2 * chunk


def test_a_head_that_does_not_train_has_no_gradient() -> None:
    frozen = replace(shape(LLAMA_1B), head_trains=False)
    assert activations.head_gradient(job(frozen)) == (0, 0)


def test_models_are_built_without_memory() -> None:
    built = models.on_meta(CausalLM(), AutoConfig.for_model(**LLAMA_1B), None)
    assert {p.device.type for p in built.parameters()} == {"meta"}
