"""Soft targets as one memory map per host: the arrays filled by all ranks equal a plain read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import settings
from cnn2gnn_dist.data import target_arrays
from cnn2gnn_dist.data.soft_targets import Targets
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.stages.shared.training_targets import open_targets
from tests.unit.data.test_soft_targets import teacher, write_all

N, C = 60, 9


def context(root: Path) -> Context:
    ranks = Ranks.from_environment()
    return Context(settings.load("demo", []), ranks, RunPaths(root), root, "", "cpu", False)


class Samples:
    """The parts of a manifest that targets need."""

    num_classes = C

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def opened(root: Path, samples: int = N) -> Targets:
    """Open the targets as the student stage does."""
    (root / "targets").mkdir(exist_ok=True)
    return open_targets(context(root), Samples(samples), "k")  # type: ignore[arg-type]


def made(root: Path, k: int, seed: int = 0) -> Targets:
    """Write files of N samples in shards of 7, and return a plain read of them."""
    write_all(root / "targets", teacher(2, N, C, seed), k, meta={"key": "k"})
    return Targets.load(root / "targets", N, C, {"key": "k"})


def same(found: Targets, wanted: Targets) -> None:
    assert isinstance(found.log_probs_VNK, np.memmap)
    np.testing.assert_array_equal(found.log_probs_VNK, wanted.log_probs_VNK)
    assert (found.indices_VNK is None) == (wanted.indices_VNK is None)
    if wanted.indices_VNK is not None:
        np.testing.assert_array_equal(found.indices_VNK, wanted.indices_VNK)
    for view in (0, 1):
        ids = np.random.default_rng(view).permutation(N)[:20]
        np.testing.assert_array_equal(found.lookup(ids, view), wanted.lookup(ids, view))


def test_what_a_kill_left_begins_anew(tmp_path):
    wanted = made(tmp_path, 3)
    root = tmp_path / "targets"
    source = target_arrays.describe(sorted(root.glob("*.parquet")), N, C, {"key": "k"})
    target_arrays.create(root, source)
    target_arrays.fill(root, source, source.files[:2])
    assert not target_arrays.is_complete(root, source)
    same(opened(tmp_path), wanted)
    assert target_arrays.is_complete(root, source)


def test_other_targets_give_other_arrays(tmp_path):
    first = made(tmp_path, 3)
    same(opened(tmp_path), first)
    second = made(tmp_path, 3, seed=1)
    assert (first.log_probs_VNK != second.log_probs_VNK).any()
    same(opened(tmp_path), second)
    third = made(tmp_path, 5)
    same(opened(tmp_path), third)


@pytest.mark.parametrize("name", ["log_probs.npy", "indices.npy", "note.json"])
def test_damaged_arrays_are_made_again(tmp_path, name):
    wanted = made(tmp_path, 3)
    opened(tmp_path)
    path = tmp_path / "targets" / "dense" / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x21
    path.write_bytes(data)
    same(opened(tmp_path), wanted)
    path.unlink()
    same(opened(tmp_path), wanted)


def test_samples_without_targets_are_refused(tmp_path):
    made(tmp_path, 3)
    with pytest.raises(UserError, match="2 of 62 samples have no soft targets"):
        opened(tmp_path, 62)
    for path in (tmp_path / "targets").glob("*.parquet"):
        path.unlink()
    with pytest.raises(UserError, match="60 of 60 samples"):
        opened(tmp_path)


def test_files_of_another_order_go_to_their_places(tmp_path):
    """Rows need not be contiguous, although the shards of the stages are."""
    log_VNC = teacher(2, N, C)
    write_all(tmp_path / "targets", log_VNC, 3, meta={"key": "k"}, places=np.arange(N)[::-1])
    same(opened(tmp_path), Targets.load(tmp_path / "targets", N, C))
