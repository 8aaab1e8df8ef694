"""Bytes of a model's states in each ZeRO stage, and what a step sends: arithmetic only.

Stages as in Rajbhandari et al., "ZeRO" (SC 2020), section 3, for float32 weights, as training here keeps
them under autocast too.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4
MOMENTS = {"adamw": 2, "sgd": 1}
"""Values per weight that an optimizer keeps."""


@dataclass(frozen=True)
class States:
    """Bytes per rank.

    Attributes:
        weights: those that forward and backward passes use.
        gradients: of these weights.
        optimizer: its state, including its own copy of the weights.
        buckets: buffers of collectives.
    """

    weights: float
    gradients: float
    optimizer: float
    buckets: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.weights + self.gradients + self.optimizer + self.buckets


def states(
    parameters: int,
    *,
    stage: int,
    ranks: int,
    optimizer: str = "adamw",
    average: bool = False,
    bucket: int = 0,
) -> States:
    """Bytes of a model's states on a rank.

    Args:
        parameters: number of trained values.
        stage: of ZeRO, 0 to 3. From 1 on the optimizer updates a copy of its share of the weights.
        ranks: R.
        optimizer: "adamw" or "sgd".
        average: an average of the weights is kept.
        bucket: values of a bucket that DeepSpeed reserves from stage 1 on (``reduce_bucket_size``).
    """
    whole, share = FLOAT * parameters, FLOAT * parameters / ranks
    kept = MOMENTS[optimizer] + average
    if stage == 0:
        return States(whole, whole, kept * whole, 0.0)
    return States(
        weights=share if stage == 3 else whole,
        gradients=whole if stage == 1 else share,
        optimizer=(1 + kept) * share,
        buckets=FLOAT * bucket,
    )


def sent_in_a_step(parameters: int, stage: int, ranks: int) -> float:
    """Bytes that a rank sends for an optimizer step (ZeRO, section 7).

    In stages 0 to 2 gradients are reduced, and their sums or the weights are gathered; in stage 3 the weights
    are gathered twice.
    """
    around = (ranks - 1) / ranks * FLOAT * parameters
    return (3 if stage == 3 else 2) * around


def ring_seconds(sent: float, ranks: int, bytes_per_s: float, latency_s: float) -> float:
    """Seconds of collectives around a ring of R members, each of which sends ``sent`` bytes.

    They take 2 (R - 1) messages in sequence (Patarasuk and Yuan, JPDC 2009).
    """
    if ranks == 1:
        return 0.0
    return sent / bytes_per_s + 2 * (ranks - 1) * latency_s
