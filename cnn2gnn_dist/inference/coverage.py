"""Sets with a stated coverage, for the memory as it is: an edit changes what calibration images are answered."""

from __future__ import annotations

import logging
import threading
import weakref
from pathlib import Path

import numpy as np

from cnn2gnn_dist.inference.calibration import ConformalSets
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.inference.network import Network, Outputs
from cnn2gnn_dist.inference.scoring import HeldOut, Scoring, refuse_new_classes

_log = logging.getLogger(__name__)


class Coverage:
    """The sets of a model; safe to use from several threads.

    What the export fitted holds for the memory that it wrote. For an edited one the calibration images are answered
    again from what was stored of them, once for each version, when sets are first requested: about as long as it
    takes to find their neighbors. The temperature stays.

    Args:
        folder: of the model.
        network, scoring: its contents.
        identity: of the model that was opened (``artefact.identity``).
    """

    def __init__(
        self, folder: Path, network: Network, scoring: Scoring, identity: tuple[str, str]
    ) -> None:
        self._folder, self._network, self._scoring = folder, network, scoring
        self._identity = identity
        self._lock = threading.Lock()
        self._found: tuple[weakref.ref[Memory], ConformalSets] | None = None

    def check(self, coverage: float | None, memory: Memory | None) -> None:
        """Check that sets with this coverage can be given; None: none are requested.

        Raises:
            UserError: not calibrated, on too few images, or the memory has new classes.
        """
        if coverage is None:
            return
        self._scoring.calibrated().sets.threshold(coverage)
        refuse_new_classes(memory, "sets with a coverage")
        self._sets(memory).threshold(coverage)

    def sets(self, made: Outputs, coverage: float, memory: Memory | None) -> np.ndarray:
        """Bool [B, C]: sets of trained classes that hold the true one with this coverage.

        Args:
            made: the network's outputs for B images, with this version of the memory.
            coverage: between 0 and 1.
            memory: None: there is none.

        Raises:
            UserError: the model is not calibrated, or on too few images for this coverage; the folder holds another
                model by now.
        """
        p_BC = self._scoring.calibrated().probabilities(made.logits)
        return self._sets(memory).sets(p_BC, coverage)

    def _sets(self, memory: Memory | None) -> ConformalSets:
        exported = self._scoring.calibrated().sets
        if memory is None or memory.version.number == 0:
            return exported
        with self._lock:
            if self._found is None or self._found[0]() is not memory:
                self._found = weakref.ref(memory), self._fitted(memory) or exported
            return self._found[1]

    def _fitted(self, memory: Memory) -> ConformalSets | None:
        held_out = HeldOut.read(self._folder)
        artefact.check_unchanged(
            self._folder, self._identity
        )  # afterwards: what was read is of this model
        if held_out is None or not len(held_out.labels_n):
            _log.warning(
                "no image set apart is left: the coverage is that of the memory before it was edited"
            )
            return None
        logits_nC = held_out.logits_with(self._network, memory, memory.nearest)
        p_nC = self._scoring.calibrated().probabilities(logits_nC)
        return ConformalSets.fit(p_nC, held_out.labels_n)
