"""The relabel list that a run was trained with, as the memory of its model keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.index.relabel import (
    Decision,
    names_of,
    read_relabel,
    rows_named,
    unique_keys,
)
from cnn2gnn_dist.stages.shared.context import Context, load_manifest


def of_run(context: Context) -> dict[str, Decision] | None:
    """The decisions that the training images were made with; None: their list is gone."""
    path = context.relabel_list()
    if path is None:
        return {}
    return read_relabel(path) if path.is_file() else None


def lines(
    context: Context, decisions: Mapping[str, Decision], forgotten: Sequence[str]
) -> list[tuple[str, str, str]]:
    """The list as ``inference.memory.decisions`` keeps it, without lines on forgotten images.

    Args:
        context: of the run.
        decisions: of the list.
        forgotten: keys of forgotten images.
    """
    if not decisions:
        return []
    train, path = load_manifest(context.paths.train_manifest), context.paths.calibration_manifest
    manifests = [(train, list[str]())]
    if path.is_file():
        manifests.append((Manifest.load(path), train.keys.to_pylist()))
    key_of: dict[str, str | None] = {}
    for manifest, beside in manifests:
        keys, gone_N = unique_keys(manifest, beside), rows_named(manifest, forgotten, beside)
        for name, row in names_of(manifest, beside).items():
            if name in decisions:
                key_of[name] = None if gone_N[row] else keys[row]
    found = [(name, one.text, key_of.get(name, "")) for name, one in decisions.items()]
    return [(name, text, key) for name, text, key in found if key is not None]
