"""Sets of images answered together: the learned network and its rivals, from averaging to LaplacianShot."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from cnn2gnn_dist.inference.calibration import log_softmax, softmax
from cnn2gnn_dist.inference.sets.learned import LearnedSets
from cnn2gnn_dist.inference.sets.together import Together
from remembering.episodes import agreed

SETS = (
    (2, 1),
    (4, 1),
    (8, 1),
    (16, 1),
    (16, 2),
    (16, 3),
    (16, 5),
    (64, 5),
    (64, 20),
    (16, 0),
    (64, 0),
)
"""Numbers of images and classes in a set; 0 classes: strangers, drawn from all images."""
NEW = (
    ("a burst among strangers", 16),
    ("all but one of a class", 16),
    ("a class in three, ten others", 36),
)
"""Kinds of sets from which the network doesn't learn, and their sizes."""
KINDS = (*SETS, *((size, kind) for kind, size in NEW))
SCALES, STRENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0), (0.1, 0.3, 0.5, 1.0, 2.0, 5.0)
"""Of soft k-means' cosines, and λ of LaplacianShot: one of each is chosen on sets of calibration images."""
Answer = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Logits [m, C] and z [m, d] to predicted classes [m]."""


def drawn(labels_N: np.ndarray, size: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a set of that many classes, each at least once, otherwise drawn at random."""
    if not classes:
        return rng.choice(len(labels_N), size, replace=False)
    chosen = rng.choice(labels_N.max() + 1, classes, replace=False)
    of = np.concatenate([chosen, rng.choice(chosen, size - classes)])
    rows = [
        rng.choice(np.flatnonzero(labels_N == c), (of == c).sum(), replace=False) for c in chosen
    ]
    return np.concatenate(rows)


