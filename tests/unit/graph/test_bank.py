"""Banks: the rows of some parts of a graph version, as stored in its files."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph import bank
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.graph.version import GraphVersion, open_version
from cnn2gnn_dist.stages.neighbours.second_hop import CachedSecondHop
from tests.support.graphs import random_table
from tests.unit.graph.test_version import D, M, N, write


@pytest.mark.parametrize("parts", [[0], [2], [0, 2], [0, 1, 2], None])
def test_bank_rows_are_the_global_rows(tmp_path, parts):
    made = write(tmp_path)
    held = bank.load_bank(open_version(tmp_path / "v0003"), parts)
    nodes = held.nodes_L
    np.testing.assert_array_equal(held.x_LD.numpy(), made["x"][nodes])
    np.testing.assert_array_equal(held.z_Ld.numpy(), made["z"][nodes])
    np.testing.assert_array_equal(held.labels_L.numpy(), made["labels"][nodes])
    inner = np.flatnonzero(np.isin(made["part"], [0, 1, 2] if parts is None else parts))
    np.testing.assert_array_equal(nodes[: held.num_inner], inner)
    rows = len(held.table_KM)
    np.testing.assert_array_equal(nodes[held.table_KM], made["candidates"][nodes[:rows]])
    np.testing.assert_array_equal(nodes[held.local_of(inner[::-1])], inner[::-1])


@pytest.mark.parametrize("parts", [[0], [2], [0, 2], []])
def test_averages_need_no_second_halo(tmp_path, parts):
    """Whether read once from the version or held by the rank, averages and blocks are bit-identical."""
    write(tmp_path)
    version = open_version(tmp_path / "v0003")
    whole = bank.load_bank(version, parts)
    small = bank.load_bank(version, parts, second_halo=False)
    rows = len(small.table_KM)
    assert len(small.x_LD) == len(small.z_Ld) == len(small.labels_L) == rows
    np.testing.assert_array_equal(small.nodes_L, whole.nodes_L)
    from_bank = CachedSecondHop(whole, 2)
    from_version = CachedSecondHop(small, 2, everyone=bank.load_bank(version))
    assert torch.equal(from_version.mean_KD, from_bank.mean_KD)
    assert torch.equal(from_version.p_KM, from_bank.p_KM)
    seeds = np.arange(small.num_inner)
    first = np.asarray(small.table_KM)[: small.num_inner].astype(np.int64)
    one, other = from_version.block(first, seeds), from_bank.block(first, seeds)
    for field in ("x_UD", "z_Ud", "labels_U", "mean_UD", "back_BF", "seed_x_BD", "present_BF"):
        assert torch.equal(getattr(one, field), getattr(other, field)), field


def test_a_seed_of_another_part_is_refused(tmp_path):
    made = write(tmp_path)
    held = bank.load_bank(open_version(tmp_path / "v0003"), [1])
    with pytest.raises(KeyError):
        held.local_of(np.flatnonzero(made["part"] != 1)[:1])


def test_a_rank_without_parts_holds_nothing(tmp_path):
    write(tmp_path)
    held = bank.load_bank(open_version(tmp_path / "v0003"), [])
    assert (held.num_inner, len(held.nodes_L), len(held.table_KM)) == (0, 0, 0)
    assert held.x_LD.shape == (0, D)
    assert len(held.local_of(np.array([], np.int64))) == 0
    with pytest.raises(KeyError):
        held.local_of(np.array([0]))


def test_part_from_its_file_equals_part_from_the_table(tmp_path):
    made = write(tmp_path)
    version = open_version(tmp_path / "v0003")
    for number in range(3):
        inner = np.flatnonzero(made["part"] == number)
        union = partition.build_union(made["candidates"], inner)
        held = bank.load_bank(version, [number])
        np.testing.assert_array_equal(held.nodes_L, union.nodes_L)
        np.testing.assert_array_equal(held.table_KM, union.table_KM)


def test_types_and_copies_of_a_bank(tmp_path):
    write(tmp_path)
    held = bank.load_bank(open_version(tmp_path / "v0003"))
    kinds = (held.x_LD.dtype, held.z_Ld.dtype, held.labels_L.dtype)
    assert kinds == (torch.float16, torch.float32, torch.int32)
    assert (held.nodes_L == np.arange(N)).all()
    held.x_LD.zero_()  # a copy in memory: the file is unchanged
    open_version(tmp_path / "v0003").verify()
    with pytest.raises(KeyError):
        held.local_of(np.array([-1]))
    with pytest.raises(KeyError):
        held.local_of(np.array([3, N]))


def test_the_whole_bank_is_the_files_themselves(tmp_path):
    """Evaluation loads the whole bank on every rank: the ranks of a host share its pages."""
    write(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns about arrays that it must not write to
        held = bank.load_bank(open_version(tmp_path / "v0003"))
    maps = Path("/proc/self/maps").read_text()
    for name in ("x", "z", "labels", "candidates"):
        assert str(tmp_path / "v0003" / f"{name}.npy") in maps
    assert held.num_inner == N


def test_a_partition_of_another_version_is_refused(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    table, part_N = random_table(N, M, 5), np.arange(N) % 3
    shutil.rmtree(tmp_path / "v0002" / "part-01")
    other = partition.build_part(table, part_N.astype(np.int32), 1)
    other.save(tmp_path / "v0002" / "part-01")
    note = tmp_path / "v0002" / "part-01" / "part.json"
    spare = (tmp_path / "v0001" / "part-01" / "part.json").stat().st_size - note.stat().st_size
    note.write_text(note.read_text() + " " * spare)  # of the same size, and valid on its own
    version = GraphVersion(tmp_path / "v0002", {})
    with pytest.raises(UserError, match=r"part-01"):
        bank.load_bank(version, [1])
    shutil.rmtree(tmp_path / "v0001" / "part-02")
    with pytest.raises(UserError, match=r"part-02/.* is missing"):
        bank.load_bank(GraphVersion(tmp_path / "v0001", {}), [2])
