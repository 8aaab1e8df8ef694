"""From the network's outputs to probabilities: temperature, new classes, sets answered together.

``calibration.json`` of a model holds what was fitted on images set apart from training when the model
was exported; a version of the memory contains how its new classes are scored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import Calibration, softmax
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory.old_classes import Images, unit
from cnn2gnn_dist.inference.memory.set_apart import KEY
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.inference.network import Network, Outputs, Rows
from cnn2gnn_dist.inference.sets.class_shares import are_uneven
from cnn2gnn_dist.inference.sets.learned import LearnedSets
from cnn2gnn_dist.inference.sets.relations import Relations
from cnn2gnn_dist.inference.sets.together import Together

FITTED = "calibration.json"
DISTANCES = "near_distance"
"""Column of ``calibration.npz``: squared distances to the neighbors, nearest first."""
_BATCH = 64
REMEDY = (
    "`cnn2gnn run --update` with the config of its run writes RUN/model anew, without what it has forgotten, and keeps "
    "the old one next to it"
)
"""What to do about a model with an earlier rule for sets."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """The images set apart from training, as the network saw them when the model was exported.

    Attributes:
        images: logits with the neighbors, and x.
        labels_n: their classes.
        z_nd: their projections.
    """

    images: Images
    labels_n: np.ndarray
    z_nd: np.ndarray

    @classmethod
    def read(cls, folder: Path, without: Collection[str] = ()) -> HeldOut | None:
        """Read ``calibration.npz`` of a model, without images of these keys; None if it has none."""
        path = artefact.part(folder, artefact.CALIBRATION)
        return None if path is None else cls.of(path, without)

    @classmethod
    def of(cls, path: Path, without: Collection[str] = ()) -> HeldOut:
        """Read a ``calibration.npz``."""
        with np.load(path) as kept:
            stay = np.ones(len(kept["label"]), bool)
            if without and KEY in kept:
                stay = ~np.isin(kept[KEY], list(without))
            images = Images(kept["logits"][stay], kept["x"][stay])
            return cls(images, kept["label"][stay], kept["z"][stay])

    def logits_with(
        self, network: Network, rows: Rows, nearest: Callable[[np.ndarray, int], np.ndarray]
    ) -> np.ndarray:
        """Logits float32 [n, C] of these images, whose neighbors are now among other rows.

        Args:
            network: of the model.
            rows: of the memory as it is, or will be after an edit.
            nearest: gives the nearest of them to projections [B, d]: [B, count]; -1 where there are fewer.
        """
        near_nF = nearest(self.z_nd, network.config.graph.fanout)
        starts = range(0, len(near_nF), _BATCH)
        parts = [slice(at, at + _BATCH) for at in starts]
        found = [
            network.logits_among(rows, self.images.x_nD[some], self.z_nd[some], near_nF[some])
            for some in parts
        ]
        return np.concatenate([self.images.logits_nC[:0], *found])


@dataclass(frozen=True, eq=False)
class Scoring:
    """How a model scores.

    Attributes:
        calibration: None: the model was exported without calibration images; its probabilities are
            softmax's.
        together: None: these images don't tell how similar images of one class are.
        zero_D: mean of x over these images: similarities are measured from there.
        shares_repeat: the rule for sets is from before uneven classes were considered.
        near: k, of the k-th neighbors whose distances are in the calibration; None: the last ones'.
    """

    calibration: Calibration | None = None
    together: LearnedSets | Together | None = None
    zero_D: np.ndarray | None = None
    shares_repeat: bool = False
    near: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Scoring:
        """Read ``calibration.json`` of a model.

        Raises:
            UserError: it is damaged.
        """  # noqa: DOC501
        path = artefact.part(folder, FITTED)
        if path is None:
            return cls()
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            together = tree["together"]
            return cls(
                Calibration.from_json(tree["calibration"]),
                None if together is None else _rule(together),
                np.array(tree["zero"], np.float64),
                together is not None and "shift" not in together and _uneven(folder),
                _near(folder),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise artefact.damaged(path, str(error)) from None

    @property
    def is_earlier(self) -> bool:
        """Whether sets are answered by a rule that this version no longer fits."""
        return self.shares_repeat or isinstance(self.together, Together)

    def probabilities(self, made: Outputs, memory: Memory | None, trained: int) -> np.ndarray:
        """Probabilities float32 [B, classes of the memory]; 0 for new classes without images."""
        classes = trained if memory is None else len(memory.classes)
        found = np.zeros((len(made.logits), classes), np.float32)
        heads = None if memory is None else memory.new_classes
        if heads is None:
            temperature = self.calibration.temperature if self.calibration else 1.0
            found[:, :trained] = softmax(made.logits, temperature)
            return found
        assert memory is not None
        old, new = heads
        columns = [*range(trained), *(memory.classes.index(name) for name in new.names)]
        found[:, columns] = new.probabilities(old, made.logits, made.x)
        return found

    def unusual(self, made: Outputs, memory: Memory | None) -> list[dict[str, float]]:
        """Scores 0..1 of how unlike the training images each image is; empty if not calibrated."""
        if self.calibration is None:
            return [{} for _ in made.logits]
        p_BC = self.calibration.probabilities(made.logits)
        if memory is not None and memory.new_classes is not None:
            p_BC = self.probabilities(made, memory, made.logits.shape[1])
        distance = vote = None
        if memory is not None and made.rows.size:
            found_now = made.distances.shape[1]
            near = found_now if self.near is None else self.near
            # With fewer rows than at the export there is no k-th neighbor, and a nearer one would seem usual.
            distance = made.distances[:, near - 1] if 0 < near <= found_now else None
            vote = votes(made, memory, p_BC.shape[1])
        found = self.calibration.unusual(p_BC, distance, vote)
        columns = {"softmax": found.softmax_B, "distance": found.distance_B, "vote": found.vote_B}
        return [
            {name: round(float(c[row]), 4) for name, c in columns.items() if c is not None}
            for row in range(len(made.logits))
        ]

    def rule_together(self, memory: Memory | None) -> LearnedSets | Together:
        """Return the rule for images answered together.

        Raises:
            UserError: not calibrated, on too few images, or the memory has new classes.
        """
        self.calibrated()
        refuse_new_classes(memory, "images answered together")
        if self.together is None:
            raise UserError(
                "too few images were set apart to tell how similar images of one class are",
                where="data.calibration",
                remedy="train with a larger data.calibration, and export again",
            )
        if self.shares_repeat:
            _log.warning(
                "the model's classes are uneven, and its rule for sets, from before 28 Nov 2026, counts their shares "
                f"once per image: it favors frequent classes; {REMEDY}"
            )
        return self.together

    def answer_together(
        self, made: Outputs, memory: Memory | None, *, same: bool = False
    ) -> Relations:
        """Answer all images of the outputs together; ``same``: they show one class.

        Raises:
            UserError: see ``rule_together``.
        """
        rule = self.rule_together(memory)
        if same:
            return rule.same(made.logits)
        assert self.zero_D is not None
        return rule(made.logits, unit(made.x.astype(np.float64) - self.zero_D))

    def calibrated(self) -> Calibration:
        """Return the calibration.

        Raises:
            UserError: there is none.
        """
        if self.calibration is None:
            raise UserError(
                "this model is not calibrated: no images were set apart when it was trained",
                where="data.calibration",
                remedy="train with data.calibration=0.05, and export again",
            )
        return self.calibration


def refuse_new_classes(memory: Memory | None, what: str) -> None:
    """Refuse what was fitted for the trained classes alone.

    Raises:
        UserError: the memory has new classes.
    """
    if memory is not None and memory.new_classes is not None:
        raise UserError(
            f"{what} know only the trained classes, and the memory has new ones",
            where="memory",
            remedy="leave the option out, or train again with the new classes",
        )


def _uneven(folder: Path) -> bool:
    """Whether the images set apart show classes that are uneven; a model without them can't tell."""
    held_out = HeldOut.read(folder)
    if held_out is None:
        return False
    return are_uneven(held_out.labels_n, held_out.images.logits_nC.shape[1])


