"""What Ray's exceptions say of a call: what the actor's own code raised, or that the actor is gone."""

from __future__ import annotations

from ray.exceptions import RayError, RayTaskError


def cause_of(error: RayError) -> Exception | None:
    """Return what the actor's code raised.

    None: its process or node died, it was killed for memory, or the answer was lost with its node.
    """
    if not isinstance(error, RayTaskError):
        return None
    return error.cause if isinstance(error.cause, Exception) else error
