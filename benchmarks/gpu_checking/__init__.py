"""The checks behind gpu_check.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Skip(Exception):
    """A check that can't run here, and why."""


@dataclass(frozen=True)
class Setting:
    """Where a check runs: "cuda" or "cpu", rank and number of ranks, whether at toy size, the results folder."""

    device: str
    rank: int
    ranks: int
    toy: bool
    out: Path


@dataclass
class Outcome:
    """Whether a check passes, its main figure in one line, and further numbers."""

    holds: bool
    figure: str
    numbers: dict[str, Any] = field(default_factory=dict)
