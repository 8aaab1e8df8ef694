"""The models that a run had before: what their memories have forgotten holds for the next one, too.

``RUN/model`` is renamed, with ``.old-1``, ``.old-2``, … added, before another takes its place. Its edits stay there,
except for the list of forgotten images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cnn2gnn_dist.data.index.relabel import rows_named, unique_keys
from cnn2gnn_dist.graph.search.valid_nodes import valid_nodes_of
from cnn2gnn_dist.graph.version import latest_version, open_version
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.folder.run_model import MODEL
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.inference.memory.rewriting import edits_of, is_edited
from cnn2gnn_dist.inference.memory.view import forgotten
from cnn2gnn_dist.log import quoted
from cnn2gnn_dist.stages.shared.context import RunPaths, load_manifest


def memories_of(root: Path) -> list[Path]:
    """The memories of a run's models: that of ``RUN/model``, then of those that were set aside, the last one first."""
    numbered = [
        path for path in root.glob(f"{MODEL}.old-*") if path.name.rpartition("-")[2].isdigit()
    ]
    aside = sorted(numbered, key=lambda path: -int(path.name.rpartition("-")[2]))
    return [folder / artefact.MEMORY for folder in (root / MODEL, *aside)]


def forgotten_of_run(root: Path) -> list[str]:
    """The keys that the memories of a run's models have forgotten."""
    return list(dict.fromkeys(key for memory in memories_of(root) for key in forgotten(memory)))


def forgotten_note(root: Path, relabel: str | None, named: Path | None = None) -> str | None:
    """One sentence if a run's training images, as indexed, contain forgotten ones, else None.

    Args:
        root: folder of the run.
        relabel: its relabel list (``data.relabel``).
        named: the folder's name in the sentence, if ``root`` is only a view of it; None: ``root``.
    """
    keys, manifest = forgotten_of_run(root), RunPaths(root).train_manifest
    if not keys or not manifest.is_file():
        return None
    count = int(rows_named(load_manifest(manifest), keys).sum())
    if not count:
        return None
    listed = next(path for path in map(_list_in, memories_of(root)) if path.is_file())
    listed = (named or root) / listed.relative_to(root)
    # A copy, since this list is moved away with its model, and the next model's may have more lines: the index would
    # be stale each time.
    copy = (named or root).with_name(f"{(named or root).name}-forgotten.csv")
    how = (
        f"`cp {quoted(listed)} {quoted(copy)}`, then data.relabel={quoted(copy)}"
        if relabel is None
        else f"add the lines of {listed} to {relabel}"
    )
    if not listed.is_file():  # a plan puts nothing into the folder
        how = f"`cnn2gnn index` with this config (it fetches their list), {how}"
    return (
        f"{count:,} images that the memory of this run's model has forgotten are still trained on, since they were "
        f"indexed before: to leave them out, {how}, with --update: everything from the index on is made anew"
    )


def _list_in(memory: Path) -> Path:
    return memory / store.FORGOTTEN


def edits_of_run(root: Path) -> str:
    """The edits of ``RUN/model`` that would be lost if it were written anew: all but what its memory has forgotten."""
    memory = root / MODEL / artefact.MEMORY
    return edits_of(memory, _as_written(root)) if is_edited(memory) else ""


def edits_set_aside(root: Path, new: dict[str, str]) -> tuple[str, str]:
    """The folder of the model that was set aside last, and what its memory has that the new one has not."""
    for memory in memories_of(root)[1:]:
        return memory.parent.name, edits_of(memory, new)
    return "", ""


def _as_written(root: Path) -> dict[str, str]:
    """The class of each image, by key, of the memory that would be written now."""
    found = latest_version(root / "graph")
    if found is None:
        return {}
    version, train = open_version(found), load_manifest(RunPaths(root).train_manifest)
    kept = ~rows_named(train, forgotten_of_run(root))
    kept[np.setdiff1d(np.arange(len(train)), valid_nodes_of(version.z))] = False
    keys, names = unique_keys(train), [*train.classes, ""]
    labels = version.labels.tolist()
    return {keys[row]: names[labels[row]] for row in np.flatnonzero(kept).tolist()}
