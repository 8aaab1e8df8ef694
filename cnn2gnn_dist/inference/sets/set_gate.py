"""A yes-or-no question about a set of images, decided by a few measures of it whose weights are learned.

The score of a set is Σ_k w_k (measure_k - mean_k) / deviation_k, and the answer is yes if it exceeds a threshold;
all of these depend on the number of images m. The weights come from logistic regression of sets that deserve a yes
against sets that don't, means, deviations and the threshold from the latter. Pure.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cnn2gnn_dist.inference.sets.logistic import fit_balanced

_LEAST = 1e-12


@dataclass(frozen=True)
class OfSize:
    """The gate for sets of one size: K weights, means and deviations, and the threshold."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    deviations: tuple[float, ...]
    threshold: float

    @classmethod
    def fit(
        cls, no_SK: np.ndarray, yes_SK: np.ndarray, fresh_SK: np.ndarray, level: float
    ) -> OfSize:
        """Fit the gate to measures of sets.

        Args:
            no_SK: of sets whose answer should be no.
            yes_SK: of sets whose answer should be yes.
            fresh_SK: of further sets whose answer should be no.
            level: the share of these that gets a no.
        """
        mean, deviation = no_SK.mean(0), np.maximum(no_SK.std(0), _LEAST)
        rows = (np.concatenate([no_SK, yes_SK]) - mean) / deviation
        found = fit_balanced(rows, np.arange(len(rows)) >= len(no_SK))[0]
        weights = np.maximum(
            found, 0.0
        )  # by construction, a larger measure never speaks against a yes
        if not weights.any():
            weights[0] = 1.0
        weights = weights / weights.sum()
        threshold = float(np.quantile(((fresh_SK - mean) / deviation) @ weights, level))
        return cls(
            tuple(weights.tolist()), tuple(mean.tolist()), tuple(deviation.tolist()), threshold
        )


@dataclass(frozen=True)
class SetGate:
    """The gate for sets of any size: linear in log m between the sizes it was fitted for."""

    sizes: tuple[int, ...]
    fitted: tuple[OfSize, ...]

    def at(self, count: int) -> OfSize:
        """The gate for this many images; beyond the largest size, that one's."""

        def between(values: Any) -> float:
            return float(np.interp(np.log(count), np.log(self.sizes), list(values)))

        def each(name: str) -> tuple[float, ...]:
            columns = zip(*(getattr(one, name) for one in self.fitted), strict=True)
            return tuple(between(column) for column in columns)

        threshold = between(one.threshold for one in self.fitted)
        return OfSize(each("weights"), each("means"), each("deviations"), threshold)

    def to_json(self) -> dict[str, Any]:
        """As JSON-compatible data."""
        fitted = [{k: _list(v) for k, v in asdict(one).items()} for one in self.fitted]
        return {"sizes": list(self.sizes), "fitted": fitted}

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> SetGate:
        """The inverse of ``to_json``, bit for bit."""
        fitted = ({k: _tuple(v) for k, v in one.items()} for one in kept["fitted"])
        return cls(tuple(kept["sizes"]), tuple(OfSize(**one) for one in fitted))


def scores(gate: OfSize, measures_SK: np.ndarray) -> np.ndarray:
    """The scores [S] of sets with these measures."""
    return ((measures_SK - np.array(gate.means)) / np.array(gate.deviations)) @ gate.weights


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
