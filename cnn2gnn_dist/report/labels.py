"""The rows of ``results.json`` and their names for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONTROL = "control_mlp"
"""The row of the model that the stage ``control`` trains."""

LABELS = {
    "teacher": "teacher",
    "student": "student (graph)",
    "self_path": "its self path alone",
    "vote": "its neighbors' vote",
    CONTROL: "control (MLP head)",
}
"""In the order of the table."""

MODELS = ("teacher", "student", CONTROL)
"""The rows that each have a training of their own."""

_SHORT = {"self_path": "self path", CONTROL: "control"}


def evaluated(row: Mapping[str, Any]) -> int | None:
    """Number of images that a row covers (``judged`` in earlier versions); None: not recorded."""
    return row.get("evaluated", row.get("judged"))


def short(row: str) -> str:
    """A row's name in a legend."""
    return _SHORT.get(row, row)


def stage_of(row: str) -> str:
    """The stage that trains a row's model."""
    return "control" if row == CONTROL else row
