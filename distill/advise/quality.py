"""What rounding costs this very model, on a text of the person's own: a few forward passes, no training."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from distill import hub
from distill.advise.parts import Loss
from distill.compress.ptq import ptq
from distill.exact import cast
from distill.export.compare import compare
from distill.report.costs.served import logits_of
from distill.tasks import Task
from distill.types import Batch, ConfigError, DataError

SCHEMES = ("bf16", "int8", "int4")
ROWS, BATCH = 32, 8


def rounded(task: Task, teacher: str, file: str, length: int) -> dict[str, Loss]:
    """Round the teacher's weights and compare with itself.

    A language model: its mean loss on the next token, rounded minus float, in nats. A classifier, for a text has no labels: the share of
    rows whose top-1 changes, in points; no more than that can be lost.

    Args:
        task: of the teacher.
        teacher: its folder or hub id, with weights.
        file: plain text; a classifier reads one row a line.
        length: tokens of a row.

    Returns:
        The loss by precision, `bf16`, `int8` and `int4` (which is left out where its groups do not fit).

    Raises:
        ConfigError: the file or the model cannot be read.
        DataError: the text is too short.
    """
    if not Path(file).is_file():
        raise ConfigError(f"--data: there is no file '{file}'; give a plain text, or leave it out to take estimates")
    tokenizer: Any = hub.load(AutoTokenizer, teacher, "--teacher")
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    batches = _windows(tokenizer, text, length, file) if task.unit == "token" else _lines(tokenizer, text, length, file)
    model = task.load(teacher, "--teacher", dtype=torch.float32).eval()
    found = {}
    for scheme in SCHEMES:
        try:
            other = cast(copy.deepcopy(model), torch.bfloat16) if scheme == "bf16" else ptq(model, scheme)
        except ConfigError:  # groups of 32 do not fill its rows
            continue
        where = f"{sum(len(batch['input_ids']) for batch in batches)} rows of {file}"
        if task.unit == "token":
            found[scheme] = Loss(_loss(other, batches) - _loss(model, batches), "nats", True, where)
        else:
            gap = compare(partial(logits_of, model), partial(logits_of, other), batches)
            found[scheme] = Loss(100 * (1 - gap.agreement), "points", True, f"at most: rows whose class changes, {where}")
    return found


@torch.inference_mode()
def _loss(model: Any, batches: Sequence[Batch]) -> float:
    total, count = 0.0, 0
    for batch in batches:
        ids, logits = batch["input_ids"], logits_of(model, batch)
        total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return total / count


def _windows(tokenizer: Any, text: str, length: int, file: str) -> list[Batch]:
    """Full windows of a text, the first `ROWS`."""
    ids = tokenizer(text[: 16 * ROWS * length], add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    rows = min(ROWS, len(ids) // length)
    if rows < 2:
        raise DataError(
            f"--data: '{file}' has {len(ids)} tokens, too few for two rows of {length}; give a longer text, or a smaller --length"
        )
    windows = ids[: rows * length].view(rows, length)
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in windows.split(BATCH)]


def _lines(tokenizer: Any, text: str, length: int, file: str) -> list[Batch]:
    lines = [line for line in text.splitlines() if line.strip()][:ROWS]
    if len(lines) < 2:
        raise DataError(f"--data: '{file}' has {len(lines)} lines of text, and at least 2 are wanted, a row each")
    parts = [lines[i : i + BATCH] for i in range(0, len(lines), BATCH)]
    return [dict(tokenizer(part, truncation=True, max_length=length, padding=True, return_tensors="pt")) for part in parts]
