"""Questions among held-out rows whose solutions end in `#### ANSWER`, and what models write after them: greedily, in the same rows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from distill.metrics.answers import MARK, final_answer
from distill.report.probes.perturb import at_rest
from distill.tasks import unwrap
from distill.types import IGNORE_INDEX, Batch

BATCH = 8
LONGEST = 512  # tokens that are generated


@dataclass(frozen=True)
class Question:
    """A prompt and what is wanted after it.

    Attributes:
        prompt: its tokens.
        answer: of the solution, see `final_answer`.
        length: tokens of the solution.
        last: its last token.
    """

    prompt: list[int]
    answer: str
    length: int
    last: int


def questions(batches: Sequence[Batch], tokenizer: PreTrainedTokenizerBase, max_length: int, count: int) -> list[Question]:
    """The first documents whose last trained part, e.g. a completion or the assistant's last turn, holds `####` and a number.

    A document must be whole: in packed rows neither the first, which may go on from the row before, nor one that is cut. One of which
    everything is trained on asks nothing.

    Args:
        batches: held-out, on the CPU.
        tokenizer: of the rows.
        max_length: positions in a row; a row as long as that is cut unless it ends in eos.
        count: how many at most.
    """
    found = []
    for ids, labels, end_of_row in _documents(batches):
        valid = (labels != IGNORE_INDEX).nonzero()[:, 0]
        end = int(valid[-1]) + 1
        before = (labels[:end] == IGNORE_INDEX).nonzero()[:, 0]
        start = int(before[-1]) + 1 if len(before) else 0
        whole = int(labels[end - 1]) == tokenizer.eos_token_id or end_of_row < max_length
        if not whole or start == 0:
            continue
        text = tokenizer.decode(labels[start:end].tolist(), skip_special_tokens=True)
        answer = final_answer(text)
        if MARK in text and answer is not None:
            found.append(Question(ids[: start + 1].tolist(), answer, end - start, int(labels[end - 1])))
        if len(found) == count:
            break
    return found


def _documents(batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Tokens and labels of each, and where in its row it ends."""
    for batch in batches:
        for i, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
            size = int(batch["attention_mask"][i].sum()) if "attention_mask" in batch else len(ids)
            starts = (batch["position_ids"][i] == 0).nonzero()[1:, 0].tolist() if "position_ids" in batch else [0]
            for a, b in pairwise([*starts, size]):
                if (labels[a:b] != IGNORE_INDEX).any():
                    yield ids[a:b], labels[a:b], b


@torch.no_grad()
def greedy(
    model: nn.Module, asked: Sequence[Question], tokenizer: PreTrainedTokenizerBase, pad_id: int, max_length: int, device: torch.device
) -> list[str]:
    """What a model writes after each prompt, the likeliest token every time.

    It ends with eos, or with the special token that solutions end in, or after as many tokens as the longest solution has, 512 at most.

    Args:
        model: of transformers, a causal language model.
        asked: the questions.
        tokenizer: of both.
        pad_id: the padding token.
        max_length: positions that prompt and text may have together.
        device: where the model is.
    """
    ends = {tokenizer.eos_token_id} | {question.last for question in asked} & set(tokenizer.all_special_ids)
    longest = min(LONGEST, max(question.length for question in asked))
    texts = []
    with at_rest(model):
        for part in (asked[i : i + BATCH] for i in range(0, len(asked), BATCH)):
            width = max(len(question.prompt) for question in part)
            ids = torch.tensor([[pad_id] * (width - len(q.prompt)) + q.prompt for q in part], device=device)
            mask = torch.tensor([[0] * (width - len(q.prompt)) + [1] * len(q.prompt) for q in part], device=device)
            how = GenerationConfig(
                max_new_tokens=max(1, min(longest, max_length - width)), do_sample=False, eos_token_id=sorted(ends), pad_token_id=pad_id
            )
            written = unwrap(model).generate(input_ids=ids, attention_mask=mask, generation_config=how)[:, width:]
            texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    return texts
