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
from cnn2gnn_dist.runtime.shared_files import handover, host_folders
from cnn2gnn_dist.stages.shared.context import Context


def open_targets(context: Context, manifest: Manifest, targets_key: str) -> Targets:
    """Load all soft targets of the run (collective).

    The arrays are filled by all ranks that share a folder. If nothing can be written next to them, every rank
    reads them into its memory.

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

    sharing = host_folders.sharing(context.ranks.rank)
    first = sharing[0] == context.ranks.rank
    begun = _on_all(begin if first else None)
    wanted, _ = begun[sharing[0]]
    states = {state for _, state in filter(None, begun)}
    if refused := sorted(states - {"whole", "begun"}):
        context.warn(
            f"{refused[0]} ({root}): every rank reads them into its memory", stage="targets"
        )
        return Targets.load(files, samples, classes, meta)
    if "begun" in states:
        fills = begun[sharing[0]][1] == "begun"
        mine = wanted.files[sharing.index(context.ranks.rank) :: len(sharing)]

        def fill() -> np.ndarray | None:
            return np.packbits(target_arrays.fill(root, wanted, mine)) if fills else None

        covered = [part for rank, part in enumerate(_on_all(fill)) if rank in sharing]

        def finish() -> None:
            cells = wanted.layout.views * samples
            whole_VN = np.unpackbits(np.bitwise_or.reduce(covered), count=cells).astype(bool)
            handover.forget(target_arrays.unfinished_arrays(root, wanted))
            target_arrays.finish(root, wanted, whole_VN.reshape(wanted.layout.shape[:2]))

        _on_all(finish if first and fills else None)
    folder = root / target_arrays.FOLDER
    handover.hand_over(folder, lambda: handover.recorded(folder, target_arrays.checksums(root)))
    return target_arrays.opened(root, wanted.layout)


def _on_all(work: Callable[[], Any] | None) -> list[Any]:
    """Results of each rank's work, on every rank, however long it takes; or any rank's error (collective)."""
    with collectives.uneven():
        result = None if work is None else work()
    return collectives.all_gather_object(result)
