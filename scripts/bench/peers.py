"""What the chunked objective is compared with: the same sum over the tokens of cross-entropy plus T² · forward KL at T = 2, in nats.

The other libraries are no dependencies of this project; what is not installed is left out of the comparison, with the reason. Written for
these versions, both under development: `pip install --no-deps liger-kernel==0.8.5 trl==1.16.0` (trl imports accelerate besides).
Both run without a GPU: Liger's chunked losses are plain PyTorch, TRL's kernels fall back to it.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.losses.chunked import chunks
from distill.types import Outputs

Inputs = tuple[Outputs, Outputs, Tensor]
Objective = Callable[[Outputs, Outputs, Tensor], Tensor]
T = 2.0


def weight(side: Outputs) -> Tensor:
    """The matrix of a head without bias, `[V, H]`."""
    (matrix,) = side.head.parameters()
    return matrix


def plain(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
    """Evaluate on whole logits, as a hand-written training step does."""
    logits = student.head(student.features[0]).float()
    with torch.no_grad():
        targets = teacher.head(teacher.features[0]).float()
    ce = F.cross_entropy(logits, labels[0], reduction="sum")
    kl = F.kl_div((logits / T).log_softmax(-1), (targets / T).log_softmax(-1), reduction="sum", log_target=True)
    return ce + kl * T**2


def products(inputs: Inputs, chunk: int) -> None:
    """The matrix products that any implementation needs, on buffers that are touched once."""
    student, teacher, _ = inputs
    features, targets = student.features[0].detach(), teacher.features[0]
    head, teacher_head = weight(student).detach(), weight(teacher).detach()
    grad_features, grad_head = torch.empty_like(features), torch.zeros_like(head)
    buffer, teacher_buffer = (features.new_empty(min(chunk, len(features)), len(head)) for _ in range(2))
    for rows in chunks(len(features), chunk):
        part = features[rows]
        logits = torch.mm(part, head.T, out=buffer[: len(part)])
        torch.mm(targets[rows], teacher_head.T, out=teacher_buffer[: len(part)])
        torch.mm(logits, head, out=grad_features[rows])
        grad_head.addmm_(logits.T, part)


def liger(chunk: int, compiled: bool) -> Objective:
    """Liger-Kernel's LigerFusedLinearJSDLoss: gradient in the forward pass, a chunk of tokens at a time, as ours.

    It gives `(hard · Σ CE + soft · Σ D_β) / N` of logits divided by T, without the factor T²:

        β = 0     D is F.kl_div(log q, log p), the forward KL from the student q to the teacher p (β = 1 is the reverse KL);
        hard = 1  the CE is taken before the division by T, so it is ours as it stands;
        soft = T² puts the missing factor into value and gradient, exactly;
        · N       undoes the mean. The caller divides by N, so its backward gets 1 (exactly where N is a power of two) and then spares
                  itself a multiplication of the gradients.

    The split is into max(1, N // chunk) parts, so a part has between one and two times `chunk` tokens. The softmax of the KL is in the
    dtype of the features and heads: in bfloat16 it rounds where ours does not.
    """
    make = import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss
    loss = make(weight_hard_loss=1.0, weight_soft_loss=T**2, beta=0.0, temperature=T, compiled=compiled, chunk_size=chunk)

    def objective(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        value: Tensor = loss(student.features[0], weight(student), teacher.features[0], weight(teacher), labels[0])
        return value * labels.numel()

    return objective


def trl() -> Objective:
    """TRL's ChunkedDivergenceFunction (its DistillationTrainer) plus its ChunkedLogProbFunction (the CE of its SFTTrainer).

    The divergence at β = 0 is the forward KL per token of logits divided by T, without T²: multiplied here. TRL has no function for both
    terms, so each projects by itself, and projects again in its backward pass: ten matrix products where four would do. That is the price
    of cutting the vocabulary too, into tiles of 4,096 tokens × 32,768 classes. The divergence's second result, the entropy, comes with it.
    """
    kernels = import_module("trl.kernels.chunked_divergence")
    logprob = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def objective(student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        features, head = student.features[0], weight(student)
        kl, _ = kernels.ChunkedDivergenceFunction.apply(features, head, None, teacher.features[0], weight(teacher).detach(), None, 0.0, T)
        logp = logprob.apply(features, head, None, labels[0], 1.0, kernels.VOCAB_CHUNK_SIZE, None, 1.0, ())[0]
        value: Tensor = T**2 * kl.sum() - logp.sum()
        return value

    return objective


NAMES = ("liger", "liger-compiled", "trl")


def peers(names: list[str], liger_chunk: int) -> dict[str, Objective]:
    """Give those of `NAMES` that are asked for and installed; say why the others are left out."""
    makers: dict[str, tuple[str, Callable[[], Objective]]] = {
        "liger": ("liger-kernel", partial(liger, liger_chunk, compiled=False)),
        "liger-compiled": ("liger-kernel", partial(liger, liger_chunk, compiled=True)),
        "trl": ("trl", trl),
    }
    found = {}
    for name in names:
        package, maker = makers[name]
        try:
            found[f"{name} {version(package)}"] = maker()
        except (ImportError, PackageNotFoundError) as reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
    return found
