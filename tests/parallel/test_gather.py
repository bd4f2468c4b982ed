from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from distill.parallel.gather import gathered, whole
from tests import pair
from tests.parallel import runs
from tests.ranks import run_ranks


class Counts(pair.pl.Callback):
    """Counts how often the head is gathered, by ZeRO-3 and by us, and how often it is applied."""

    def __init__(self) -> None:
        self.gathers = self.calls = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        head = pl_module.student.lm_head.weight
        for parameter in pl_module.parameters():
            for name in ("all_gather", "all_gather_coalesced"):
                setattr(parameter, name, self._counted(getattr(parameter, name), head, parameter))
        linear = torch.nn.functional.linear

        def counted(features: Any, weight: Any, bias: Any = None) -> Any:
            self.calls += weight is head
            return linear(features, weight, bias)

        torch.nn.functional.linear = counted  # type: ignore[assignment]

    def _counted(self, gather: Any, head: nn.Parameter, parameter: nn.Parameter) -> Any:
        def counted(params: Any = None, *args: Any, **kwargs: Any) -> Any:
            params = kwargs.get("param_list", params)
            self.gathers += any(p is head for p in params or [parameter])
            return gather(**kwargs) if params is kwargs.get("param_list") else gather(params, *args, **kwargs)

        return counted


def train(folder: Path) -> tuple[int, int, int, list[float]]:
    counts, record = Counts(), runs.Record()
    module = runs.rich(folder, student=pair.FromConfig(pair.STUDENT | {"tie_word_embeddings": False}), chunk=2)
    trainer = runs.trainer("ZeRO-3", 2, max_steps=4, callbacks=[counts, record])
    trainer.fit(module, datamodule=pair.data(folder, batch_size=2, seed=1))
    return counts.gathers, counts.calls, len(list(module.student.parameters())), record.losses  # type: ignore[union-attr]


def alone(folder: Path) -> list[float]:
    record = runs.Record()
    module = runs.rich(folder, student=pair.FromConfig(pair.STUDENT | {"tie_word_embeddings": False}), chunk=2)
    runs.trainer("auto", 1, max_steps=4, callbacks=[record]).fit(module, datamodule=pair.data(folder, batch_size=4, seed=1))
    return record.losses


@pytest.mark.slow
def test_a_head_is_gathered_once_a_micro_batch_however_many_chunks_it_is_applied_to(tmp_path: Path) -> None:
    pair.data(tmp_path, batch_size=4)
    expected = run_ranks(alone, 1, tmp_path)[0]
    (one, calls, _, losses), (two, others, _, _) = run_ranks(train, 2, tmp_path)
    assert one == two == 4 * 2
    assert calls != others  # the ranks have different numbers of chunks, which hung before
    assert min(calls, others) > 4 * one
    assert losses == pytest.approx(expected, abs=1e-6)


def test_nothing_is_done_where_nothing_is_in_parts() -> None:
    called: list[int] = []
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda *_: called.append(1))
    with gathered(module) as same, whole(module.parameters()):
        same(torch.zeros(1, 2))
    assert same is module
    assert called == [1]
