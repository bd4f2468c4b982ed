"""Tiny tokenizers and data sets whose tokens can be worked out by hand."""

from pathlib import Path
from typing import Any

import datasets
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distill.data import packing
from distill.data.base import DistillData, Splits
from distill.data.loader import Collate
from distill.tasks import CausalLM

SHARED = Path(__file__).parents[2] / "../shared/data"
WORDS = ["<eos>", "<pad>", "<unk>", "<bos>", *"abcdefghij", "user", "assistant"]
A, B, C, D, E, F = (WORDS.index(letter) for letter in "abcdef")
EOS, PAD, UNK, BOS = range(4)


def word_tokenizer(folder: Path, bos: bool = False, gap: int = 0, **special: str | None) -> str:
    """Save a tokenizer with a token per word (ids are indices of WORDS, the last one's is higher by `gap`) and give its folder."""
    ids = {word: i for i, word in enumerate(WORDS)}
    ids[WORDS[-1]] += gap
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    names = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<bos>", **special}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{k: v for k, v in names.items() if v}).save_pretrained(folder)
    return str(folder)


class RowsData(DistillData):
    """Rows given as they are."""

    task = CausalLM

    def __init__(self, train: list[dict[str, Any]], val: list[dict[str, Any]] | None = None, **common: Any) -> None:
        super().__init__(**common)
        self.rows, self.val_rows, self.reads = train, val, 0

    def read(self) -> Splits:
        self.reads += 1
        self.num_classes = 100
        return Splits(datasets.Dataset.from_list(self.rows), self.val_rows and datasets.Dataset.from_list(self.val_rows), None)

    def collator(self) -> Collate:
        return packing.stack

    def model_config(self) -> dict[str, Any]:
        return {}

    def example(self) -> list[tuple[str, bool]]:
        return []


def numbered(count: int) -> list[dict[str, list[int]]]:
    """Rows of three positions of which row i has 1 + i % 3 valid ones."""
    return [{"input_ids": [i, i, i], "labels": [7] * (1 + i % 3) + [-100] * (2 - i % 3)} for i in range(count)]
