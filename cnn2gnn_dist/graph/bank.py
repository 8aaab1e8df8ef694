"""The bank of a graph version: features, projections, labels and candidates of some partitions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.graph.partition.parts import build_union
from cnn2gnn_dist.graph.version import GraphVersion, load_part


class Rows(Protocol):
    """Access to the rows of nodes: a bank in this process, or servers."""

    def local_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the local ids of this rank's seed nodes.

        Raises:
            KeyError: an id is not a seed node of this rank.
        """

    def global_of(self, local: np.ndarray) -> np.ndarray:
        """Return the global ids of local ones; -1 stays -1."""

    def rows(self, local_V: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """x float16 [V, D], z float32 [V, d] and labels int32 [V]."""


@dataclass
class Bank:
    """The rows of some partitions, ready for lookup.

    Attributes:
        x_LD: float16; z_Ld: float32; labels_L: int32, -1 = unknown; all of local rows, or of those
            before the second halo (``load_bank``).
        nodes_L: int32 global ids: inner, first halo, second halo, each ascending.
        num_inner: inner rows.
        table_KM: int32 candidates as local ids, rows of inner and first-halo nodes.
    """

    x_LD: Tensor
    z_Ld: Tensor
    labels_L: Tensor
    nodes_L: np.ndarray
    num_inner: int
    table_KM: np.ndarray

    def local_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the local rows of global ids that are inner here (see ``Rows``).

        Raises:
            KeyError: an id is not.
        """
        inner = self.nodes_L[: self.num_inner]
        local = np.searchsorted(inner, ids)
        if (local >= self.num_inner).any() or (inner[local] != ids).any():
            raise KeyError("a seed node is outside the partitions of this rank")
        return local.astype(np.int64)

    def global_of(self, local: np.ndarray) -> np.ndarray:
        """Return the global ids of local rows; -1 stays -1."""
        return np.where(local >= 0, np.asarray(self.nodes_L)[local], -1)

    def rows(self, local_V: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """x float16 [V, D], z float32 [V, d] and labels int32 [V] of local rows."""
        # index_select takes a tenth of the time of indexing.
        rows = torch.as_tensor(local_V)
        x_VD, z_Vd, labels_V = (
            array.index_select(0, rows) for array in (self.x_LD, self.z_Ld, self.labels_L)
        )
        return x_VD, z_Vd, labels_V


def load_bank(
    version: GraphVersion, parts: Sequence[int] | None = None, second_halo: bool = True
) -> Bank:
    """Load the bank of some partitions with their halos; of all nodes when ``parts`` is None.

    In that case it memory-maps the version's own files: a host holds one copy for all its ranks.

    Args:
        version: the graph.
        parts: of this rank.
        second_halo: whether to load the rows of the second halo. Its ids are loaded either way.
    """
    if parts is None:
        return _mapped_bank(version)
    if len(parts) == 1:
        graph = load_part(version, parts[0])
    else:
        inner = np.flatnonzero(np.isin(version.part, parts))
        graph = build_union(np.asarray(version.candidates), inner)
    nodes = np.asarray(graph.nodes_L)
    loaded = nodes if second_halo else nodes[: graph.num_inner + graph.num_halo1]
    return Bank(
        x_LD=torch.from_numpy(np.ascontiguousarray(version.x[loaded])),
        z_Ld=torch.from_numpy(np.ascontiguousarray(version.z[loaded])),
        labels_L=torch.from_numpy(np.ascontiguousarray(version.labels[loaded])),
        nodes_L=nodes,
        num_inner=graph.num_inner,
        table_KM=np.asarray(graph.table_KM),
    )


def _mapped_bank(version: GraphVersion) -> Bank:
    """All rows, in pages that the processes of a host share until one of them writes."""
    x_LD, z_Ld, labels_L, table_KM = (
        # Copy on write: torch warns about read-only arrays.
        np.load(version.path / f"{name}.npy", mmap_mode="c")
        for name in ("x", "z", "labels", "candidates")
    )
    return Bank(
        x_LD=torch.from_numpy(x_LD),
        z_Ld=torch.from_numpy(z_Ld),
        labels_L=torch.from_numpy(labels_L),
        nodes_L=np.arange(len(labels_L), dtype=np.int32),
        num_inner=len(labels_L),
        table_KM=np.asarray(table_KM),
    )
