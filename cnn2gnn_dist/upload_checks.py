"""Check, before a job is submitted, what it would find in Ray's copy of the working directory."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cnn2gnn_dist import path_fields, presets, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError

MOST_BYTES = 500 << 20
"""Size limit of a working directory that Ray accepts."""
MIB = 2**20
WRITTEN = ("run.dir", "stream.cache_dir")
"""Paths that a run writes to; it makes them where they are missing."""


def check_size(files: Mapping[str, int], folder: Path) -> None:
    """Check that Ray will accept the files (relative path → bytes) of ``folder``.

    Raises:
        UserError: too many bytes; names the three largest files.
    """
    total = sum(files.values())
    if total < MOST_BYTES:
        return
    largest = sorted(files, key=lambda name: -files[name])[:3]
    named = ", ".join(f"{name} ({files[name] / MIB:,.0f} MiB)" for name in largest)
    raise UserError(
        f"{total / MIB:,.0f} MiB would be sent with the job, but Ray accepts less than "
        f"{MOST_BYTES / MIB:,.0f}; the largest: {named}",
        where=str(folder),
        remedy="move data out of this folder, or list it in a file .rayignore there "
        "(one pattern per line, as in .gitignore)",
    )


def check_paths(files: Mapping[str, int] | None, folder: Path, arguments: Sequence[str]) -> None:
    """Check that relative paths in the arguments of `cnn2gnn run` lead to files that are sent.

    Args:
        files: those that are sent (relative path → bytes); None: not known yet, so all in the folder count.
        folder: that they are in.
        arguments: of `cnn2gnn run`.

    Raises:
        UserError: one doesn't, or the config itself is invalid.
    """  # noqa: DOC501
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default="demo")
    options, rest = parser.parse_known_args(arguments)
    source = options.config
    if source not in presets.names() and not os.path.isabs(source):
        inside = os.path.normpath(source)
        if inside.startswith("..") or not (folder / inside).is_file():
            raise _not_sent("--config", source, folder, "")
        if files is not None and inside not in files:
            raise _not_sent("--config", source, folder, _excluded(folder / source))
        source = str(folder / source)
    overrides = [text for text in rest if not text.startswith("-")]
    for field, path in _relative_paths(source, overrides):
        _check_path(field, path, files, folder)


def _relative_paths(source: str, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Fields of a config whose paths are relative to the working directory, with those paths."""
    with tempfile.TemporaryDirectory() as name:
        # Paths that resolve below this folder were relative; it is nested so that "../" is too.
        root = os.path.realpath(name)
        start = os.path.join(root, "a", "b", "c", "d")
        os.makedirs(start)
        with contextlib.chdir(start):
            config = settings.load(source, overrides)
        for field, path in _paths(config):
            if os.path.commonpath([root, path]) == root:
                yield field, os.path.relpath(path, start)


def _paths(config: Config) -> Iterator[tuple[str, str]]:
    """Paths on disk that a run reads, each with its field."""
    found: list[tuple[str, str]] = []

    def note(path: str, field: str) -> str:
        if field not in WRITTEN and os.path.isabs(path):  # not a URL
            found.append((field, path))
        return path

    path_fields.changed(config, note)
    yield from found


def _check_path(field: str, path: str, files: Mapping[str, int] | None, folder: Path) -> None:
    from cnn2gnn_dist.data.storage.shard_paths import expand

    whole = os.path.join(folder, path)
    inside = os.path.normpath(path)
    if os.path.isdir(whole):
        there = [os.path.join(at, name) for at, _, names in os.walk(whole) for name in names]
    else:
        try:
            there = expand(whole)
        except UserError:
            raise _not_sent(field, path, folder, "") from None
    names = {os.path.relpath(one, folder) for one in there}
    missing = set() if files is None else names - files.keys()
    if missing or not names or inside.startswith(".."):
        raise _not_sent(field, path, folder, _excluded(Path(whole)) if there else "")


def _excluded(path: Path) -> str:
    return (
        ": it is excluded (tars, .git, runs, .venv, and whatever .gitignore and .rayignore list)"
        * (path.exists() or "*" in path.name or "{" in path.name)
    )


def _not_sent(field: str, path: str, folder: Path, why: str) -> UserError:
    return UserError(
        f"{path} is not among the files that are sent with the job{why}",
        where=field,
        remedy="an absolute path that all hosts of the cluster can see; relative paths start "
        f"at the copy of {folder}",
    )
