"""Lightning's own count of micro-batches in a checkpoint, moved to where the data resumes."""

from typing import Any


def realign(checkpoint: dict[str, Any], done: int) -> None:
    """Say in a checkpoint that `done` micro-batches of the epoch are done on each rank.

    A checkpoint made inside an accumulation window has lost that window's gradients, so its data is replayed; a count that
    stayed ahead would let the optimizer step in the middle of every later window. The count is per rank, so it changes with
    the world size as well. A count that is right already is left alone.

    Args:
        checkpoint: as Lightning read it, changed in place, before the loops are restored (`LightningModule.on_load_checkpoint`).
        done: micro-batches, a multiple of the accumulation window.
    """
    loops = checkpoint["loops"]["fit_loop"]
    total, current = (loops["epoch_loop.batch_progress"][key] for key in ("total", "current"))
    if current["ready"] == done:
        return
    shift = done - current["ready"]
    for count in ("ready", "started", "processed", "completed"):
        current[count] = done
        total[count] = total["ready"] if count != "ready" else total["ready"] + shift
    # the step count of the loggers, which Lightning would otherwise work out from the counts just overwritten
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"]


def at_end_of_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether the last micro-batch of an epoch was done when the checkpoint was made."""
    return checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
