"""What to say of a checkpoint that belongs to another run or config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnn2gnn_dist import field_names
from cnn2gnn_dist.errors import UserError


def other_run(path: Path, state: dict[str, Any], about: dict[str, Any]) -> UserError:
    """The error that names the config fields in which a checkpoint differs.

    Args:
        path: of the checkpoint.
        state: its own, with the fields of its config.
        about: the fields of this run.
    """
    before, now = (
        {field_names.current_name(name): value for name, value in fields.items()}
        for fields in (state["about"], about)
    )
    there = [(f, before.get(f), now.get(f)) for f in sorted(before.keys() | now.keys())]
    different = [f"{f}: {old!r} -> {new!r}" for f, old, new in there if old != new]
    return UserError(
        "this checkpoint belongs to another run or config: "
        + ("; ".join(different) or "its inputs differ, not its config"),
        where=str(path),
        remedy="another run.dir=…, --update to restart this stage, "
        "or --force to resume from it anyway",
    )
