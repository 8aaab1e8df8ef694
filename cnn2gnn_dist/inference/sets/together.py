"""Rule T: images that belong together, answered together by a rule composed by hand.

Models that were exported before ``learned.py`` hold it, and ``learned.py`` is measured against it.

A set of m images with logits l_i and features z_i, in five steps:

1. **Gate** (``related.py``). Is the set related? Only if its score exceeds those of nearly all random sets of
   calibration images of this size. Otherwise every image is answered alone, bit-identical to its answer in
   isolation.
2. **Edges** W_ij = max(2σ(a·cos(z_i, z_j) + b) − 1, 0), where σ is the probability that two images are of
   one class, fitted by logistic regression on pairs of calibration images (as many of one class as of
   two, by weight): pairs more likely of two classes have no edge. The 15 largest of a row are kept, the
   diagonal is 0, and rows with a sum above 1 are divided by it: many weak edges don't outweigh an image's own
   logits, and unrelated images have no edges.
3. **EM** (Dempster et al., 1977; for class priors: Saerens, Latinne, Decaestecker, 2002), 30 rounds from q = p:
   π = (Σ_i q_i + α) / (m + Cα), then q_i = softmax(l_i/T + log(Cπ) + λ Σ_j W_ij q_j), all i at once.
4. **One class?** (``one_class.py``) If the set is found to be of a single class, the answer is that for a set known to
   be: the mean of the logits.
5. Otherwise the answer is q. In both cases it is marked as depending on the other images.

If the set is *known* to be of one class, averaging the logits is best, or close to it (``same``).

Shapes: n calibration images, m images of a set, C classes, d dimensions of z (of unit length).
Pure: arrays in, arrays out; equivariant to the order of a set, up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cnn2gnn_dist.inference.calibration import fit_temperature, log_softmax, softmax
from cnn2gnn_dist.inference.sets.logistic import sigmoid
from cnn2gnn_dist.inference.sets.one_class import fit_one_class, measures
from cnn2gnn_dist.inference.sets.pairs import PairOdds
from cnn2gnn_dist.inference.sets.related import agreement_gate, fit_related, related_score
from cnn2gnn_dist.inference.sets.relations import Relations, same_class
from cnn2gnn_dist.inference.sets.set_gate import SetGate, scores

LAMBDA, ALPHA, ROUNDS, EDGES = 1.0, 0.02, 30, 15


@dataclass(frozen=True)
class Together:
    """The rule with its constants.

    Attributes:
        temperature: T of the logits.
        slope, offset: a and b of the edges.
        gate: whether a set is related; None: every set is.
        one_class: whether a related set is of one class; None: none is.
        strength, alpha: λ and α.
    """

    temperature: float
    slope: float
    offset: float
    gate: SetGate | None
    one_class: SetGate | None = None
    strength: float = LAMBDA
    alpha: float = ALPHA

    def __call__(self, logits_mC: np.ndarray, z_md: np.ndarray) -> Relations:
        """Answer a set of images.

        Args:
            logits_mC: as in ``fit``.
            z_md: features of unit length, as in ``fit``; leave out zero vectors (images that can't be
                read), whose edges mean nothing.
        """
        p_mC = softmax(logits_mC, self.temperature)
        count = len(p_mC)
        if count < 2:
            return Relations(p_mC, False, count, 0.0, 1.0)
        score, threshold = 1.0, 0.0
        if self.gate is not None:
            z_md = np.asarray(z_md, np.float64)
            log_odds_mm = self.slope * (z_md @ z_md.T) + self.offset
            score, threshold = related_score(self.gate, p_mC, log_odds_mm)
        if not score > threshold:
            return Relations(p_mC, False, len(np.unique(p_mC.argmax(1))), score, threshold)
        log_p_mC = log_softmax(logits_mC, self.temperature)
        q_mC = self.em(log_p_mC[None], self.edges(z_md)[None])[0]
        if self.one_class is not None:
            of = self.one_class.at(count)
            if scores(of, measures(log_p_mC[None], q_mC[None], self.alpha))[0] > of.threshold:
                return replace(self.same(logits_mC), score=score, threshold=threshold)
        return Relations(q_mC, True, len(np.unique(q_mC.argmax(1))), score, threshold)

    def same(self, logits_mC: np.ndarray) -> Relations:
        """Answer a set that is known to be of one class."""
        return same_class(logits_mC, self.temperature)

    def edges(self, z_md: np.ndarray) -> np.ndarray:
        """W, float64 [m, m]: at most EDGES per row, none to itself; ties go to the smaller index."""
        z_md = np.asarray(z_md, np.float64)
        edges_mm = 2 * sigmoid(self.slope * (z_md @ z_md.T) + self.offset) - 1
        edges_mm = edges_mm.clip(min=0)
        np.fill_diagonal(edges_mm, 0.0)
        if len(z_md) > EDGES + 1:
            order_mm = np.argsort(-edges_mm, axis=1, kind="stable")
            np.put_along_axis(edges_mm, order_mm[:, EDGES:], 0.0, axis=1)
        return edges_mm / np.maximum(edges_mm.sum(1, keepdims=True), 1.0)

    def em(self, log_p_SmC: np.ndarray, edges_Smm: np.ndarray) -> np.ndarray:
        """Return q of S sets after ROUNDS rounds: float64 [S, m, C]."""
        count, classes = log_p_SmC.shape[1:]
        q_SmC = np.exp(log_p_SmC)
        for _ in range(ROUNDS):
            prior_SC = (q_SmC.sum(1) + self.alpha) / (count + classes * self.alpha)
            company_SmC = self.strength * (edges_Smm @ q_SmC)
            raw_SmC = log_p_SmC + np.log(classes * prior_SC)[:, None] + company_SmC
            q_SmC = softmax(raw_SmC.reshape(-1, classes)).reshape(raw_SmC.shape)
        return q_SmC

    @classmethod
    def fit(
        cls,
        logits_nC: np.ndarray,
        z_nd: np.ndarray,
        labels_n: np.ndarray,
        *,
        temperature: float | None = None,
        seed: int = 0,
    ) -> Together:
        """Fit the constants on calibration images; bit-identical for the same seed.

        Args:
            logits_nC: of calibration images.
            z_nd: their features, of unit length: the stem's x, centered (``OldClasses.features``), separates
                classes better than the graph's projection.
            labels_n: their classes.
            temperature: T, if it is already fitted.
            seed: of the random sets and of the images whose pairs are compared.

        Raises:
            UserError: fewer than 4 calibration images, no two of one class, or only one class.
        """
        labels_n = np.asarray(labels_n)
        odds = PairOdds.fit(np.asarray(z_nd), labels_n, np.random.default_rng([seed, 0]))
        slope, offset = odds.slope, odds.offset
        temperature = temperature or fit_temperature(logits_nC, labels_n)
        p_nC = softmax(logits_nC, temperature)
        rule = cls(temperature, slope, offset, None)
        log_p_nC = log_softmax(logits_nC, temperature)

        def mixture(members_Sm: np.ndarray) -> np.ndarray:
            edges_Smm = np.stack([rule.edges(z_nd[members]) for members in members_Sm])
            return rule.em(log_p_nC[members_Sm], edges_Smm)

        def measured(members_Sm: np.ndarray) -> np.ndarray:
            return measures(log_p_nC[members_Sm], mixture(members_Sm), rule.alpha)

        one_class = fit_one_class(log_p_nC, labels_n, measured, seed)

        def lost(members_Sm: np.ndarray) -> np.ndarray:
            log_p_SmC, q_SmC = log_p_nC[members_Sm], mixture(members_Sm)
            found_Sm = q_SmC.argmax(2)
            if one_class is not None:
                of = one_class.at(members_Sm.shape[1])
                on_S = scores(of, measures(log_p_SmC, q_SmC, rule.alpha)) > of.threshold
                found_Sm[on_S] = log_p_SmC[on_S].mean(1).argmax(1)[:, None]
            right_Sm = labels_n[members_Sm]
            alone_S = (log_p_SmC.argmax(2) == right_Sm).mean(1)
            return alone_S - (found_Sm == right_Sm).mean(1)

        gate = fit_related(p_nC, z_nd, labels_n, (slope, offset), lost, seed)
        return replace(rule, gate=gate, one_class=one_class)

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible data."""
        kept = {
            name: getattr(self, name)
            for name in ("temperature", "slope", "offset", "strength", "alpha")
        }
        gates = {"gate": self.gate, "one_class": self.one_class}
        return kept | {n: None if gate is None else gate.to_json() for n, gate in gates.items()}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Together:
        """The inverse of ``to_json``, bit for bit; also of models from before the gate was learned."""
        kept = dict(kept)
        for name in ("gate", "one_class"):
            kept[name] = SetGate.from_json(kept[name]) if kept.get(name) else None
        if "thresholds" in kept:
            kept["gate"] = agreement_gate(kept.pop("sizes"), kept.pop("thresholds"))
        return cls(**kept)
