"""Some of the rows of an edited memory, as the network sees them without the others."""

from __future__ import annotations

import numpy as np

from cnn2gnn_dist.inference.memory import rewiring
from cnn2gnn_dist.inference.memory.edits import Edit


class Subset:
    """Rows of an edit (``network.Rows``): those of old classes, or all that are live after it.

    Args:
        edit: which must not change any more.
        trained_only: without rows of new classes.
    """

    def __init__(self, edit: Edit, *, trained_only: bool) -> None:
        self._edit, self.labels, self.trained = edit, edit.labels, edit.trained
        live_N = edit.live & (edit.labels < edit.trained) if trained_only else edit.live
        self._live_ids = np.flatnonzero(live_N)
        self._changed = edit.rewired(live_N)

    def x(self, ids: np.ndarray) -> np.ndarray:
        """Features of rows."""
        return self._edit.x(ids)

    def z(self, ids: np.ndarray) -> np.ndarray:
        """Projections of rows."""
        return self._edit.z(ids)

    def candidates(self, ids: np.ndarray) -> np.ndarray:
        """int32 [n, M]: the candidates of these rows, nearest first; -1 = none."""
        return rewiring.candidates(self._edit.before.base_table, self._changed, ids)

    def nearest(self, z_Bd: np.ndarray, count: int) -> np.ndarray:
        """int64 [B, count]: the nearest of these rows; -1 where there are fewer. Ties by row."""
        return rewiring.nearest(self._edit.all_z(), self._live_ids, z_Bd, count)
