"""Storages in fsspec's memory file system, which belongs to the process: empty for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def empty_memory() -> Iterator[None]:
    import fsspec

    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    yield
    store.store.clear()
