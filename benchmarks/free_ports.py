"""Ports for the ranks of a benchmark."""

from __future__ import annotations

import random
import socket


def free_port() -> int:
    """A free loopback port below those that Linux gives to outgoing connections (32768 to 60999).

    One of theirs may be in use again by the time that a rank listens on it.
    """
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(20_000, 32_000)))
            except OSError:
                continue
            return int(probe.getsockname()[1])
