"""Images that belong together (a burst, frames, parts off one line), answered together by a learned graph.

The answer is ``set_network.py``'s where it takes the set to be related, otherwise that of every image alone,
bit-identically. Everything is learned from the calibration images, which were set apart from training: the
edges' log-odds by logistic regression, the network on random sets of them (``compositions.py``), and the score
from which a set is related: where it is likelier than not among these sets, or higher, so that sets of
strangers lose at most 0.12 points (``related.py``).
Where training had uneven classes, their shares count once per set, not once per image (``class_shares.py``).

Shapes: n calibration images, m images of a set, C classes, d dimensions of z (of unit length).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from cnn2gnn_dist.inference.calibration import fit_temperature, log_softmax, softmax
from cnn2gnn_dist.inference.sets.class_shares import shift_of
from cnn2gnn_dist.inference.sets.compositions import SHARES, Kind, draw
from cnn2gnn_dist.inference.sets.pairs import PairOdds
from cnn2gnn_dist.inference.sets.related import LOSS, random_sets, rows_by_class
from cnn2gnn_dist.inference.sets.relations import Relations, same_class
from cnn2gnn_dist.inference.sets.set_network import SetNetwork

SIZES = (2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64)
STEPS, CELLS, SETS, RATE = (200, 600), 384, (4, 96), 0.02
"""Steps of Adam, two per calibration image within these bounds, each on about CELLS images in sets of one size, with
a lower and an upper bound on the number of sets."""
RELATED_WEIGHT = 0.3
"""Of the cross-entropy of being related beside that of the classes."""
_STRANGERS, _PER_SIZE = 1200, 40_000  # random sets of a size at least, and images in them


@dataclass(frozen=True, eq=False)
class LearnedSets:
    """The rule and what was learned.

    Attributes:
        temperature: T of the logits.
        odds: of the edges.
        network: in float64.
        sizes, thresholds: the score that a related set of so many images exceeds; linear in log m in between.
        shift_C: takes the classes' shares of training out of l/T (``class_shares.py``); None: they were even.
    """

    temperature: float
    odds: PairOdds
    network: SetNetwork
    sizes: tuple[int, ...]
    thresholds: tuple[float, ...]
    shift_C: np.ndarray | None = None

    def __call__(self, logits_mC: np.ndarray, z_md: np.ndarray) -> Relations:
        """Answer a set of images.

        Args:
            logits_mC: as in ``fit``.
            z_md: features of unit length, as in ``fit``.
        """
        alone_mC = softmax(logits_mC, self.temperature)
        count = len(alone_mC)
        if count < 2:
            return Relations(alone_mC, False, count, 0.0, 1.0)
        log_p_mC = _once(log_softmax(logits_mC, self.temperature), self.shift_C, count)
        log_q_SmC, score_S = _answered(self.network, log_p_mC[None], self.odds(z_md)[None])
        threshold = float(np.interp(np.log(count), np.log(self.sizes), self.thresholds))
        score, related = float(score_S[0]), bool(score_S[0] > threshold)
        posterior_mC = np.exp(log_q_SmC[0]) if related else alone_mC
        classes = len(np.unique(posterior_mC.argmax(1)))
        return Relations(posterior_mC, related, classes, score, threshold)

    def same(self, logits_mC: np.ndarray) -> Relations:
        """Answer a set that is known to be of one class."""
        shift_C = None if self.shift_C is None else self.temperature * self.shift_C
        return same_class(_once(logits_mC, shift_C, len(logits_mC)), self.temperature)

    @classmethod
    def fit(
        cls,
        logits_nC: np.ndarray,
        z_nd: np.ndarray,
        labels_n: np.ndarray,
        *,
        temperature: float | None = None,
        seed: int = 0,
        steps: int | None = None,
    ) -> LearnedSets:
        """Learn from calibration images; bit-identical for the same seed on the same machine.

        Args:
            logits_nC: of calibration images.
            z_nd: their features, of unit length: the stem's x, centered (``OldClasses.features``), tells
                classes apart better than the graph's projection.
            labels_n: their classes.
            temperature: T, if it is fitted already.
            seed: of weights, sets, and the images whose pairs are compared.
            steps: of the optimizer; None: as many as the images give material for.

        Raises:
            UserError: fewer than 4 calibration images, or no two of one class, or one class only.
        """
        z_nd, labels_n = np.asarray(z_nd, np.float64), np.asarray(labels_n)
        odds = PairOdds.fit(z_nd, labels_n, np.random.default_rng([seed, 0]))
        temperature = temperature or fit_temperature(logits_nC, labels_n)
        shift_C = shift_of(logits_nC, labels_n, temperature)
        log_p_nC = log_softmax(logits_nC, temperature)
        images = _Images(log_p_nC, z_nd, labels_n, odds, shift_C)
        sizes = tuple(m for m in SIZES if m <= max(2, len(labels_n) // 4))
        steps = steps or int(np.clip(2 * len(labels_n), *STEPS))
        with _reproducible(seed):
            network = _learn(images, sizes, seed, steps).eval()
            gated = tuple(sorted({*sizes[::2], sizes[-1]}))  # linear in log m in between
            thresholds = tuple(
                _threshold(network, images, m, np.random.default_rng([seed, 2, m])) for m in gated
            )
        return cls(float(temperature), odds, network.double(), gated, thresholds, shift_C)

    def to_json(self) -> dict[str, Any]:
        """As what JSON holds; float32 weights as decimal numbers."""
        weights = {name: value.tolist() for name, value in self.network.state_dict().items()}
        shift = {} if self.shift_C is None else {"shift": self.shift_C.tolist()}
        return shift | {
            "temperature": self.temperature,
            "slope": self.odds.slope,
            "offset": self.odds.offset,
            "sizes": list(self.sizes),
            "thresholds": list(self.thresholds),
            "network": {"largest": self.network.largest, "weights": weights},
        }

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> LearnedSets:
        """The inverse of ``to_json``, bit for bit."""
        with torch.random.fork_rng(devices=[]):
            network = SetNetwork(kept["network"]["largest"]).double()
        weights = {
            name: torch.tensor(value, dtype=torch.float64)
            for name, value in kept["network"]["weights"].items()
        }
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"weights of the set network: {error}") from None
        odds = PairOdds(kept["slope"], kept["offset"])
        sizes, thresholds = tuple(kept["sizes"]), tuple(kept["thresholds"])
        shift_C = np.array(kept["shift"], np.float64) if "shift" in kept else None
        return cls(kept["temperature"], odds, network.eval(), sizes, thresholds, shift_C)


class _Images(NamedTuple):
    """Calibration images, and the odds of their pairs."""

    log_p_nC: np.ndarray
    z_nd: np.ndarray
    labels_n: np.ndarray
    odds: PairOdds
    shift_C: np.ndarray | None

    def log_p(self, members_Sm: np.ndarray) -> np.ndarray:
        """Of sets to be answered together, float64 [S, m, C]."""
        return _once(self.log_p_nC[members_Sm], self.shift_C, members_Sm.shape[1])

    def log_odds(self, members_Sm: np.ndarray) -> np.ndarray:
        return self.odds(self.z_nd[members_Sm])


def _learn(images: _Images, sizes: tuple[int, ...], seed: int, steps: int) -> SetNetwork:
    """The network, in float32: cross-entropy of each image's class, and of being related."""
    network = SetNetwork(sizes[-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
    rng, of_class = np.random.default_rng([seed, 1]), rows_by_class(images.labels_n)
    labels = torch.from_numpy(images.labels_n)
    for _ in range(steps):
        count = int(rng.choice(sizes))
        sets = int(np.clip(CELLS // count, *SETS))
        kinds = [Kind(k) for k in rng.choice(list(SHARES), sets, p=list(SHARES.values()))]
        drawn = [draw(of_class, count, kind, rng) for kind in kinds]
        members = np.stack([of_set for of_set, _ in drawn])
        log_odds = torch.from_numpy(images.log_odds(members).astype(np.float32))
        log_p = torch.from_numpy(images.log_p(members).astype(np.float32))
        log_q, score = network(log_p, log_odds)
        related = torch.tensor([float(kind is not Kind.STRANGERS) for _, kind in drawn])
        loss = F.nll_loss(log_q.flatten(0, 1), labels[members].flatten().long())
        loss = loss + RELATED_WEIGHT * F.binary_cross_entropy_with_logits(score, related)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if not all(torch.isfinite(value).all() for value in network.parameters()):
        raise FloatingPointError("the network over sets has weights that are not finite")
    return network


def _threshold(network: SetNetwork, images: _Images, count: int, rng: np.random.Generator) -> float:
    """The score from which sets of this many images are related."""
    sets = max(_STRANGERS, _PER_SIZE // count)
    members_Sm = random_sets(len(images.labels_n), count, sets, rng)
    score_S, lost_S = np.empty(sets), np.empty(sets)
    for at in np.array_split(np.arange(sets), -(-sets * count // 4000)):
        members = members_Sm[at]
        right_Sm = images.labels_n[members]
        log_q_SmC, score_S[at] = _answered(network, images.log_p(members), images.log_odds(members))
        alone_S = (images.log_p_nC[members].argmax(2) == right_Sm).mean(1)
        lost_S[at] = alone_S - (log_q_SmC.argmax(2) == right_Sm).mean(1)
    return affordable(score_S, lost_S)


def affordable(score_S: np.ndarray, lost_S: np.ndarray) -> float:
    """Return the lowest threshold, but no lower than 0, beyond which strangers lose LOSS at most.

    Args:
        score_S: of being related, of sets of strangers.
        lost_S: the accuracy that each loses if it is answered together.
    """
    order_S = np.argsort(-score_S, kind="stable")
    within = np.flatnonzero(np.cumsum(lost_S[order_S]) <= LOSS * len(order_S))
    passing = int(within[-1]) + 1 if len(within) else 0
    if passing == len(order_S):
        return 0.0
    return max(0.0, float(score_S[order_S[passing]]))


def _once(scores_XmC: np.ndarray, shift_C: np.ndarray | None, count: int) -> np.ndarray:
    """Scores of m = ``count`` images, whose sum over the set contains the classes' shares once."""
    return scores_XmC if shift_C is None else scores_XmC + (1 - 1 / max(count, 1)) * shift_C


@torch.no_grad()
def _answered(
    network: SetNetwork, log_p_SmC: np.ndarray, log_odds_Smm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    dtype = next(network.parameters()).dtype
    log_q_SmC, score_S = network(
        torch.from_numpy(log_p_SmC).to(dtype), torch.from_numpy(log_odds_Smm).to(dtype)
    )
    return log_q_SmC.numpy(), score_S.numpy()


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Torch with this seed and one thread; afterwards its generator and threads are as before."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