def drawn_new(kind: str, labels_N: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a set of one of the kinds NEW."""
    of_class = rng.permutation(labels_N.max() + 1)
    first = {"a burst among strangers": size // 2, "all but one of a class": size - 1}
    many = first.get(kind, size // 3)
    burst = rng.choice(np.flatnonzero(labels_N == of_class[0]), many, replace=False)
    others = np.flatnonzero(labels_N != of_class[0])
    if kind == "a class in three, ten others":
        others = np.flatnonzero(np.isin(labels_N, of_class[1:11]))
    return np.concatenate([burst, rng.choice(others, size - many, replace=False)])


@dataclass(frozen=True)
class Fitted:
    """Constants of the ways that have one: the scale of soft k-means' cosines, and LaplacianShot's λ."""

    scale: float = 2.0
    strength: float = 1.0


def fit(
    rule: Together,
    mean_Cd: np.ndarray,
    logits: np.ndarray,
    z: np.ndarray,
    labels: np.ndarray,
    sets: int,
) -> Fitted:
    """Choose constants by accuracy on so many sets of calibration images of each kind in SETS, all kinds alike.

    One constant for all kinds, as the other ways have: what kind a set is of is not known.
    """
    kinds = [kind for kind in SETS if kind[1] <= labels.max() + 1]
    rows = [at for kind in kinds for at in drawn_sets(labels, *kind, sets)]

    def right(answer: Answer) -> float:
        return float(np.mean([(answer(logits[at], z[at]) == labels[at]).mean() for at in rows]))

    t = rule.temperature
    scale = max(
        SCALES, key=lambda s: right(lambda logits, z: soft_k_means(logits, z, t, mean_Cd, s))
    )
    strength = max(STRENGTHS, key=lambda s: right(lambda logits, z: laplacian(logits, z, t, s)))
    return Fitted(scale, strength)


def answers(rule: Together, mean_Cd: np.ndarray, fitted: Fitted = Fitted()) -> dict[str, Answer]:
    """All ways to answer a set beside the learned one."""
    t = rule.temperature
    open_gate = replace(rule, gate=None)
    prior_only = replace(open_gate, strength=0.0, one_class=None)
    return {
        "mean of logits": lambda logits, z: rule.same(logits).posterior_mC.argmax(1),
        "EM prior": lambda logits, z: prior_only(logits, z).posterior_mC.argmax(1),
        "soft k-means": lambda logits, z: soft_k_means(logits, z, t, mean_Cd, fitted.scale),
        "LaplacianShot": lambda logits, z: laplacian(logits, z, t, fitted.strength),
        "clustering": lambda logits, z: clustered(logits, z, rule),
        "rule T ungated": lambda logits, z: open_gate(logits, z).posterior_mC.argmax(1),
        "rule T": lambda logits, z: rule(logits, z).posterior_mC.argmax(1),
    }


def soft_k_means(
    logits_mC: np.ndarray,
    z_md: np.ndarray,
    temperature: float,
    mean_Cd: np.ndarray,
    scale: float = 2.0,
) -> np.ndarray:
    """Soft k-means (Ren et al., ICLR 2018): class means moved by the set's images, then the head again."""
    log_p_mC = log_softmax(logits_mC, temperature)
    q_mC = np.exp(log_p_mC)
    for _ in range(10):
        centre_Cd = mean_Cd + q_mC.T @ z_md
        centre_Cd = centre_Cd / np.linalg.norm(centre_Cd, axis=1, keepdims=True)
        q_mC = softmax(log_p_mC + scale * z_md @ centre_Cd.T)
    return q_mC.argmax(1)


def laplacian(
    logits_mC: np.ndarray, z_md: np.ndarray, temperature: float, strength: float
) -> np.ndarray:
    """LaplacianShot (Ziko et al., ICML 2020) for trained classes: -log p of the head in place of the distances."""
    return agreed(log_softmax(logits_mC, temperature), z_md, strength).argmax(1)


def clustered(logits_mC: np.ndarray, z_md: np.ndarray, rule: Together) -> np.ndarray:
    """Average-linkage clusters, cut where two images are as likely as not of one class; each is averaged."""
    cos_mm = np.clip(z_md.astype(np.float64) @ z_md.T, -1, 1)
    far_mm = 1 - cos_mm
    np.fill_diagonal(far_mm, 0)
    cut = 1 + rule.offset / rule.slope
    cluster_m = fcluster(linkage(squareform(far_mm, checks=False), "average"), cut, "distance")
    log_p_mC = log_softmax(logits_mC, rule.temperature)
    predicted_m = np.empty(len(z_md), int)
    for one in np.unique(cluster_m):
        predicted_m[cluster_m == one] = log_p_mC[cluster_m == one].mean(0).argmax()
    return predicted_m


def drawn_sets(labels_N: np.ndarray, size: int, kind: int | str, sets: int) -> Iterator[np.ndarray]:
    """Rows of so many sets of a kind: the same ones for the same arguments."""
    for number in range(sets):
        if isinstance(kind, int):
            yield drawn(labels_N, size, kind, np.random.default_rng([size, kind, number]))
        else:
            yield drawn_new(kind, labels_N, size, np.random.default_rng([size, 99, number]))


def judged(
    learned: LearnedSets,
    ways: dict[str, Answer],
    logits: np.ndarray,
    z: np.ndarray,
    labels: np.ndarray,
    sets: int,
    kinds: Sequence[tuple[int, int | str]] = KINDS,
    strangers: int = 1,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The share of right answers in each set by every way ("alone", "learned", ...), and whether the gate "fired".

    ``strangers``: how many times as many sets of strangers, whose losses are small.
    """
    for size, kind in kinds:
        if isinstance(kind, int) and kind > labels.max() + 1:
            continue
        found: dict[str, list[float]] = {way: [] for way in ("alone", "fired", "learned", *ways)}
        for at in drawn_sets(labels, size, kind, sets * (1 if kind else strangers)):
            told = learned(logits[at], z[at])
            answered = {"alone": logits[at].argmax(1), "learned": told.posterior_mC.argmax(1)}
            answered |= {way: answer(logits[at], z[at]) for way, answer in ways.items()}
            found["fired"].append(told.related)
            for way, predicted in answered.items():
                found[way].append((predicted == labels[at]).mean())
        name = f"{size}, {kind or 'strangers'}"
        yield name, {way: np.array(each, np.float64) for way, each in found.items()}


def gains(
    learned: LearnedSets,
    ways: dict[str, Answer],
    logits: np.ndarray,
    z: np.ndarray,
    labels: np.ndarray,
    sets: int,
    kinds: Sequence[tuple[int, int | str]] = KINDS,
) -> list[dict[str, float | str]]:
    """Points gained over answering images alone, and how often the gate fired: a row for each kind of set."""
    rows = []
    for name, found in judged(learned, ways, logits, z, labels, sets, kinds):
        row: dict[str, float | str] = {"set": name, "alone": 100 * found["alone"].mean()}
        row["fired"] = found["fired"].mean()
        row |= {way: difference(found[way], found["alone"])[0] for way in ("learned", *ways)}
        rows.append(row)
    return rows


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Mean difference of two ways in points, and its standard error, over the same sets."""
    apart = 100 * (ours - theirs)
    error = apart.std(ddof=1) / len(apart) ** 0.5 if len(apart) > 1 else np.nan
    return float(apart.mean()), float(error)
