"""Garbage is not collected during imports, and is collected again afterwards."""

from __future__ import annotations

import gc

import pytest

from cnn2gnn_dist.commands.answers.importing import without_collection


@pytest.fixture(autouse=True)
def _thawed():
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was_afterwards(enabled: bool):
    if not enabled:
        gc.disable()
    inside = []

    def importing():
        with without_collection():
            inside.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        importing()
    assert inside == [False]
    assert gc.isenabled() == enabled
    assert gc.get_freeze_count() > 0
