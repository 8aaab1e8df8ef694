"""Update manifests after data has moved: the same shards, at the paths that the config names now."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path

from cnn2gnn_dist import ledger
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.storage.shard_paths import files_of
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.ledger import Entry
from cnn2gnn_dist.stages.shared.context import RunPaths

_log = logging.getLogger(__name__)


def follow(config: Config, paths: RunPaths, entry: Entry) -> Entry:
    """Write the shards' current paths into the manifests of a complete index; return its record.

    The key proves that these are the same files. Nothing is written where no path has changed.

    Raises:
        UserError: the config's shards are missing.
    """
    named = [path for path in paths.manifests if path.is_file()]
    train, test = _shards(config, paths)
    moved = []
    for path, there in zip(named, (train, test, train), strict=False):
        manifest = Manifest.load(path)
        if len(there) != len(manifest.shards) or there == [s.path for s in manifest.shards]:
            continue
        shards = [
            dataclasses.replace(shard, path=now)
            for shard, now in zip(manifest.shards, there, strict=True)
        ]
        dataclasses.replace(manifest, shards=tuple(shards)).save(path)
        moved.append(there[0])
    if not moved:
        return entry
    _log.info(f"the shards have moved: now {moved[0]} …", extra={"stage": "index"})
    entry = dataclasses.replace(entry, outputs=ledger.outputs(paths.train_manifest.parent, named))
    ledger.finish(paths.train_manifest.parent, entry)
    return entry


def _shards(config: Config, paths: RunPaths) -> tuple[list[str], list[str]]:
    """The paths of the shards behind the training and the held-out manifests."""
    data = config.data
    if data.source == "shards":
        train = _expanded(data.train)
        return train, (train if data.test is None else _expanded(data.test))
    train, test = (_packed(paths.shards, part) for part in ("train", "test"))
    return train, test or train


def _expanded(origin: str | list[str] | None) -> list[str]:
    return [p if is_remote(p) else os.path.abspath(p) for p in files_of("shards", origin or [])]


def _packed(folder: Path, part: str) -> list[str]:
    return sorted(os.path.abspath(path) for path in folder.glob(f"{part}-*.tar"))
