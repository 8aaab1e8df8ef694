"""Images that belong together (a burst, frames, parts off one line), answered together.

A set of m images with logits l_i and features z_i, in four steps:

1. **Gate.** Is the set related? Only if the mean over pairs of Σ_c p_ic p_jc, p = softmax(l/T), exceeds
   what 98 of 100 random sets of calibration images of this size have. Otherwise every image is
   answered alone, in the same bits as without company.
2. **Edges** W_ij = max(2σ(a·cos(z_i, z_j) + b) − 1, 0), where σ is the probability that two images are of
   one class, fitted by logistic regression on pairs of calibration images (as many of one class as of
   two, by weight): pairs that are rather of two classes have no edge. The 15 largest of a row are kept, the
   diagonal is 0, and rows with a sum above 1 are divided by it: many weak edges don't outweigh an image's own
   logits, and strangers stay without edges.
3. **EM** (Dempster et al., 1977; for class priors: Saerens, Latinne, Decaestecker, 2002), 30 rounds from q = p:
   π = (Σ_i q_i + α) / (m + Cα), then q_i = softmax(l_i/T + log(Cπ) + λ Σ_j W_ij q_j), all i at once.
4. The answer is q, and that it depends on company.

If the set is *known* to be of one class, averaged logits are at or near the best (``same``).

Shapes: n calibration images, m images of a set, C classes, d dimensions of z (of unit length).
Pure: arrays in, arrays out; equivariant to the order of a set, up to rounding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.calibration import fit_temperature, log_softmax, softmax

LAMBDA, ALPHA, ROUNDS, EDGES, GATE = 1.0, 0.02, 30, 15, 0.98
_SIZES = (2, 3, 4, 5, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 512, 1024)
_SETS = (
    4000  # random sets for each size: the standard error of the 98th percentile's level is 0.2 %
)
_CELLS = 4_000_000  # numbers handled at once while fitting
_PAIRED = 3000  # calibration images whose pairs are compared


@dataclass(frozen=True)
class Relations:
    """What is answered for a set of images.

    Attributes:
        posterior_mC: float64, rows sum to 1.
        related: the set's images were found to be related (or said to be: ``same``), so that the
            posterior depends on company.
        classes: number of different classes that the set was found to show (of the answers).
        likeness: mean over pairs of Σ_c p_ic p_jc; ``threshold``: what it had to exceed.
    """

    posterior_mC: np.ndarray
    related: bool
    classes: int
    likeness: float
    threshold: float


@dataclass(frozen=True)
class Together:
    """The rule with its constants.

    Attributes:
        temperature: T of the logits.
        slope, offset: a and b of the edges.
        sizes, thresholds: the gate, for some sizes of a set; linear in log m in between, which is on
            the careful side, for the true thresholds are convex.
        strength, alpha: λ and α.
    """

    temperature: float
    slope: float
    offset: float
    sizes: tuple[int, ...]
    thresholds: tuple[float, ...]
    strength: float = LAMBDA
    alpha: float = ALPHA

    def __call__(self, logits_mC: np.ndarray, z_md: np.ndarray) -> Relations:
        """Answer a set of images.

        Args:
            logits_mC: as in ``fit``.
            z_md: features of unit length, as in ``fit``; the zero vector (an image that can't be read) has no edges
                worth mentioning, so leave such images out.
        """
        p_mC = softmax(logits_mC, self.temperature)
        count = len(p_mC)
        if count < 2:
            return Relations(p_mC, False, count, 0.0, 1.0)
        likeness, threshold = float(pair_likeness(p_mC[None])[0]), self.threshold(count)
        if not likeness > threshold:
            return Relations(p_mC, False, len(np.unique(p_mC.argmax(1))), likeness, threshold)
        edges_mm = self.edges(z_md)
        q_mC = self.em(log_softmax(logits_mC, self.temperature), edges_mm)
        return Relations(q_mC, True, len(np.unique(q_mC.argmax(1))), likeness, threshold)

    def same(self, logits_mC: np.ndarray) -> Relations:
        """Answer a set that is known to be of one class: softmax(mean logits / T), for each image."""
        mean_1C = np.asarray(logits_mC, np.float64).mean(0, keepdims=True)
        p_mC = np.repeat(softmax(mean_1C, self.temperature), len(logits_mC), axis=0)
        return Relations(p_mC, len(p_mC) > 1, min(len(p_mC), 1), 1.0, 0.0)

    def threshold(self, count: int) -> float:
        """The gate for a set of this size; beyond the largest fitted one, that one's."""
        return float(np.interp(np.log(count), np.log(self.sizes), self.thresholds))

    def edges(self, z_md: np.ndarray) -> np.ndarray:
        """W, float64 [m, m]: at most EDGES a row, none to itself; ties go to the smaller index."""
        z_md = np.asarray(z_md, np.float64)
        edges_mm = 2 * _sigmoid(self.slope * (z_md @ z_md.T) + self.offset) - 1
        edges_mm = edges_mm.clip(min=0)
        np.fill_diagonal(edges_mm, 0.0)
        if len(z_md) > EDGES + 1:
            order_mm = np.argsort(-edges_mm, axis=1, kind="stable")
            np.put_along_axis(edges_mm, order_mm[:, EDGES:], 0.0, axis=1)
        return edges_mm / np.maximum(edges_mm.sum(1, keepdims=True), 1.0)

    def em(self, log_p_mC: np.ndarray, edges_mm: np.ndarray) -> np.ndarray:
        """Return q after ROUNDS rounds: float64 [m, C]."""
        count, classes = log_p_mC.shape
        q_mC = np.exp(log_p_mC)
        for _ in range(ROUNDS):
            prior_C = (q_mC.sum(0) + self.alpha) / (count + classes * self.alpha)
            company_mC = self.strength * (edges_mm @ q_mC)
            q_mC = softmax(log_p_mC + np.log(classes * prior_C) + company_mC)
        return q_mC

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
        """Fit the constants on calibration images; the same bits for the same seed.

        Args:
            logits_nC: of calibration images.
            z_nd: their features, of unit length: the stem's x, centred (``OldClasses.features``), tells
                classes better than the graph's projection.
            labels_n: their classes.
            temperature: T, if it is fitted already.
            seed: of the random sets and of the images whose pairs are compared.

        Raises:
            UserError: fewer than 4 calibration images, or no two of one class, or one class only.
        """
        labels_n = np.asarray(labels_n)
        _check(labels_n)
        temperature = temperature or fit_temperature(logits_nC, labels_n)
        slope, offset = _fit_edges(np.asarray(z_nd), labels_n, np.random.default_rng([seed, 0]))
        p_nC = softmax(logits_nC, temperature)
        sizes = tuple(size for size in _SIZES if size <= max(2, len(labels_n) // 4))
        thresholds = [_gate(p_nC, size, np.random.default_rng([seed, size])) for size in sizes]
        return cls(temperature, slope, offset, sizes, tuple(thresholds))

    def to_json(self) -> dict[str, Any]:
        """As what JSON holds."""
        kept = asdict(self)
        return kept | {"sizes": list(self.sizes), "thresholds": list(self.thresholds)}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Together:
        """The inverse of ``to_json``, bit for bit."""
        sizes, thresholds = tuple(kept["sizes"]), tuple(kept["thresholds"])
        return cls(**(kept | {"sizes": sizes, "thresholds": thresholds}))


def pair_likeness(p_SmC: np.ndarray) -> np.ndarray:
    """Mean over pairs i < j of Σ_c p_ic p_jc, for each of S sets: float64 [S]."""
    count = p_SmC.shape[1]
    total_S = np.square(p_SmC.sum(1)).sum(1) - np.square(p_SmC).sum((1, 2))
    return total_S / (count * (count - 1))


def _gate(p_nC: np.ndarray, size: int, rng: np.random.Generator) -> float:
    """98th percentile of the likeness over random sets of one size."""
    count, classes = p_nC.shape
    step = max(1, _CELLS // (size * classes))
    likeness = []
    for start in range(0, _SETS, step):
        sets = min(step, _SETS - start)
        members_Sm = np.stack([rng.choice(count, size, replace=False) for _ in range(sets)])
        likeness.append(pair_likeness(p_nC[members_Sm]))
    return float(np.quantile(np.concatenate(likeness), GATE))


def _fit_edges(
    z_nd: np.ndarray, labels_n: np.ndarray, rng: np.random.Generator
) -> tuple[float, float]:
    """a and b of σ(a·cos + b): logistic regression on pairs, both kinds of equal weight; Newton's steps."""
    if len(labels_n) > _PAIRED:
        chosen = np.sort(rng.choice(len(labels_n), _PAIRED, replace=False))
        z_nd, labels_n = z_nd[chosen], labels_n[chosen]
    z_nd = z_nd.astype(np.float64)
    first, second = np.triu_indices(len(labels_n), 1)
    cos_P = (z_nd @ z_nd.T)[first, second]
    same_P = labels_n[first] == labels_n[second]
    weight_P = np.where(same_P, 0.5 / max(same_P.sum(), 1), 0.5 / max((~same_P).sum(), 1))
    design_P2 = np.stack([cos_P, np.ones_like(cos_P)], 1)
    solution_2 = np.zeros(2)
    for _ in range(50):
        p_P = _sigmoid(design_P2 @ solution_2)
        # A little ridge on a keeps pairs that a threshold separates from sending it to infinity.
        gradient_2 = design_P2.T @ (weight_P * (p_P - same_P)) + [1e-5 * solution_2[0], 0.0]
        curvature_22 = (design_P2 * (weight_P * p_P * (1 - p_P))[:, None]).T @ design_P2
        step_2 = np.linalg.solve(curvature_22 + np.diag([1e-5, 1e-12]), gradient_2)
        step_2 *= min(1.0, 5.0 / max(float(np.abs(step_2).max()), 1e-300))
        solution_2 -= step_2
        if np.abs(step_2).max() < 1e-10:
            break
    return float(solution_2[0]), float(solution_2[1])


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def _check(labels_n: np.ndarray) -> None:
    counts = np.unique(labels_n, return_counts=True)[1]
    if len(labels_n) < 4 or len(counts) < 2 or counts.max() < 2:
        raise UserError(
            f"{len(labels_n)} calibration images of {len(counts)} classes don't tell how alike images"
            " of one class are",
            where="data.calibration",
            remedy="train with a larger data.calibration: two images of two classes or more",
        )
