"""Nearest neighbors by inner product, exact or by inverted lists; results are deterministic.

For unit vectors the order of inner products is the order of distances. Ties go to the
smaller id, so that a rebuilt graph is the same graph.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from cnn2gnn_dist.errors import UserError

QUERY_BLOCK = 1024
SLACK = 8
"""Extra hits to fetch, so that most ties at the border can be broken by id."""
DEVICE_CELLS = 2**28
"""Similarities held at once on a device (float32: 1 GB)."""


class Index:
    """A searchable base.

    Args:
        base_Nd: float32 rows.
        exact: False: inverted lists (faiss IVF), of which ``probes`` are scanned.
        device: "cpu" (faiss) or "cuda" (blocked matmul and top-k, always exact).

    Attributes:
        flops_per_query: multiply-adds x 2 of one search.
    """

    def __init__(
        self, base_Nd: np.ndarray, *, exact: bool = True, probes: int = 8, device: str = "cpu"
    ) -> None:
        self.base_Nd = np.ascontiguousarray(base_Nd, dtype=np.float32)
        self.nodes, dim = self.base_Nd.shape
        self.flops_per_query = 2.0 * self.nodes * dim
        self._on_device: torch.Tensor | None = None
        self._faiss: Any = None
        self._exact = exact or device == "cuda" or self.nodes < 1000
        if device == "cuda":
            self._on_device = torch.from_numpy(self.base_Nd).cuda()
            return
        import faiss

        if self._exact:
            self._faiss = faiss.IndexFlatIP(dim)
        else:
            lists = max(1, int(4 * self.nodes**0.5))
            self._faiss = faiss.IndexIVFFlat(
                faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT
            )
            self._faiss.cp.seed = 1234
            self._faiss.cp.min_points_per_centroid = 1
            self._faiss.train(self.base_Nd)
            self._faiss.nprobe = probes
            self.flops_per_query = 2.0 * dim * (lists + self.nodes * min(1.0, probes / lists))
        self._faiss.add(self.base_Nd)

    def search(
        self, query_Qd: np.ndarray, m: int, *, exclude: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The m nearest rows of each query: (ids [Q, m] int32, similarities [Q, m] float32).

        ``exclude`` [Q]: a row to exclude from each query's result, -1 = none. Where inverted
        lists hold fewer, ids are -1 and similarities -inf.

        Raises:
            UserError: fewer than m rows remain to choose from.
        """
        left_out = exclude is not None and bool((np.asarray(exclude) >= 0).any())
        if m > self.nodes - left_out:
            raise UserError(
                f"{m} neighbors are requested among {self.nodes} nodes"
                + (", one of which is the query itself" if left_out else ""),
                where="graph.candidates",
                remedy=f"use at most {self.nodes - left_out}, or more training images",
            )
        fetch = min(self.nodes, m + SLACK)
        ids = np.empty((len(query_Qd), m), np.int32)
        sims = np.empty((len(query_Qd), m), np.float32)
        for start in range(0, len(query_Qd), QUERY_BLOCK):
            rows = slice(start, start + QUERY_BLOCK)
            block = np.ascontiguousarray(query_Qd[rows], dtype=np.float32)
            found, near = self._fetch(block, fetch)
            last = near[:, -1]
            if exclude is not None:
                gone = found == np.asarray(exclude)[rows, None]
                found, near = np.where(gone, -1, found), np.where(gone, -np.inf, near)
            ids[rows], sims[rows] = _best(found, near, m)
            if self._exact and fetch < self.nodes:
                # Ties extend beyond the fetched hits: which of them the library returned is arbitrary.
                for row in start + np.flatnonzero(sims[rows, -1] == last):
                    left = -1 if exclude is None else int(exclude[row])
                    ids[row], sims[row] = self._whole_row(query_Qd[row], m, left)
        return ids, sims

    def _whole_row(self, query_d: np.ndarray, m: int, left: int) -> tuple[np.ndarray, np.ndarray]:
        """One query against all rows. Not a matmul: equal rows must give equal results."""
        near_N = np.einsum("nd,d->n", self.base_Nd, np.asarray(query_d, np.float32))
        if left >= 0:
            near_N[left] = -np.inf
        ids = np.argsort(-near_N, kind="stable")[:m]
        return ids, near_N[ids]

    def _fetch(self, block_Qd: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        if self._on_device is None:
            near, found = self._faiss.search(block_Qd, count)
            return found, np.where(found < 0, -np.inf, near)
        return _device_top(self._on_device, block_Qd, count)


def search(
    base_Nd: np.ndarray,
    query_Qd: np.ndarray,
    m: int,
    *,
    exclude_Q: np.ndarray | None = None,
    device: str = "cpu",
    exact: bool = True,
    probes: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """The m nearest base rows of each query; see ``Index``.

    Raises:
        UserError: fewer than m rows remain to choose from.
    """
    index = Index(base_Nd, exact=exact, probes=probes, device=device)
    ids, sims = index.search(query_Qd, m, exclude=exclude_Q)
    if (ids < 0).any():
        # Inverted lists gave too few for some queries: search those few exactly.
        short = np.flatnonzero((ids < 0).any(1))
        whole = Index(base_Nd, exact=True, device=device)
        left = None if exclude_Q is None else exclude_Q[short]
        ids[short], sims[short] = whole.search(query_Qd[short], m, exclude=left)
    return ids, sims


def _device_top(
    base_Nd: torch.Tensor, query_Qd: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and similarities [Q, count] by matmul and top-k on the base's device."""
    found, near = [], []
    for query in torch.from_numpy(query_Qd).split(max(1, DEVICE_CELLS // len(base_Nd))):
        # A live search runs inside the model's autocast, which would make this a bf16 matmul.
        with torch.autocast(base_Nd.device.type, enabled=False):
            near_t, found_t = (query.to(base_Nd.device) @ base_Nd.T).topk(count, dim=1)
        found.append(found_t.cpu().numpy())
        near.append(near_t.cpu().numpy())
    return np.concatenate(found), np.concatenate(near)


def _best(found: np.ndarray, near: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """The first m by descending similarity, ties by ascending id; empty cells (-1) last."""
    order = np.lexsort((np.where(found < 0, np.iinfo(np.int64).max, found), -near), axis=1)[:, :m]
    return np.take_along_axis(found, order, 1), np.take_along_axis(near, order, 1)
