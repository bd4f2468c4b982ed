from pathlib import Path
from typing import Any

import pytest
import torch

from distill.parallel import universal


def test_a_conversion_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.checkpoint import ds_to_universal

    def fill_the_disk(options: Any) -> None:
        (Path(options.output_folder) / "part.pt").write_bytes(b"1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ds_to_universal, "main", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        universal.convert(tmp_path / "from", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_every_group_gets_its_own_numbers_back_and_every_weight_its_own_count(tmp_path: Path) -> None:
    one, two = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.AdamW([{"params": [one], "weight_decay": 0.1}, {"params": [two], "weight_decay": 0.0}], lr=0.5)
    (one.sum() + two.sum()).backward()
    optimizer.step()
    saved = [{key: value for key, value in group.items() if key != "params"} | {"params": []} for group in optimizer.param_groups]
    (tmp_path / universal.TAG / "zero").mkdir(parents=True)
    torch.save({"param_groups": saved}, tmp_path / universal.TAG / "zero" / "optimizer_state.pt")
    optimizer.param_groups[1]["weight_decay"] = 0.1  # what stage 3 reads
    optimizer.state[two]["step"] = optimizer.state[one]["step"]
    universal._mend(optimizer, tmp_path)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    optimizer.step()
    assert [float(state["step"]) for state in optimizer.state.values()] == [2.0, 2.0], "counted once a step, not once a group"
