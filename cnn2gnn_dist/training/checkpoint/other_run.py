"""What to say of a checkpoint that belongs to another run or config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnn2gnn_dist import field_names
from cnn2gnn_dist.errors import UserError


def check_run(path: Path, state: dict[str, Any], run_id: str, about: dict[str, Any]) -> None:
    """Check that a checkpoint is this run's.

    Args:
        path: of the checkpoint.
        state: its own, with its run and the fields of its config.
        run_id: this run.
        about: the fields of this run.

    Raises:
        UserError: it is another's; the fields that differ are named.
    """
    if state["run_id"] == run_id:
        return
    before, now = (
        {field_names.current_name(name): value for name, value in fields.items()}
        for fields in (state["about"], about)
    )
    there = [(f, before.get(f), now.get(f)) for f in sorted(before.keys() | now.keys())]
    different = [f"{f}: {old!r} -> {new!r}" for f, old, new in there if old != new]
    raise UserError(
        "this checkpoint belongs to another run or config: "
        + ("; ".join(different) or "its inputs differ, not its config"),
        where=str(path),
        remedy="another run.dir=…, --update to restart this stage, "
        "or --force to resume from it anyway",
    )
