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
