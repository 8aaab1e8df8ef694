"""Parts of the neighbor graph: DGL's METIS assigns nodes, halos hold two hops locally.

An edge runs from each node to its candidates. A part holds its inner nodes, the first halo
(their candidates) and the second halo (those nodes' candidates): two layers need no row
from elsewhere. (DGL's own halos of a directed graph have truncated lists at one hop.)
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError

ARRAYS = ("nodes", "table")
METIS_CANDIDATES = 12
"""Nearest candidates passed to METIS: 16 cut 1 to 5 % fewer edges and take a quarter more memory."""
PACKAGE_PARENT = Path(__file__).resolve().parents[3]


def assign(table_NM: np.ndarray, parts: int) -> np.ndarray:
    """[N] int32 part of each node, by DGL's METIS on the undirected graph.

    The same graph gives the same parts, where the kernel lets a process fix its addresses (``metis.py``).

    Raises:
        UserError: more parts than nodes.
    """
    nodes = len(table_NM)
    if parts > nodes:
        raise UserError(
            f"{parts} partitions for only {nodes} nodes",
            where="graph.partition.parts",
            remedy="use fewer partitions",
        )
    if parts == 1:
        return np.zeros(nodes, np.int32)
    with tempfile.TemporaryDirectory(prefix="metis-") as folder:
        durable.write_array(Path(folder) / "table.npy", table_NM[:, :METIS_CANDIDATES])
        command = [sys.executable, "-m", "cnn2gnn_dist.graph.metis", "table.npy", "part.npy"]
        done = subprocess.run(
            [*command, str(parts)],
            cwd=folder,
            env=_plain_environment(),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise UserError(
                f"METIS failed with exit code {done.returncode}: {done.stderr[-500:]}",
                where="graph.partition.parts",
                remedy="check with `cnn2gnn doctor` whether DGL works here, and with `cnn2gnn "
                "plan` how much memory METIS needs; graph.partition.partitioner=streaming needs "
                "a tenth of it",
            )
        part_N = np.load(Path(folder) / "part.npy")
    return _fill_empty(part_N, parts)


def _plain_environment() -> dict[str, str]:
    """A fixed environment for every caller: METIS's result depends on where the stack begins."""
    path = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    needed = ("PATH", "HOME", "LD_LIBRARY_PATH")
    return {
        **{name: os.environ[name] for name in needed if name in os.environ},
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "DGLBACKEND": "pytorch",
    }


