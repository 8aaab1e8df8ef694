"""Parts and halos compared with sets, METIS with random assignment: across processes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.partition import parts as partition
from tests.support.graphs import clustered, random_table


def fixed_addresses() -> bool:
    """Whether a process may turn off address randomization (containers may forbid it)."""
    code = "import ctypes; p = ctypes.CDLL(None).personality; print(p(p(-1) | 0x40000))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return done.returncode == 0 and done.stdout.strip() != "-1"


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_metis_cuts_less_than_chance(parts):
    table = clustered(8, 40, 6)
    shuffled = np.random.default_rng(1).permutation(len(table))
    moved = np.empty_like(table)
    moved[shuffled] = shuffled[table]
    part = partition.assign(moved, parts)
    assert sorted(set(part.tolist())) == list(range(parts))
    assert partition.edge_cut(moved, part) <= 0.25 * (1 - 1 / parts) + 0.1
    if parts > 1:
        chance = partition.edge_cut(moved, np.random.default_rng(2).integers(0, parts, len(table)))
        assert partition.edge_cut(moved, part) < chance / 2


@pytest.mark.parametrize("nodes", [4, 9])
def test_no_part_of_a_tiny_graph_is_empty(nodes):
    part = partition.assign(random_table(nodes, 2, 0), 4)
    assert np.bincount(part, minlength=4).min() >= 1


@pytest.mark.skipif(not fixed_addresses(), reason="elsewhere METIS nearly always repeats itself")
def test_metis_sees_the_nearest_candidates_only():
    """A longer table, with far neighbors after the near ones, is cut like the table of the near ones alone."""
    table = random_table(300, partition.METIS_CANDIDATES + 6, 0)
    near = np.ascontiguousarray(table[:, : partition.METIS_CANDIDATES])
    np.testing.assert_array_equal(partition.assign(table, 4), partition.assign(near, 4))


def test_metis_that_fails_is_the_users_error(monkeypatch):
    monkeypatch.setattr(partition.sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="exit code 1") as raised:
        partition.assign(random_table(9, 2, 0), 2)
    assert "cnn2gnn doctor" in raised.value.remedy


@pytest.mark.skipif(not fixed_addresses(), reason="this kernel lets no process fix its addresses")
def test_metis_starts_at_the_same_addresses_whatever_the_caller(monkeypatch, tmp_path):
    """METIS's result depends on the environment, and on where the loader places things."""
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    plain = partition._plain_environment()
    assert plain["PATH"] == os.environ["PATH"]
    monkeypatch.setenv("WHATEVER", "x" * 37)
    assert partition._plain_environment() == plain
    code = "from cnn2gnn_dist.graph import metis; metis.without_randomisation()"
    # The process is re-executed at fixed addresses, finds no arguments and reports that; nothing is printed after it.
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('still random')"],
        env=plain,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "still random" not in done.stdout
    assert "IndexError" in done.stderr
