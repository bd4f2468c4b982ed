"""A teacher by fine-tuning a sentence encoder: mean pooling, a linear head, AdamW; texts of one length together."""

import random
from pathlib import Path

import numpy as np
import torch
from long_tail_sets import Rows
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

EPOCHS, BATCH, LENGTH, SEED = 1, 32, 32, 0
RATE, HEAD_RATE = 1e-4, 1e-3


class Classifier(nn.Module):
    """Encoder, mean of the real tokens, linear."""

    def __init__(self, folder: str, classes: int) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = AutoModel.from_pretrained(folder, dtype=torch.float32)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, texts: list[str]) -> Tensor:
        inputs = self.tokenizer(texts, truncation=True, max_length=LENGTH, padding=True, return_tensors="pt")
        mask = inputs["attention_mask"][..., None].float()
        return self.head((self.encoder(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1))


def batches(texts: list[str], rng: random.Random) -> list[list[int]]:
    """Rows of about one length together, in random order."""
    order = sorted(range(len(texts)), key=lambda i: (len(texts[i]) // 8, rng.random()))
    parts = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
    rng.shuffle(parts)
    return parts


def train(model: Classifier, texts: list[str], labels: list[int]) -> None:
    rng, total = random.Random(SEED), EPOCHS * -(-len(texts) // BATCH)
    groups = [{"params": model.encoder.parameters(), "lr": RATE}, {"params": model.head.parameters(), "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / (0.06 * total)) * (1 - step / total))
    step = 0
    for _ in range(EPOCHS):
        for rows in batches(texts, rng):
            loss = F.cross_entropy(model([texts[i] for i in rows]), torch.tensor([labels[i] for i in rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0:
                print(f"  fine-tuning: step {step:,} of {total:,}, loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def logits(model: Classifier, texts: list[str], batch: int = 128) -> NDArray[np.float32]:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = np.empty((len(texts), model.head.out_features), np.float32)
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        out[rows] = model([texts[i] for i in rows]).numpy()
    return out


def fine_tuned(rows: Rows, folder: str, cache: Path) -> tuple[dict[str, NDArray[np.float32]], list[str]]:
    """Fine-tune on the training rows: logits of every part, and the names of their columns (sorted). Kept in `cache`."""
    classes = sorted({label for _, label in rows.train})
    if not cache.is_file():
        torch.manual_seed(SEED)
        model = Classifier(folder, len(classes))
        train(model.train(), [text for text, _ in rows.train], [classes.index(label) for _, label in rows.train])
        model.eval()
        np.savez(cache, **{name: logits(model, [text for text, _ in part]) for name, part in rows.parts().items()})
    with np.load(cache) as file:
        return {name: file[name] for name in rows.parts()}, classes
