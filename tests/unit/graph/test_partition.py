"""Parts and halos compared with sets, METIS with random assignment."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.partition import parts as partition
from tests.support.graphs import clustered, random_table


@settings(deadline=None, max_examples=60)
@given(
    nodes=st.integers(3, 40),
    width=st.integers(1, 6),
    parts=st.integers(1, 4),
    seed=st.integers(0, 99),
    holes=st.booleans(),
)
def test_two_hops_of_every_inner_node_are_at_hand(nodes, width, parts, seed, holes):
    table = random_table(nodes, min(width, nodes - 1), seed, holes)
    part_N = np.random.default_rng(seed).integers(0, parts, nodes).astype(np.int32)
    seen = []
    for number in range(parts):
        part = partition.build_part(table, part_N, number)
        inner = part.nodes_L[: part.num_inner]
        rows = part.nodes_L[: part.num_inner + part.num_halo1]
        seen += inner.tolist()
        assert set(inner) == {i for i in range(nodes) if part_N[i] == number}
        first = {int(j) for i in inner for j in table[i] if j >= 0} - set(inner.tolist())
        assert set(rows[part.num_inner :].tolist()) == first
        second = {int(j) for i in rows for j in table[i] if j >= 0} - set(rows.tolist())
        assert set(part.nodes_L[len(rows) :].tolist()) == second
        back = np.append(part.nodes_L, -1)[part.table_KM]
        np.testing.assert_array_equal(back, table[rows])
    assert sorted(seen) == list(range(nodes))


def test_edge_cut_by_a_loop():
    table = random_table(30, 4, 0, holes=True)
    part = np.arange(30) % 3
    edges = [(i, j) for i, row in enumerate(table) for j in row if j >= 0]
    cut = sum(part[i] != part[j] for i, j in edges)
    assert partition.edge_cut(table, part) == pytest.approx(cut / len(edges))


@pytest.mark.parametrize(("nodes", "parts"), [(10, 1), (10, 3), (7, 7)])
def test_ranges_are_equal_stretches(nodes, parts):
    part = partition.assign_ranges(random_table(nodes, 2, 0), parts)
    counts = np.bincount(part, minlength=parts)
    assert (np.diff(part) >= 0).all()
    assert counts.max() - counts.min() <= 1


def test_more_parts_than_nodes():
    with pytest.raises(UserError, match="5 partitions for only 4 nodes"):
        partition.assign(random_table(4, 2, 0), 5)


def test_relabelling_is_a_stable_sort():
    part = np.random.default_rng(0).integers(0, 5, 100)
    wanted = torch.sort(torch.from_numpy(part), stable=True)[1].numpy()
    np.testing.assert_array_equal(partition.new_ids(part), wanted)


def test_saved_and_read_again_and_damage_is_noticed(tmp_path):
    table = random_table(30, 4, 0)
    part = partition.build_part(table, np.arange(30) % 2, 1)
    part.save(tmp_path / "part")
    again = partition.PartGraph.load(tmp_path / "part")
    np.testing.assert_array_equal(again.nodes_L, part.nodes_L)
    np.testing.assert_array_equal(again.table_KM, part.table_KM)
    assert (again.part, again.num_inner, again.num_halo1) == (1, part.num_inner, part.num_halo1)

    file = tmp_path / "part" / "table.npy"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(UserError, match="checksum"):
        partition.PartGraph.load(tmp_path / "part")
    (tmp_path / "part" / "part.json").unlink()
    with pytest.raises(UserError, match="can't be used"):
        partition.PartGraph.load(tmp_path / "part")


@pytest.mark.thorough
def test_no_single_flipped_bit_passes_or_crashes(tmp_path):
    part = partition.build_part(random_table(9, 2, 0), np.arange(9) % 2, 1)
    part.save(tmp_path)
    refused = 0
    for name in ("nodes.npy", "table.npy", "part.json"):
        file = tmp_path / name
        good = file.read_bytes()
        for place in range(len(good)):
            for bit in (0, 1, 3, 6):
                bad = bytearray(good)
                bad[place] ^= 1 << bit
                file.write_bytes(bytes(bad))
                try:
                    again = partition.PartGraph.load(tmp_path)
                except UserError:
                    refused += 1
                    continue
                # The bit was in padding of a header, or in the number in ``part.json``: no array depends on it.
                assert (again.num_inner, again.num_halo1) == (part.num_inner, part.num_halo1)
                assert again.nodes_L.dtype == np.int32
                assert again.table_KM.dtype == np.int32
                np.testing.assert_array_equal(again.nodes_L, part.nodes_L)
                np.testing.assert_array_equal(again.table_KM, part.table_KM)
        file.write_bytes(good)
    assert refused > 1000


@pytest.mark.parametrize("name", ["nodes.npy", "table.npy", "part.json"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_file_cut_off_is_refused(tmp_path, name, share):
    partition.build_part(random_table(30, 4, 0), np.arange(30) % 2, 0).save(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="can't be used") as raised:
        partition.PartGraph.load(tmp_path)
    assert str(tmp_path) in raised.value.where


@pytest.mark.parametrize("note", ["[]", "null", "{}", '{"sha256": null}', "3"])
def test_a_note_of_another_form_is_refused(tmp_path, note):
    partition.build_part(random_table(9, 2, 0), np.arange(9) % 2, 0).save(tmp_path)
    (tmp_path / "part.json").write_text(note)
    with pytest.raises(UserError, match="can't be used"):
        partition.PartGraph.load(tmp_path)


@pytest.mark.parametrize(("inner", "halo1"), [(-1, 10), (10, -1), (9, 9), (1, 1)])
def test_counts_that_do_not_fit_are_refused(tmp_path, inner, halo1):
    part = partition.build_part(random_table(9, 2, 0), np.zeros(9, np.int32), 0)
    part.save(tmp_path)
    assert part.num_inner == len(part.table_KM) == 9
    note = json.loads((tmp_path / "part.json").read_text())
    (tmp_path / "part.json").write_text(
        json.dumps({**note, "num_inner": inner, "num_halo1": halo1})
    )
    with pytest.raises(UserError, match="counts don't match"):
        partition.PartGraph.load(tmp_path)


def test_table_of_a_part_whose_neighbours_are_all_inside():
    table = clustered(2, 10, 3)
    table = np.where(table // 10 == np.arange(20)[:, None] // 10, table, -1)
    part = partition.build_part(table, np.arange(20) // 10, 1)
    assert (part.num_inner, part.num_halo1, len(part.nodes_L)) == (10, 0, 10)
    assert partition.edge_cut(table, np.arange(20) // 10) == 0.0
    assert partition.edge_cut(np.full((4, 2), -1), np.arange(4)) == 0.0
    one_edge = np.array([[1], [-1], [-1], [-1]])
    assert partition.edge_cut(one_edge, np.arange(4)) == 1.0


def test_empty_parts_get_a_node_of_the_largest():
    part = partition._fill_empty(np.array([2, 2, 2, 2, 0, 0], np.int32), 4)
    assert part.tolist() == [2, 2, 3, 1, 0, 0]


def test_summary_counts_every_node():
    table, part_N = random_table(40, 3, 0), np.arange(40) % 3
    parts = [partition.build_part(table, part_N, number) for number in range(3)]
    told = partition.summary(table, part_N, [part.size for part in parts])
    assert told["inner"] == [14, 13, 13]
    assert told["cut"] == partition.edge_cut(table, part_N)
    for part, inner, one, two in zip(
        parts, told["inner"], told["halo1"], told["halo2"], strict=True
    ):
        assert inner + one + two == len(part.nodes_L)
        assert inner + one == len(part.table_KM)


def test_a_part_without_a_halo_is_read_again(tmp_path):
    table_NM = np.array([[1], [0], [3], [2]], np.int32)
    made = partition.build_part(table_NM, np.array([0, 0, 1, 1]), 1)
    assert (made.num_inner, made.num_halo1) == (2, 0)
    made.save(tmp_path)
    found = partition.PartGraph.load(tmp_path)
    assert (found.num_inner, found.num_halo1) == (2, 0)
    np.testing.assert_array_equal(found.nodes_L, [2, 3])
    np.testing.assert_array_equal(found.table_KM, made.table_KM)
