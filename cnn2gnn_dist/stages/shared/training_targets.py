"""The soft targets as training reads them: one memory map per host, filled once by all ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.data import target_arrays
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.soft_targets import Targets
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import handover
from cnn2gnn_dist.stages.shared.context import Context


def open_targets(context: Context, manifest: Manifest, targets_key: str) -> Targets:
    """Load all soft targets of the run (collective).

    If nothing can be written next to them, every rank reads them into its memory.

    Raises:
        UserError: on every rank: as ``Targets.load``; the disk is full.
    """
    root, meta = context.paths.targets, {"key": targets_key}
    samples, classes = len(manifest), manifest.num_classes
    # Rank 0's list: another host may still have an earlier one cached.
    files: list[Path] = collectives.broadcast_object(sorted(root.glob("*.parquet")))

    def begin() -> tuple[target_arrays.TargetFiles, str]:
        wanted = target_arrays.describe(files, samples, classes, meta)
        if target_arrays.is_complete(root, wanted):
            return wanted, "whole"
        try:
            target_arrays.create(root, wanted)
        except OSError as error:
            return wanted, f"not writable: {error.strerror}"
        return wanted, "begun"

    (wanted, state), *_ = _on_all(begin if context.ranks.is_first else None)
    if state.startswith("not writable"):
        context.warn(f"{state} ({root}): every rank reads them into its memory", stage="targets")
        return Targets.load(files, samples, classes, meta)
    if state == "begun":
        ranks = context.ranks
        mine = wanted.files[ranks.rank :: ranks.world_size]
        covered = _on_all(lambda: np.packbits(target_arrays.fill(root, wanted, mine)))
        cells = wanted.layout.views * samples
        whole_VN = np.unpackbits(np.bitwise_or.reduce(covered), count=cells).astype(bool)
        whole_VN = whole_VN.reshape(wanted.layout.shape[:2])

        def finish() -> None:
            handover.forget(target_arrays.unfinished_arrays(root, wanted))
            target_arrays.finish(root, wanted, whole_VN)

        _on_all(finish if ranks.is_first else None)
    folder = root / target_arrays.FOLDER
    handover.hand_over(folder, lambda: handover.recorded(folder, target_arrays.checksums(root)))
    return target_arrays.opened(root, wanted.layout)


def _on_all(work: Callable[[], Any] | None) -> list[Any]:
    """Results of each rank's work, on every rank, however long it takes; or any rank's error (collective)."""
    with collectives.uneven():
        result = None if work is None else work()
    return collectives.all_gather_object(result)
