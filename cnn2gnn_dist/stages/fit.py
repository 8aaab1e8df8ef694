"""Whether the ranks at hand fit the config: said before the first stage, not after hours of it."""

from __future__ import annotations

from collections.abc import Iterable

from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.arithmetic import check_parts
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.training.ds_config import accumulation_for

_TRAINS = ("teacher", "student", "control")


def check(config: Config, stages: Iterable[str], world_size: int) -> None:
    """See that global batches divide over the ranks, and that partitions reach round.

    Args:
        stages: names of those that are still to run; what is whole may have had other ranks.

    Raises:
        UserError: they don't.
    """
    for name in set(stages).intersection(_TRAINS):
        settings = config.teacher if name == "teacher" else config.student
        accumulation_for(settings.global_batch, world_size, settings.max_micro_batch)
        if name == "student" and config.graph.scope == "dataset":
            check_parts(config.graph.parts, world_size, settings.global_batch)
            if config.graph.sampler == "distdgl" and config.graph.parts != world_size:
                raise UserError(
                    f"{config.graph.parts} partitions for {world_size} ranks: with DGL's servers "
                    "every rank serves one",
                    where="graph.parts",
                    remedy=f"graph.parts={world_size}, or graph.sampler=table",
                )
