"""A tiny teacher–student pair on rows of very different lengths, for tests that train."""

import json
import random
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from distill.balance.fixed import FixedWeights
from distill.data.text import PromptData
from distill.losses.divergence import ForwardKL
from distill.losses.hard import CrossEntropy
from distill.module import DistillModule
from distill.optim import AdamW
from distill.students.load import FromConfig
from distill.teachers.online import OnlineTeacher
from tests.data.helpers import WORDS, word_tokenizer

SMALL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
STUDENT = SMALL | {"num_key_value_heads": 1, "tie_word_embeddings": True, "max_position_embeddings": 64}


def teacher_folder(folder: Path) -> str:
    """Save a random Llama with its tokenizer, and give its folder."""
    torch.manual_seed(7)
    word_tokenizer(folder)
    sizes = {k: v for k, v in STUDENT.items() if k != "model_type"} | {"hidden_size": 24, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(WORDS), eos_token_id=0, pad_token_id=1, bos_token_id=None))
    model.save_pretrained(folder)
    return str(folder)


def prompts(path: Path, rows: int = 64) -> str:
    """Write prompts and completions of 1 to 12 words each, from a fixed seed."""
    rng = random.Random(3)
    words = lambda: " ".join(rng.choice("abcdefghij") for _ in range(rng.randint(1, 12)))
    text = "\n".join(json.dumps({"prompt": words(), "completion": words()}) for _ in range(rows))
    if not path.exists() or path.read_text() != text:  # ranks come here at once, and find it written
        path.write_text(text)
    return str(path)


def data(tmp_path: Path, rows: int = 64, **kwargs: Any) -> PromptData:
    """A data module over `prompts`; the tokenizer is the teacher's."""
    if not (tmp_path / "teacher").exists():
        teacher_folder(tmp_path / "teacher")
    source = prompts(tmp_path / "prompts.jsonl", rows)
    return PromptData(train_data=source, tokenizer=str(tmp_path / "teacher"), pack=False, max_length=32, val_fraction=0.1, **kwargs)


def module(tmp_path: Path, **kwargs: Any) -> DistillModule:
    """The pair with hard and soft labels."""
    given: dict[str, Any] = {
        "student": FromConfig(STUDENT),
        "teacher": OnlineTeacher(str(tmp_path / "teacher")),
        "losses": {"ce": CrossEntropy(), "kd": ForwardKL(2.0)},
        "balancer": FixedWeights({"ce": 0.3, "kd": 0.7}),
        "optimizer": AdamW(lr=1e-2, warmup=0, schedule="constant"),
    }
    return DistillModule(**(given | kwargs))


def trainer(**kwargs: Any) -> pl.Trainer:
    """A quiet trainer on the CPU that leaves nothing behind."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "max_epochs": -1,
    }
    return pl.Trainer(**(quiet | kwargs))


class Gradients(pl.Callback):
    """Keeps the student's gradient of every step, and the weights after it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def tokenizer(tmp_path: Path) -> Any:
    """The tokenizer of the teacher's folder."""
    return AutoTokenizer.from_pretrained(tmp_path / "teacher")
