"""Running a model on inputs that someone has disturbed: embeddings moved by an opponent or by noise, tokens replaced by others.

How far embeddings are moved is told in units of their own root mean square, so that models with other embeddings can be compared: at 0.1
every coordinate moves by a tenth of what is usual for a coordinate. Padding is never touched, and a model is left as it was found.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distill import objective
from distill.losses.chunked import chunk_size, chunks
from distill.losses.hard import CrossEntropy
from distill.metrics import attack
from distill.report.columns import likeliest
from distill.report.evidence import Bools, Ints, NotMeasured
from distill.tasks import Task, unwrap
from distill.types import IGNORE_INDEX, Batch, Outputs

BATCH = 8


def some_rows(batches: Sequence[Batch], rows: int, tokens: int, pad_id: int) -> list[Batch]:
    """Take rows with labels, evenly spread, and batch them anew.

    Args:
        batches: held-out, on the CPU, padded on the right.
        rows: how many at most.
        tokens: how many tokens they may have together, padding counted; one row is taken in any case.
        pad_id: the padding token.

    Raises:
        NotMeasured: no row has a label.
    """
    found = [(batch, i) for batch in batches for i in (batch["labels"] != IGNORE_INDEX).any(1).nonzero()[:, 0].tolist()]
    if not found:
        raise NotMeasured("no held-out row has a label")
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    count = min(len(found), rows, max(1, tokens // longest))
    chosen = [found[i * len(found) // count] for i in range(count)]
    singles = [{name: value[i] for name, value in batch.items() if value.ndim > 1} for batch, i in chosen]
    return [_together(singles[start : start + BATCH], pad_id) for start in range(0, count, BATCH)]


def _together(rows: Sequence[Batch], pad_id: int) -> Batch:
    fill = {"input_ids": pad_id, "labels": IGNORE_INDEX}
    return {name: pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill.get(name, 0)) for name in rows[0]}


def labels_and_rows(batches: Sequence[Batch]) -> tuple[Ints, Ints]:
    """The label of every valid position, and the number of its row, in the order in which `Probe` gives them; both `[N]`."""
    labels = [row[row != IGNORE_INDEX].numpy() for batch in batches for row in batch["labels"]]
    return np.concatenate(labels), np.repeat(np.arange(len(labels)), [len(row) for row in labels])


class Probe:
    """A model that is put to the test on some rows; every method gives whether it was right at each of their N valid positions.

    Args:
        model: of transformers.
        task: how it is run.
        batches: of the rows.
        num_classes: V.
        device: where the model is.

    Attributes:
        scale: the root mean square of the rows' embeddings.

    Raises:
        NotMeasured: the weights are elsewhere.
    """

    def __init__(self, model: nn.Module, task: Task, batches: Sequence[Batch], num_classes: int, device: torch.device) -> None:
        self.model, self.task, self.num_classes, self.device = model, task, num_classes, device
        if any(p.device.type != device.type for p in model.parameters()):
            raise NotMeasured("its weights are on the device only while it runs, so that its embeddings cannot be reached")
        self.batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        with torch.no_grad():
            embedded = [self._embedding(batch["input_ids"])[real(batch)].double() for batch in self.batches]
        squares, count = sum(float(x.square().sum()) for x in embedded), sum(x.numel() for x in embedded)
        self.scale = (squares / count) ** 0.5

    @property
    def _embedding(self) -> nn.Module:
        module: nn.Module = unwrap(self.model).get_input_embeddings()
        return module

    @cached_property
    def clean(self) -> Bools:
        """Whether it is right undisturbed."""
        return self._right(self.batches, lambda batch, x: x)

    def noisy(self, sigma: float, seed: int = 0) -> Bools:
        """With Gaussian noise on every coordinate of the embeddings, its standard deviation `sigma` times their root mean square."""
        drawn = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device

        def noise(batch: Batch, x: Tensor) -> Tensor:
            return x + sigma * self.scale * torch.randn(x.shape, generator=drawn).to(x) * real(batch)[..., None]

        return self._right(self.batches, noise)

    def replaced(self, share: float, keep: Sequence[int], seed: int = 0) -> Bools:
        """With each token, at a probability of `share`, replaced by one drawn evenly from the rows' own vocabulary.

        Args:
            share: in [0, 1].
            keep: tokens that are left, e.g. those that mark the start and the end.
            seed: of the draws; a token that is replaced at some share is replaced by the same at every larger one, and for every model.

        Raises:
            NotMeasured: no other token occurs in the rows.
        """
        drawn, kept = torch.Generator().manual_seed(seed), torch.tensor([*keep], dtype=torch.long)
        seen = torch.cat([batch["input_ids"][real(batch)] for batch in self.batches]).unique().cpu()
        words = seen[~torch.isin(seen, kept)]
        if not len(words):
            raise NotMeasured("all tokens of the rows are special ones, which are left")
        disturbed = []
        for batch in self.batches:
            ids = batch["input_ids"].cpu()
            falls = (torch.rand(ids.shape, generator=drawn) < share) & real(batch).cpu() & ~torch.isin(ids, kept)
            others = words[torch.randint(len(words), ids.shape, generator=drawn)]
            disturbed.append({**batch, "input_ids": torch.where(falls, others, ids).to(self.device)})
        return self._right(disturbed, lambda batch, x: x)

    def fgsm(self, epsilons: Sequence[float]) -> list[Bools]:
        """Under the fast gradient sign method, for several ε in units of the embeddings' root mean square."""
        self._refuse()
        gradients = [self._gradient(batch, torch.zeros((), device=self.device)) for batch in self.batches]
        return [
            self._under([attack.fgsm(g, e * self.scale, real(b)) for g, b in zip(gradients, self.batches, strict=True)]) for e in epsilons
        ]

    def pgd(self, epsilon: float, steps: int = 5, seed: int = 0) -> Bools:
        """Under projected gradient descent: a random start in the ball, then `steps` steps of `2.5 ε / steps`."""
        self._refuse()
        drawn, found, size = torch.Generator().manual_seed(seed), [], epsilon * self.scale
        for batch in self.batches:
            shape = self._embedding(batch["input_ids"]).detach()
            delta = attack.pgd_start(shape, size, real(batch), drawn)
            for _ in range(steps):
                delta = attack.pgd_step(delta, self._gradient(batch, delta), size, 2.5 * size / steps, real(batch))
            found.append(delta)
        return self._under(found)

    def _under(self, deltas: Sequence[Tensor]) -> Bools:
        moves = iter(deltas)
        return self._right(self.batches, lambda batch, x: x + next(moves))

    def _gradient(self, batch: Batch, delta: Tensor) -> Tensor:
        """The gradient of the cross-entropy, summed over the valid positions, with respect to the embeddings at `delta`."""
        moved: list[Tensor] = []

        def move(x: Tensor) -> Tensor:
            moved.append((x + delta).detach().requires_grad_())
            return moved[0]

        with torch.inference_mode(False), torch.enable_grad():
            outputs = self._run({name: value.clone() for name, value in batch.items()}, move)  # no inference tensors
            total = objective.evaluate({"ce": CrossEntropy()}, {"ce": 1.0}, outputs, None, batch, self.num_classes).total
            return torch.autograd.grad(total, moved[0])[0]  # asked for alone: nothing is left in any `.grad`

    @torch.no_grad()
    def _right(self, batches: Sequence[Batch], change: Callable[[Batch, Tensor], Tensor]) -> Bools:
        found = []
        for batch in batches:
            outputs = self._run(batch, lambda x, batch=batch: change(batch, x))  # type: ignore[misc]
            valid = batch["labels"] != IGNORE_INDEX
            features, labels = outputs.features[valid], batch["labels"][valid]
            for part in chunks(len(labels), chunk_size(self.num_classes, self.device)):
                top = likeliest(outputs.head(features[part])[..., : self.num_classes])
                found.append((top == labels[part]).cpu().numpy())
        return np.concatenate(found)

    def _run(self, batch: Batch, change: Callable[[Tensor], Tensor]) -> Outputs:
        with at_rest(self.model), _changed(self._embedding, change):
            return self.task.outputs(self.model, batch)

    def _refuse(self) -> None:
        if torch.is_autocast_enabled(self.device.type):
            raise NotMeasured("gradients under autocast are rounded, and their signs with them; run the report without it")
        if any(is_traceable_wrapper_subclass(p.data) or not p.is_floating_point() for p in self.model.parameters()):
            raise NotMeasured("its weights are quantised, and have no gradients that an attack could follow; attack the model before that")


def real(batch: Batch) -> Tensor:
    """Where a row has tokens, `[B, T]`, boolean.

    Packed rows have no mask; there a document without labels, as the filling at the end is one, is of no effect on anything.
    """
    ids = batch["input_ids"]
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    if "position_ids" not in batch:
        return torch.ones_like(ids, dtype=torch.bool)
    document = (batch["position_ids"] == 0).cumsum(1) - 1
    labels = torch.zeros_like(ids).scatter_add(1, document, (batch["labels"] != IGNORE_INDEX).long())
    return labels.gather(1, document) > 0


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode while the context is open; after, every module is in the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _changed(embedding: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let what the embedding gives pass through `change`."""
    calls = 0

    def hook(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return change(output)

    handle = embedding.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise NotMeasured(f"its embeddings cannot be disturbed: in one forward pass they were asked {calls} times; is it compiled?")
