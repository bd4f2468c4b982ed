import pytest
import torch
from torch import nn

from distill.losses.chunked import chunked_objective
from distill.losses.divergence import ForwardKL
from distill.parallel.gather import gathered
from distill.parallel.sharded import sharded
from distill.tasks import CausalLM
from tests import pair
from tests.models import causal_lm, tokens
from tests.ranks import run_ranks


def held(model: nn.Module) -> int:
    """Bytes of weights that this rank has in memory."""
    whole = sum(p.untyped_storage().nbytes() for p in model.parameters())
    return whole + sum(p.ds_tensor.untyped_storage().nbytes() for p in model.parameters() if hasattr(p, "ds_tensor"))  # type: ignore[union-attr]


def both(strategy: str, dtype: torch.dtype) -> tuple[int, int, list[float]]:
    """Run a model whole and in shards, three times, its head in as many chunks as this rank has tokens."""
    trainer = pair.trainer(devices=2, strategy=strategy)
    trainer.strategy._lightning_module = pair.DistillModule.__new__(pair.DistillModule)
    trainer.strategy.setup_environment()
    model = causal_lm(num_hidden_layers=3).to(dtype).requires_grad_(False)
    other = causal_lm(seed=5)
    batch = {"input_ids": tokens(2, 6 + trainer.global_rank)}
    labels = batch["input_ids"].roll(-1, 1)
    labels[0, trainer.global_rank] = -100

    def objective() -> float:
        with torch.no_grad():
            student, teacher = CausalLM().outputs(other, batch), CausalLM().outputs(model, batch)
            with gathered(teacher.head):
                return float(chunked_objective(student, teacher, labels, {"kd": ForwardKL()}, {"kd": 1.0}, 40, chunk=1).total)

    before, value = held(model), objective()
    sharded(model, trainer.strategy, keep=0)
    values = [objective() for _ in range(3)]
    return before, held(model), [abs(v - value) for v in values]


@pytest.mark.parametrize(("strategy", "dtype"), [("ddp", torch.float32), ("ddp", torch.bfloat16)])
def test_half_the_memory_and_the_same_outputs(strategy: str, dtype: torch.dtype) -> None:
    for before, after, errors in run_ranks(both, 2, strategy, dtype):
        assert after <= 0.51 * before
        assert errors == [0.0, 0.0, 0.0]
