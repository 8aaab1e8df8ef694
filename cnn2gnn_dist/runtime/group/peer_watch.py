"""Which ranks are still alive, checked alongside the collectives: NCCL doesn't name a lost rank.

Under gloo a dead peer fails the others' next collective. Under NCCL the GPU waits for the peer and
the host for the GPU, and torch's watchdog ends the process after the timeout without naming a rank;
what waits in between can't be woken. So each rank writes heartbeats to the group's store, and
exits, naming the rank, when another has been silent for a while; or with the error that this one has ended with.
So does, under either, a rank that waits for a file that never comes when the others have given it up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from cnn2gnn_dist import log
from cnn2gnn_dist.errors import PeerLost, UserError
from cnn2gnn_dist.runtime import bounded_wait
from cnn2gnn_dist.runtime.group import members

BEAT_S = 2.0
CONNECT_S = 10.0
SILENCE_S = 60.0
"""A rank may hold the GIL for long, but not for this long."""


class SilenceTracker:
    """When each peer's heartbeat last changed. Pure: the caller passes the time."""

    def __init__(self, peers: Iterable[int], now: float) -> None:
        self._seen: dict[int, tuple[bytes | None, float]] = {p: (None, now) for p in peers}

    def note(self, values: Mapping[int, bytes], now: float) -> None:
        """Record the peers' heartbeats; a missing or unchanged one counts as silence."""
        for peer, value in values.items():
            if value != self._seen[peer][0]:
                self._seen[peer] = (value, now)

    def since(self, now: float, limit: float) -> dict[int, float]:
        """Peers that have been silent for longer than ``limit`` seconds, and for how long."""
        silent = {peer: now - seen for peer, (_, seen) in self._seen.items()}
        return {peer: seconds for peer, seconds in silent.items() if seconds > limit}


class PeerWatch:
    """A thread that writes this rank's heartbeat to ``store`` and watches the others'.

    Args:
        store: the group's; it is cloned, so that nobody waits for the thread's requests.
        silence_s: seconds of silence after which a peer counts as lost.
        lost: what to do then; by default the process reports it and exits with the error's code.

    Attributes:
        reason: returns the error with which the peer has ended, if it has passed one on; None: there is none.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        silence_s: float = SILENCE_S,
        beat_s: float = BEAT_S,
        lost: Callable[[UserError], None] | None = None,
    ) -> None:
        self.reason: Callable[[], UserError | None] = lambda: None
        self._rank = rank
        self._store = _connected(store, silence_s)
        self._peers = [peer for peer in range(world_size) if peer != rank]
        self._silence_s, self._beat_s, self._lost = silence_s, beat_s, lost or self._exit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching and stop sending heartbeats."""
        self._stop.set()

    def _run(self) -> None:
        silence, count = SilenceTracker(self._peers, time.monotonic()), 0
        while not self._stop.wait(self._beat_s):
            count += 1
            if self._store is not None:
                try:
                    self._store.set(_key(self._rank), str(count))
                    present = [peer for peer in self._peers if self._store.check([_key(peer)])]
                    found = {peer: self._store.get(_key(peer)) for peer in present}
                    silence.note(found, time.monotonic())
                except RuntimeError:  # its host is gone, or is exiting as this rank will
                    self._store = (
                        None  # the connection won't come back, and each request would log that
                    )
            if silent := silence.since(time.monotonic(), self._silence_s):
                gone = "" if self._store else "; the rendezvous store does not answer"
                self._lost(self.reason() or _error(silent, gone))
                return

    def _exit(self, error: UserError) -> None:
        """Exit: only the end of the process wakes a thread that waits for a GPU."""
        if self._rank == 0 or not error.shared:
            log.report_error(error)
        os._exit(error.exit_code)


def _connected(store: Any, silence_s: float) -> dist.Store | None:
    """A connection of the watch's own; None: the host of the store is gone already."""
    try:
        found: dist.Store = bounded_wait.result(store.clone, CONNECT_S, "connect to the store")
    except (RuntimeError, TimeoutError):
        return None
    found.set_timeout(timedelta(seconds=silence_s))
    return found


def _key(rank: int) -> str:
    return f"alive/{rank}"


def _error(silent: Mapping[int, float], gone: str) -> PeerLost:
    names = ", ".join(members.name_of(peer) for peer in sorted(silent))
    return PeerLost(
        f"{names} has not been heard from for {max(silent.values()):.0f} s{gone}",
        where="process group",
        remedy="check that rank's last output; the same command resumes the run",
    )
