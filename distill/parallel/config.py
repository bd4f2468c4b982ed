"""Reading a user's own DeepSpeed JSON."""

import json
from pathlib import Path
from typing import Any

from distill.types import ConfigError

# What the YAML sets already, and where
SET_ELSEWHERE = {
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clipping": "trainer.gradient_clip_val",
    "train_batch_size": "data.batch_size, trainer.accumulate_grad_batches and the number of ranks",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "optimizer": "model.optimizer",
    "scheduler": "model.optimizer.schedule",
    "fp16": "trainer.precision",
    "bf16": "trainer.precision",
}


def read_config(config: str | Path | dict[str, Any]) -> dict[str, Any]:
    """Read a DeepSpeed config; values `auto`, which other trainers fill in, are left to the trainer.

    Args:
        config: a JSON file or its content.

    Raises:
        ConfigError: no such file, no JSON, or a key that is set elsewhere.
    """
    name = "given" if isinstance(config, dict) else f"'{config}'"
    content = config if isinstance(config, dict) else _parse(Path(config))
    if not isinstance(content, dict):
        raise ConfigError(f"the DeepSpeed config {name} is a {type(content).__name__}; it must be a JSON object, e.g. {EXAMPLE}")
    content = _without_auto(content)
    if taken := [key for key in content if key in SET_ELSEWHERE]:
        fixes = "; ".join(f"{key} is set by {SET_ELSEWHERE[key]}" for key in taken)
        raise ConfigError(f"the DeepSpeed config {name} sets what the YAML sets: {fixes}. Leave it out of the config")
    if content.get("zero_optimization", {}).get("compute_grad_norm") is False:
        raise ConfigError(f"the DeepSpeed config {name} says zero_optimization.compute_grad_norm: false, which lets NaN into the weights")
    return content


EXAMPLE = '{"zero_optimization": {"stage": 2}}'


def _parse(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the DeepSpeed config '{path}': {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"the DeepSpeed config '{path}' is no JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(inner) for key, inner in value.items() if inner != "auto"}
    return value
