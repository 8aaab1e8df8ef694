"""The images set apart for calibration: which they are, and how they are forgotten.

They are in no memory, but ``calibration.npz`` of the model keeps the network's outputs for them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np

from cnn2gnn_dist.inference.folder import artefact

KEY = "key"
"""Column with the images' keys; models exported before 28 Nov 2026 lack it."""


class SetApart:
    """The images that a model was calibrated on.

    Args:
        folder: of the model.

    Raises:
        UserError: the checksums are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = artefact.part(folder, artefact.CALIBRATION)

    @property
    def unnamed(self) -> int:
        """Number of images whose keys the model does not have."""
        if self._path is None:
            return 0
        with np.load(self._path) as kept:
            return 0 if KEY in kept else len(kept["label"])

    def keys(self) -> set[str]:
        """Keys of the images; empty if the model does not have them."""
        if self._path is None:
            return set()
        with np.load(self._path) as kept:
            return set(kept[KEY].tolist()) if KEY in kept else set()

    def forget(self, keys: Collection[str]) -> None:
        """Delete the outputs for images; keys of others are ignored.

        What was fitted on them (``calibration.json``) stays as it is.

        Raises:
            UserError: the disk is full; nothing was changed.
        """
        if self._path is None:
            return
        artefact.finish_replacing(self._folder)
        if self.keys().isdisjoint(keys):
            return
        with np.load(self._path) as kept:
            columns = dict(kept)
        stay = ~np.isin(columns[KEY], list(keys))
        columns = {name: column[stay] for name, column in columns.items()}
        with (
            artefact.replacing_part(self._folder, artefact.CALIBRATION) as temporary,
            open(temporary, "wb") as file,  # savez would append .npz to a name
        ):
            np.savez(file, **columns)