def assign_ranges(table_NM: np.ndarray, parts: int) -> np.ndarray:
    """[N] int32 part of each node: equal ranges of ids, regardless of the graph."""
    nodes = len(table_NM)
    return (np.arange(nodes, dtype=np.int64) * parts // nodes).astype(np.int32)


def edge_cut(table_NM: np.ndarray, part_N: np.ndarray) -> float:
    """Fraction of edges whose ends are in different parts."""
    there = table_NM >= 0
    cut = (part_N[table_NM] != part_N[:, None]) & there
    return float(cut.sum() / max(there.sum(), 1))


def new_ids(part_N: np.ndarray) -> np.ndarray:
    """Old id of each new one, when nodes are renumbered part by part (as DGL does)."""
    return np.argsort(part_N, kind="stable")


class PartSize(NamedTuple):
    """Numbers of nodes of a part: its own, and of its first and second halo."""

    inner: int
    halo1: int
    halo2: int


@dataclass
class PartGraph:
    """One part with its halos.

    Attributes:
        part: its number.
        nodes_L: int32 global ids: inner, first halo, second halo, each ascending.
        num_inner, num_halo1: size of the first and of the second group.
        table_KM: int32 candidates as local ids, rows of inner and first-halo nodes; -1 = none.
    """

    part: int
    nodes_L: np.ndarray
    num_inner: int
    num_halo1: int
    table_KM: np.ndarray

    @property
    def size(self) -> PartSize:
        """Numbers of its nodes."""
        rest = len(self.nodes_L) - self.num_inner - self.num_halo1
        return PartSize(self.num_inner, self.num_halo1, rest)

    def save(self, folder: Path) -> None:
        """Write ``nodes.npy``, ``table.npy`` and ``part.json`` with their checksums.

        Raises:
            UserError: the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        arrays = dict(zip(ARRAYS, (self.nodes_L, self.table_KM), strict=True))
        for name, array in arrays.items():
            durable.write_array(folder / f"{name}.npy", array)
        note = {
            "part": self.part,
            "num_inner": self.num_inner,
            "num_halo1": self.num_halo1,
            "sha256": {name: _sha256(array) for name, array in arrays.items()},
        }
        (folder / "part.json").write_text(json.dumps(note, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> PartGraph:
        """Read a part.

        Raises:
            UserError: missing or corrupt.
        """  # noqa: DOC501
        try:
            note = json.loads((folder / "part.json").read_text(encoding="utf-8"))
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
            whole = all(_sha256(array) == note["sha256"][name] for name, array in arrays.items())
            part, inner, halo1 = (int(note[name]) for name in ("part", "num_inner", "num_halo1"))
        except Exception as error:  # numpy's reader raises a dozen types for a corrupt header
            raise _damaged(folder, f"{type(error).__name__}: {error}") from None
        if not whole:
            raise _damaged(folder, "a checksum does not match")
        nodes, table = arrays["nodes"], arrays["table"]
        # Checksums cover only the values: a header or ``part.json`` may still misdescribe them.
        if (nodes.dtype, nodes.ndim, table.dtype, table.ndim) != (np.int32, 1, np.int32, 2):
            raise _damaged(folder, "its arrays have the wrong type or shape")
        if min(inner, halo1) < 0 or not inner + halo1 == len(table) <= len(nodes):
            raise _damaged(folder, "its counts don't match its arrays")
        return cls(part, nodes, inner, halo1, table)


def build_part(table_NM: np.ndarray, part_N: np.ndarray, part: int) -> PartGraph:
    """Cut one part out of the global table."""
    return build_union(table_NM, np.flatnonzero(part_N == part), part)


def build_union(table_NM: np.ndarray, inner: np.ndarray, part: int = -1) -> PartGraph:
    """Build the part whose inner nodes are ``inner`` (ascending global ids)."""
    known = np.zeros(len(table_NM), bool)
    known[inner] = True
    halo1 = _reached(table_NM[inner], known)
    halo2 = _reached(table_NM[halo1], known)
    nodes = np.concatenate([inner, halo1, halo2]).astype(np.int32)
    local = np.full(len(table_NM) + 1, -1, np.int32)  # the last entry stands for the id -1
    local[nodes] = np.arange(len(nodes), dtype=np.int32)
    rows = nodes[: len(inner) + len(halo1)]
    return PartGraph(part, nodes, len(inner), len(halo1), local[table_NM[rows]])


def summary(table_NM: np.ndarray, part_N: np.ndarray, sizes: Sequence[PartSize]) -> dict[str, Any]:
    """Edge cut (fraction of edges), and the numbers of inner and halo nodes of each part."""
    return {
        "cut": edge_cut(table_NM, part_N),
        "inner": [size.inner for size in sizes],
        "halo1": [size.halo1 for size in sizes],
        "halo2": [size.halo2 for size in sizes],
    }


def _reached(candidates: np.ndarray, known_N: np.ndarray) -> np.ndarray:
    """Candidates (not -1) that are not known yet, ascending; marks them as known.

    Uses a mark array: sorting two million candidates takes a hundred times as long.
    """
    seen = np.zeros(len(known_N) + 1, bool)  # the last entry stands for the id -1
    seen[candidates] = True
    found = np.flatnonzero(seen[:-1] & ~known_N)
    known_N[found] = True
    return found


def _fill_empty(part_N: np.ndarray, parts: int) -> np.ndarray:
    """METIS may leave a part of a tiny graph empty: move a node there from the largest part."""
    counts = np.bincount(part_N, minlength=parts)
    for empty in np.flatnonzero(counts == 0):
        largest = int(np.argmax(counts))
        part_N[np.flatnonzero(part_N == largest)[-1]] = empty
        counts[largest] -= 1
        counts[empty] += 1
    return part_N


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(
        f"this partition can't be used: {what}",
        where=str(folder),
        remedy="remove its graph version; the stage rebuilds it",
    )
