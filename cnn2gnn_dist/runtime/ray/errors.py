"""What Ray's exceptions say about a call: what the actor's own code raised, or that the actor is gone."""

from __future__ import annotations

import re

from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from cnn2gnn_dist.errors import first_line, last_line


def cause_of(error: RayError) -> Exception | None:
    """Return what the actor's code raised.

    None: its process or node died, it was killed for memory, or the answer was lost with its node.
    """
    if not isinstance(error, RayTaskError):
        return None
    return error.cause if isinstance(error.cause, Exception) else error


def why_lost(error: RayError) -> str:
    """Why an actor is gone, in one line; Ray's message about an out-of-memory kill ends in general advice."""
    return first_line(error) if isinstance(error, OutOfMemoryError) else last_line(error)


def not_imported(error: RayError) -> str | None:
    """Why an actor's class could not be imported where it should run; None if something else failed."""
    text = str(error)
    if "failed to import on the worker" not in text:
        return None
    found = re.findall(r"^\s*(\w*(?:Error|Exception): .+)$", text, re.MULTILINE)
    named = [line for line in found if "Module" in line or "Import" in line] or found
    return named[-1] if named else "see the log of that host"