def _near(folder: Path) -> int | None:
    """How many neighbors the images set apart had; None: it is not known."""
    path = artefact.part(folder, artefact.CALIBRATION)
    if path is None:
        return None
    with np.load(path) as kept:
        return int(kept[DISTANCES].shape[1]) if DISTANCES in kept else None


def _rule(kept: dict[str, Any]) -> LearnedSets | Together:
    """Models from before the rule was learned hold rule T."""
    return LearnedSets.from_json(kept) if "network" in kept else Together.from_json(kept)


def votes(made: Outputs, memory: Memory, classes: int) -> np.ndarray:
    """Weights of the neighbors, summed by class: float32 [B, classes]; those of later classes don't count."""
    labels = memory.labels[made.rows.clip(min=0)]
    found = np.zeros((len(made.rows), classes), np.float32)
    keep = (made.rows >= 0) & (labels < classes)
    rows = np.broadcast_to(np.arange(len(labels))[:, None], labels.shape)
    np.add.at(found, (rows[keep], labels[keep]), made.weights[keep])
    return found


def write(folder: Path) -> None:
    """Fit what a model's ``calibration.npz`` allows, and write ``calibration.json``.

    A change of what it fits raises ``version.calibration`` (``pipeline/registry.py``): keys of runs include it.

    Raises:
        UserError: the network's outputs for these images are not finite.
    """
    path = folder / artefact.CALIBRATION
    if not path.is_file():
        return
    held_out = HeldOut.of(path)  # the checksums, which would list it, are written last
    logits_nC, x_nD = held_out.images.logits_nC, held_out.images.x_nD
    strange = int((~(np.isfinite(logits_nC).all(1) & np.isfinite(x_nD).all(1))).sum())
    if strange:
        raise UserError(
            f"the student's outputs for {strange} of {len(logits_nC)} calibration images are not finite",
            where="the stage student",
            remedy="check its loss in student/metrics.jsonl; retrain it with a smaller student.lr",
        )
    with np.load(path) as kept:
        distances = kept[DISTANCES]
    fitted = Calibration.fit(
        logits_nC,
        held_out.labels_n,
        distances[:, -1] if distances.shape[1] else None,
    )
    x_nD = np.asarray(x_nD, np.float64)
    zero_D = x_nD.mean(0)
    try:
        together: dict[str, Any] | None = LearnedSets.fit(
            logits_nC,
            unit(x_nD - zero_D),
            held_out.labels_n,
            temperature=fitted.temperature,
        ).to_json()
    except UserError:  # too few images: single answers are calibrated nevertheless
        together = None
    text = json.dumps(
        {"calibration": fitted.to_json(), "together": together, "zero": zero_D.tolist()}
    )
    durable.write_text(folder / FITTED, text)
