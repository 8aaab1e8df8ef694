"""Which shards a pattern means: paths, globs, webdataset's brace notation, folders."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from cnn2gnn_dist.data import urls
from cnn2gnn_dist.errors import UserError


def expand(pattern: str | Path | Sequence[str | Path]) -> list[str]:
    """List the shards that a pattern, or several in their order, stand for; each path once.

    A folder means the ``.tar`` files in it; ``{0000..1023}`` and ``{a,b}`` are spelled out as
    webdataset does; ``*``, ``?`` and ``[...]`` match, sorted by name. ``~`` is the home folder.
    URLs (http, s3 and what else fsspec knows) work likewise, as far as their store can list.

    Raises:
        UserError: a pattern matches nothing, or a shard that it names does not exist.
    """
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    found: dict[str, None] = {}
    for each in patterns:
        found.update(dict.fromkeys(_expand_one(os.path.expanduser(os.fspath(each)))))
    if not found:
        raise UserError("No shards are given.", remedy="Name at least one shard, glob or folder.")
    return list(found)


def _expand_one(pattern: str) -> list[str]:
    pattern = pattern.removeprefix("file://")
    if urls.is_remote(pattern):
        return _expand_remote(pattern)
    if os.path.isdir(pattern):
        shards = sorted(glob.glob(os.path.join(glob.escape(pattern), "*.tar")))
        if not shards:
            raise UserError(
                "The folder holds no .tar files.",
                where=pattern,
                remedy="Point to the folder of the shards, or pack the images first.",
            )
        return shards
    if os.path.exists(pattern):  # a real name may hold braces or brackets
        return [pattern]
    shards, missing = [], []
    for name in _spell_out(pattern):
        matches = sorted(glob.glob(name))
        shards += matches
        if not matches:
            missing.append(name)
    if missing:
        others = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise UserError(
            f"No such shard{others}.",
            where=missing[0] if missing[0] == pattern else f"{missing[0]}, from '{pattern}'",
            remedy="Check the pattern; relative ones start at the current folder "
            f"({os.getcwd()}). Is the data's file system mounted?",
        )
    return shards


def _expand_remote(pattern: str) -> list[str]:
    """URLs are taken as they are, and looked for when they are read; globs are asked for now."""
    shards: list[str] = []
    for url in _spell_out(pattern):
        path = url.partition("?")[0] if url.startswith("http") else url
        if not (path.endswith("/") or any(sign in path for sign in "*[")):
            shards.append(url)
            continue
        found = urls.matches(path)
        if not found:
            raise UserError(
                "No such shard.",
                where=url,
                remedy="Check the URL; many web servers can't list: write {0000..1023} instead.",
            )
        shards += found
    return shards


def _spell_out(pattern: str) -> list[str]:
    from braceexpand import braceexpand  # comes with webdataset

    try:
        return list(braceexpand(pattern))
    except ValueError as failure:
        raise UserError(
            "The braces of the pattern do not match.",
            where=pattern,
            remedy="Write ranges as {0000..1023} and alternatives as {a,b}.",
        ) from failure
