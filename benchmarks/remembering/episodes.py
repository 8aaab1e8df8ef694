"""Episodes of a few classes and a few shots over features, and the rules that answer them.

Shapes: an episode has K classes, with n shots each (S = K·n rows) and q queries each (Q = K·q rows).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from cnn2gnn_dist.inference.calibration import fit_temperature, log_softmax, softmax
from cnn2gnn_dist.inference.memory.new_classes import NewClasses
from cnn2gnn_dist.inference.memory.old_classes import Images, OldClasses
from cnn2gnn_dist.inference.sets.learned import LearnedSets
from cnn2gnn_dist.inference.sets.together import Together

SURE = 0.99
"""Probability of a shot's own class, where shots are members of a set."""


@dataclass(frozen=True)
class Episode:
    """Rows of the features: support [K, n] and queries [K, q]; row k belongs to the episode's class k."""

    support: np.ndarray
    queries: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Labels of the queries, [Q]."""
        return np.repeat(np.arange(len(self.queries)), self.queries.shape[1])


def draw(labels: np.ndarray, ways: int, shots: int, queries: int, number: int) -> Episode:
    """Draw episode ``number``: the same rows for the same arguments."""
    rng = np.random.default_rng([ways, shots, queries, number])
    classes = rng.choice(np.unique(labels), ways, replace=False)
    rows = [
        rng.choice(np.flatnonzero(labels == c), shots + queries, replace=False) for c in classes
    ]
    return Episode(np.stack(rows)[:, :shots], np.stack(rows)[:, shots:])


class Features:
    """Features of a part: what the product sees (``images``), and f [N, D], centered and of unit length."""

    def __init__(self, old: OldClasses, images: Images, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.f = old.features(images.x_nD).f_BD

    def means(self, episode: Episode) -> np.ndarray:
        return self.f[episode.support].mean(1)


@dataclass(frozen=True)
class Fitted:
    """Constants chosen on episodes of the validation classes.

    Attributes:
        temperature: the one that makes the product's scores of new classes probabilities.
        kmeans: scale of soft k-means' distances.
        strength: λ of LaplacianShot; ``sharpness``: that of its distances.
    """

    temperature: float
    kmeans: float
    strength: float
    sharpness: float


def product_scores(
    old: OldClasses, calibration: Images, labels: np.ndarray, of: Features, episode: Episode
) -> np.ndarray:
    """Scores [Q, K] of the episode's classes as ``memory add`` would give them."""
    entries = {str(k): of.images[rows] for k, rows in enumerate(episode.support)}
    new = NewClasses.fit(old, entries, calibration, labels)
    queries = of.images[episode.queries.reshape(-1)]
    return new.scores(old, queries.logits_nC, queries.x_nD)[:, -len(entries) :]


def distances(of: Features, episode: Episode, means: np.ndarray) -> np.ndarray:
    """Squared distances [Q, K] of unit-length features to class means of unit length."""
    means = means / np.linalg.norm(means, axis=1, keepdims=True)
    return 2 - 2 * of.f[episode.queries.reshape(-1)] @ means.T


def soft_kmeans(of: Features, episode: Episode, scale: float, rounds: int = 10) -> np.ndarray:
    """Probabilities [Q, K]: means of shots and of queries by their shares (Ren et al., ICLR 2018)."""
    shots, queries = of.f[episode.support], of.f[episode.queries.reshape(-1)]
    means = shots.mean(1)
    for _ in range(rounds):
        share = softmax(-scale * distances(of, episode, means))
        total = shots.sum(1) + share.T @ queries
        means = total / (shots.shape[1] + share.sum(0))[:, None]
    return softmax(-scale * distances(of, episode, means))


def laplacian_shot(
    of: Features,
    episode: Episode,
    strength: float,
    sharpness: float,
    near: int = 3,
    rounds: int = 20,
) -> np.ndarray:
    """Probabilities [Q, K]: queries agree with their nearest queries (Ziko et al., ICML 2020)."""
    own = -sharpness * distances(of, episode, of.means(episode))
    return agreed(own, of.f[episode.queries.reshape(-1)], strength, near, rounds)


