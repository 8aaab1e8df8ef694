"""What a training's result depends on although no key holds it: from which step on it was what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_TEXTS = {
    "precisions": "this device computes in {now}, the one before in {before} until step {step}: the result differs "
    "from that of a run with either (precision={before} continues as before)",
    "norms": "BatchNorm now sees {now} images at a time, {before} until step {step}: the result differs from that of "
    "a run with either",
    "pools": "images now find their neighbors among the {now} of a micro-batch, among {before} until step {step}: the "
    "result differs from that of a run with either",
}
"""Warnings about a change, by what has changed: the precision in which the model computes, the images behind a
BatchNorm's statistics, the images of a micro-batch (``graph.scope=batch``)."""


@dataclass
class Conditions:
    """The conditions of one training.

    Attributes:
        seen: for each kind, [step, value] from each step on at which the value has changed. One pair: it never has.
    """

    seen: dict[str, list[list[Any]]] = field(default_factory=lambda: {kind: [] for kind in _TEXTS})

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Conditions:
        """Those recorded in a checkpoint; earlier versions recorded fewer kinds."""
        return cls({kind: list(extra.get(kind, [])) for kind in _TEXTS})

    def note(self, kind: str, step: int, now: Any) -> str | None:
        """Record what it is from ``step`` on; a warning if it was something else before, in another attempt.

        ``now`` is None where this kind does not apply.
        """
        seen = self.seen[kind]
        before = seen[-1][1] if seen else None
        if now is None or now == before:
            return None
        seen.append([step, now])
        return (
            _TEXTS[kind].format(now=now, before=before, step=step) if before is not None else None
        )
