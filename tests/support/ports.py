"""Ports for servers and groups of ranks that tests start."""

from __future__ import annotations

import random
import socket

draw = random.SystemRandom()  # workers of pytest-xdist seed the global one alike


def free_port() -> int:
    """A port that was free a moment ago, out of the ways of others.

    That is below the ports that Linux gives to outgoing connections (32768 to 60999), one of which may be in use again
    by the time that the server listens, and above those of Ray's workers (10002 to 19999).
    """
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", draw.randrange(20_000, 32_000)))
            except OSError:
                continue
            return int(probe.getsockname()[1])
