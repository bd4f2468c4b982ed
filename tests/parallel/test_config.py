import json
from pathlib import Path

import pytest

from distill.parallel.config import SET_ELSEWHERE, read_config
from distill.types import ConfigError


def write(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(content)
    return path


def test_a_file_and_a_dict_are_the_same_and_auto_is_left_out(tmp_path: Path) -> None:
    given = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
        "train_batch_size": "auto",
        "bf16": "auto",
    }
    expected = {"zero_optimization": {"stage": 2}}
    assert read_config(given) == read_config(write(tmp_path, json.dumps(given))) == expected


@pytest.mark.parametrize("key", SET_ELSEWHERE)
def test_what_the_yaml_sets_is_refused_with_the_key_to_use(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is set by (trainer|data|model)"):
        read_config({"zero_optimization": {"stage": 2}, key: 1})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the DeepSpeed config '.*none.json': No such file"):
        read_config(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"is no JSON: .* in line 2, column 1"):
        read_config(write(tmp_path, '{"a":\n'))
    with pytest.raises(ConfigError, match="is a list; it must be a JSON object"):
        read_config(write(tmp_path, "[1]"))


def test_the_check_for_nan_cannot_be_switched_off() -> None:
    with pytest.raises(ConfigError, match="compute_grad_norm"):
        read_config({"zero_optimization": {"stage": 2, "compute_grad_norm": False}})
