"""Operations and hours."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from distill.plan import speed
from tests.plan.jobs import LLAMA_1B, LLAMA_8B, job, shape

SMALL = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}


def test_operations_are_those_that_torch_counts() -> None:
    config = LLAMA_1B | SMALL | {"vocab_size": 128, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, 64, dtype=torch.long), use_cache=False).logits.sum().backward()
    plan = job(shape(config), batch=1, length=64)
    triangle = speed.forward_flops(plan.student, 64, causal=False) - speed.forward_flops(plan.student, 64)  # which eager attention computes
    counted = counter.get_total_flops() / 64
    # gains of norms are counted among the parameters, and multiply no matrix
    assert speed.flops_per_position(plan) + 3 * triangle == pytest.approx(counted, rel=0.01)


def test_a_teacher_adds_its_forward_pass_and_checkpointing_the_students_again() -> None:
    plan = job(shape(LLAMA_1B), batch=1, length=4096)
    assert speed.flops_per_position(plan) == pytest.approx(6 * 1.2358e9 + 3 * 2 * 16 * 2048 * 4096, rel=1e-4)
    teacher = shape(LLAMA_8B)
    more = speed.flops_per_position(replace(plan, teacher=teacher)) - speed.flops_per_position(plan)
    assert more == pytest.approx(2 * (8.03e9 - 128256 * 4096) + 2 * 32 * 4096 * 4096, rel=1e-3)
    again = speed.flops_per_position(replace(plan, checkpointing=True)) - speed.flops_per_position(plan)
    assert again == pytest.approx(2 * (1.2358e9 - 128256 * 2048) + 2 * 16 * 2048 * 4096, rel=1e-3)


def test_a_frozen_base_costs_no_gradient_of_its_weights() -> None:
    plan = job(shape(LLAMA_1B), batch=1, length=1)
    frozen = replace(plan, student=replace(plan.student, trainable=0))
    assert speed.flops_per_position(frozen) / speed.flops_per_position(plan) == pytest.approx(2 / 3)


def test_tokens_and_hours() -> None:
    plan = job(shape(LLAMA_1B), batch=4, length=1000, accumulate=2)
    found = speed.scaled(plan, 8, 100, seconds=2.0, device="this CPU")
    assert found.tokens_per_s == 8 * 4000 / 2
    assert found.hours == pytest.approx(100 * 2 * 2.0 / 3600)
    assert found.measured
    twice = speed.estimated(plan, 16, None, 100.0, 0.5).tokens_per_s / speed.estimated(plan, 8, None, 100.0, 0.5).tokens_per_s
    assert twice == 2
    assert speed.estimated(plan, 8, None, 100.0, 0.5).hours is None