def agreed(
    own: np.ndarray, f: np.ndarray, strength: float, near: int = 3, rounds: int = 20
) -> np.ndarray:
    """Probabilities [Q, K] from the scores of each row by itself [Q, K], and features f [Q, D] of unit length.

    Each of LaplacianShot's rounds adds the probabilities of the nearest other rows (as many as there are, if fewer).
    """
    near = min(near, len(f) - 1)
    cos = f @ f.T
    np.fill_diagonal(cos, -np.inf)
    joined = np.zeros_like(cos)
    np.put_along_axis(joined, np.argpartition(-cos, near, axis=1)[:, :near], 1.0, axis=1)
    share = softmax(own)
    for _ in range(rounds):
        share = softmax(own + strength * (joined @ share))
    return share


def together(
    rule: Together, scores: np.ndarray, of: Features, episode: Episode, t: float
) -> np.ndarray:
    """Probabilities [Q, K] by rule T's EM and edges; without its gate, since the queries are known to be related."""
    log_p = log_softmax(scores, t)
    return rule.em(log_p[None], rule.edges(of.f[episode.queries.reshape(-1)])[None])[0]


def learned_together(
    rule: LearnedSets, scores: np.ndarray, of: Features, episode: Episode, t: float
) -> np.ndarray:
    """Probabilities [Q, K] by the learned network, for the set of queries and shots; again without the gate."""
    classes, shots = episode.support.shape
    sure = np.full((classes * shots, classes), np.log((1 - SURE) / (classes - 1)))
    sure[np.arange(classes * shots), np.repeat(np.arange(classes), shots)] = np.log(SURE)
    log_p = np.concatenate([log_softmax(scores, t), sure])
    rows = np.concatenate([episode.queries.reshape(-1), episode.support.reshape(-1)])
    with torch.no_grad():
        log_q, _ = rule.network(
            torch.from_numpy(log_p)[None], torch.from_numpy(rule.odds(of.f[rows]))[None]
        )
    return np.exp(log_q[0, : len(scores)].numpy())


def fit(scored: Callable[[Episode], np.ndarray], of: Features, episodes: list[Episode]) -> Fitted:
    """Choose constants on the validation classes: the temperature by likelihood, the others by accuracy."""
    labels = np.concatenate([e.labels for e in episodes])
    temperature = fit_temperature(np.concatenate([scored(e) for e in episodes]), labels)

    def right(answer: Callable[[Episode], np.ndarray]) -> float:
        return float(np.mean([(answer(e).argmax(1) == e.labels).mean() for e in episodes]))

    scales = (5.0, 10.0, 20.0, 40.0)
    kmeans = max(scales, key=lambda s: right(lambda e: soft_kmeans(of, e, s)))
    grid = [(s, h) for h in scales for s in (0.1, 0.3, 0.5, 1.0, 2.0)]
    strength, sharpness = max(grid, key=lambda g: right(lambda e: laplacian_shot(of, e, *g)))
    return Fitted(temperature, kmeans, strength, sharpness)


def answers(
    of: Features,
    episode: Episode,
    scores: np.ndarray,
    rules: tuple[LearnedSets, Together],
    fitted: Fitted,
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and answers [Q] of every rule."""
    yield "inductive: nearest class mean", distances(of, episode, of.means(episode)).argmin(1)
    yield "inductive: memory (rule R)", scores.argmax(1)
    yield "transductive: soft k-means", soft_kmeans(of, episode, fitted.kmeans).argmax(1)
    made = laplacian_shot(of, episode, fitted.strength, fitted.sharpness)
    yield "transductive: LaplacianShot", made.argmax(1)
    made = learned_together(rules[0], scores, of, episode, fitted.temperature)
    yield "transductive: memory, together (learned)", made.argmax(1)
    made = together(rules[1], scores, of, episode, fitted.temperature)
    yield "transductive: memory, together (rule T)", made.argmax(1)
