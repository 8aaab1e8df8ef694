"""Sets of images answered together: the learned network, rule T, averaging, priors, k-means, clustering."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from cnn2gnn_dist.inference.calibration import log_softmax, softmax
from cnn2gnn_dist.inference.sets.learned import LearnedSets
from cnn2gnn_dist.inference.sets.together import Together

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


def answers(rule: Together, mean_Cd: np.ndarray) -> dict[str, Answer]:
    """All ways to answer a set beside the learned one."""
    open_gate = replace(rule, gate=None)
    prior_only = replace(open_gate, strength=0.0, one_class=None)
    return {
        "mean of logits": lambda logits, z: rule.same(logits).posterior_mC.argmax(1),
        "EM prior": lambda logits, z: prior_only(logits, z).posterior_mC.argmax(1),
        "soft k-means": lambda logits, z: soft_k_means(logits, z, rule.temperature, mean_Cd),
        "clustering": lambda logits, z: clustered(logits, z, rule),
        "rule T ungated": lambda logits, z: open_gate(logits, z).posterior_mC.argmax(1),
        "rule T": lambda logits, z: rule(logits, z).posterior_mC.argmax(1),
    }


def soft_k_means(
    logits_mC: np.ndarray, z_md: np.ndarray, temperature: float, mean_Cd: np.ndarray
) -> np.ndarray:
    """Soft k-means (Ren et al., ICLR 2018): class means moved by the set's images, then the head again."""
    log_p_mC = log_softmax(logits_mC, temperature)
    q_mC = np.exp(log_p_mC)
    for _ in range(10):
        centre_Cd = mean_Cd + q_mC.T @ z_md
        centre_Cd = centre_Cd / np.linalg.norm(centre_Cd, axis=1, keepdims=True)
        q_mC = softmax(log_p_mC + 2 * z_md @ centre_Cd.T)
    return q_mC.argmax(1)


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
    for size, kind in kinds:
        if isinstance(kind, int) and kind > labels.max() + 1:
            continue
        total = dict.fromkeys(["alone", "learned", *ways, "fired"], 0.0)
        for number in range(sets):
            if isinstance(kind, int):
                at = drawn(labels, size, kind, np.random.default_rng([size, kind, number]))
            else:
                at = drawn_new(kind, labels, size, np.random.default_rng([size, 99, number]))
            total["alone"] += (logits[at].argmax(1) == labels[at]).mean()
            told = learned(logits[at], z[at])
            total["fired"] += told.related
            total["learned"] += (told.posterior_mC.argmax(1) == labels[at]).mean()
            for way, answer in ways.items():
                total[way] += (answer(logits[at], z[at]) == labels[at]).mean()
        alone = total["alone"]
        row: dict[str, float | str] = {"set": f"{size}, {kind or 'strangers'}"}
        row |= {"alone": 100 * alone / sets, "fired": total["fired"] / sets}
        row |= {way: 100 * (total[way] - alone) / sets for way in ("learned", *ways)}
        rows.append(row)
    return rows
