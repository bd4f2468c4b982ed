"""Whether every rank holds the same weights: what no strategy looks after may differ, and nothing would show it."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distill.hub import stored
from distill.types import ConfigError

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> Tensor:
    """The sum of the bits of each parameter and buffer, read as integers: int64 `[n]`. One pass over the weights, where they are.

    Another value in a single weight changes it; a permutation of a tensor's values does not.
    """
    tensors = [plain for tensor in (*model.parameters(), *model.buffers()) for plain in stored(tensor)]
    sums = [t.detach().contiguous().view(-1).view(_BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors]
    return torch.stack([each.to(sums[0].device) for each in sums]) if sums else torch.zeros(0, dtype=torch.int64)


def check_same(model: nn.Module, who: str, device: torch.device) -> None:
    """Compare a model's weights with those of rank 0; does nothing in a single process.

    Args:
        model: whole on every rank.
        who: key of the model, for the message.
        device: where the ranks exchange tensors.

    Raises:
        ConfigError: a rank holds others, on every rank alike.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = fingerprint(model).to(device)
    everyone: list[Tensor] = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    if other := [rank for rank, theirs in enumerate(everyone) if not torch.equal(theirs, everyone[0])]:
        raise ConfigError(
            f"{who}: ranks {other} hold other weights than rank 0, so they would train towards different targets; make sure that every "
            "machine reads the same folder or revision"
        )
