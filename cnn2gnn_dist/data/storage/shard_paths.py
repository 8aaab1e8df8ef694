"""Expansion of patterns to files: paths, globs, webdataset's brace notation, folders."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cnn2gnn_dist.data.storage import folders, urls
from cnn2gnn_dist.errors import UserError


def expand(
    pattern: str | Path | Sequence[str | Path], suffix: Literal[".tar", ".parquet"] = ".tar"
) -> list[str]:
    """List the files that match a pattern, or several patterns in order; each path once.

    A folder stands for its files with the suffix (for Parquet also those in its ``data`` folder, as
    Hugging Face lays them out). ``{0000..1023}`` and ``{a,b}`` expand as in webdataset. ``*``, ``?``
    and ``[...]`` match, sorted by name, without hidden files. ``~`` is the home folder. URLs of
    shards (http, s3 and anything else that fsspec supports) work the same way, as far as the store
    can list; Parquet files are read from disk only.

    Raises:
        UserError: a pattern matches nothing; a named file does not exist; a folder has no files with
            the suffix, or files of several splits (train, test) of a data set; a Parquet URL.
    """
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    found: dict[str, None] = {}
    for each in patterns:
        name = os.path.expanduser(os.fspath(each))
        found.update(dict.fromkeys(_expand_one(name, suffix)))
    if not found:
        raise UserError(
            f"no {_WORDS[suffix]}s were given",
            remedy=f"name at least one {_WORDS[suffix]}, glob or folder",
        )
    return list(found)


def files_of(source: str, origin: str | Sequence[str]) -> list[str]:
    """Return the files of ``data.train`` or ``data.test`` for the source "shards" or "parquet"."""
    return expand(origin, ".parquet" if source == "parquet" else ".tar")


_WORDS = {".tar": "shard", ".parquet": "Parquet file"}


def _expand_one(pattern: str, suffix: str) -> list[str]:
    pattern = pattern.removeprefix("file://")
    if urls.is_remote(pattern):
        if suffix == ".parquet":
            raise UserError(
                "Parquet files can only be read from disk, but this is a URL",
                where=pattern,
                remedy="download them and name the files or their folder; only WebDataset shards "
                "(data.source=shards) can be streamed from URLs",
            )
        return _expand_remote(pattern)
    if os.path.isdir(pattern):
        return folders.files_in(pattern, suffix)
    if os.path.exists(pattern):  # a real name may contain braces or brackets
        return [pattern]
    files, missing = [], []
    for name in _spell_out(pattern):
        matches = sorted(glob.glob(name))
        for match in matches:
            files += folders.files_in(match, suffix) if os.path.isdir(match) else [match]
        if not matches:
            missing.append(name)
    if missing:
        others = f" ({len(missing) - 1} more are missing)" if len(missing) > 1 else ""
        raise UserError(
            f"no such {_WORDS[suffix]}{others}",
            where=missing[0] if missing[0] == pattern else f"{missing[0]}, from '{pattern}'",
            remedy="check the pattern (relative paths start at the current folder, "
            f"{os.getcwd()}); is the data's file system mounted?",
        )
    return files


def _expand_remote(pattern: str) -> list[str]:
    """Expand remote globs now; return plain URLs as they are, which are checked when they are read."""
    shards: list[str] = []
    for url in _spell_out(pattern):
        path = url.partition("?")[0] if url.startswith("http") else url
        if not (path.endswith("/") or any(sign in path for sign in "*[")):
            shards.append(url)
            continue
        found = urls.matches(path)
        if not found:
            raise UserError(
                "no such shard",
                where=url,
                remedy="check the URL; many web servers can't list files: write {0000..1023} "
                "instead",
            )
        if path.endswith("/"):
            folders.refuse_mixed(path, found, ".tar")
        shards += found
    return shards


def _spell_out(pattern: str) -> list[str]:
    from braceexpand import braceexpand  # a dependency of webdataset

    try:
        return list(braceexpand(pattern))
    except ValueError as failure:
        raise UserError(
            "the braces in the pattern are unbalanced",
            where=pattern,
            remedy="write ranges as {0000..1023} and alternatives as {a,b}",
        ) from failure
