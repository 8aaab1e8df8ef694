"""Soft targets as one memory map per host: across processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.errors import UserError
from tests.support import own_mounts, rank_group
from tests.unit.data.test_target_arrays import C, N, made, opened, same


def ranks_open(root: str) -> str:
    """A case of ``rank_group``: the contents of this rank's memory map, or its error."""
    try:
        found = opened(Path(root))
    except UserError as error:
        return f"{error.what} | {error.where}"
    rows = found.lookup(np.arange(N), 1)
    return rows.tobytes().hex()


@pytest.mark.parametrize("k", [3, C])
def test_ranks_fill_what_a_plain_reading_gives(tmp_path, k):
    wanted = made(tmp_path, k)
    rows = wanted.lookup(np.arange(N), 1).tobytes().hex()
    assert rank_group.run(ranks_open, 2, str(tmp_path)) == [rows] * 2
    inode = (tmp_path / "targets" / "dense" / "log_probs.npy").stat().st_ino
    same(opened(tmp_path), wanted)
    assert (tmp_path / "targets" / "dense" / "log_probs.npy").stat().st_ino == inode, "made twice"
    assert not (tmp_path / "targets" / "dense.tmp").exists()


def test_one_ranks_damaged_file_is_refused_on_all(tmp_path):
    made(tmp_path, 3)
    damaged = sorted((tmp_path / "targets").glob("*.parquet"))[1]  # the second rank reads it
    data = bytearray(damaged.read_bytes())
    data[200] ^= 0xFF
    damaged.write_bytes(data)
    said = rank_group.run(ranks_open, 2, str(tmp_path))
    assert said[0] == said[1]
    assert "can't be used" in said[0]
    assert str(damaged) in said[0]
    assert not (tmp_path / "targets" / "dense").exists()


ON_A_SMALL_DISK = """
import contextlib, json, subprocess, sys
from pathlib import Path
from tests.unit.data import test_target_arrays as t
root = Path(sys.argv[1])
def mount(how):
    subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", str(root / "targets")], check=True)
(root / "targets").mkdir()
mount("size=400k")
wanted = t.made(root, 3)
said, ballast = [], root / "targets" / "ballast"
with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
    while file.write(bytes(4096)):
        pass
try:
    t.opened(root)
except t.UserError as error:
    said.append(error.what)
mount("remount,ro")
found = t.opened(root)
t.np.testing.assert_array_equal(found.log_probs_VNK, wanted.log_probs_VNK)
said.append(type(found.log_probs_VNK).__name__)
mount("remount,rw,size=4m")
t.same(t.opened(root), wanted)
said.append("room")
print(json.dumps(said))
"""


@own_mounts.needed
def test_a_full_disk_is_named_and_a_read_only_one_is_read_into_memory(tmp_path):
    full, read_only, room = own_mounts.run("-c", ON_A_SMALL_DISK, str(tmp_path))
    assert "disk full" in full
    assert (read_only, room) == ("ndarray", "room")
