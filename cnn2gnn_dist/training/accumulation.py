"""How many micro-batches make a step. Pure."""

from __future__ import annotations

import math

from cnn2gnn_dist.errors import UserError


def accumulation_for(
    global_batch: int, world_size: int, max_micro_batch: int, field: str = "global_batch"
) -> int:
    """Fewest micro-batches per step such that a rank holds at most ``max_micro_batch`` samples.

    ``field`` is the name of the global batch where it was set.

    Raises:
        UserError: the global batch is not divisible by ranks and micro-batches.
    """
    if global_batch % world_size:
        raise UserError(
            f"a global batch of {global_batch} does not divide evenly over {world_size} ranks "
            f"({global_batch} / {world_size} = {global_batch / world_size:.2f})",
            where=field,
            remedy=f"for example {field}={math.ceil(global_batch / world_size) * world_size}",
        )
    share = global_batch // world_size
    fewest = math.ceil(share / max_micro_batch)
    return next(n for n in range(fewest, share + 1) if share % n == 0)


def small_micro_batches(
    global_batch: int, world_size: int, accumulation: int, max_micro_batch: int, field: str
) -> str | None:
    """One sentence if micro-batches are less than half as large as they may be, since nothing else divides evenly.

    A rank's 127 images, for example, with at most 64 at a time, are 127 micro-batches of one.
    """
    share = global_batch // world_size
    micro, unit = share // accumulation, world_size * math.ceil(share / max_micro_batch)
    if 2 * micro >= min(share, max_micro_batch):
        return None
    return (
        f"a rank's {share} images of a global batch divide only into {accumulation} micro-batches of {micro}, where "
        f"up to {max_micro_batch} would fit: slow, and BatchNorm's statistics are of few images; for larger ones "
        f"{field}={math.ceil(global_batch / unit) * unit}"
    )
