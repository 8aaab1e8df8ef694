"""Wait for ranks that are slow, but not for ranks that are gone.

A collective can't tell the two apart: it gives up after the group's timeout, however busy the
rank is that it waits for. Here ranks meet at keys in the group's store instead. A working rank
refreshes a key from a thread, and waiting ranks poll it: a rank without a heartbeat for the length
of the timeout counts as lost; one with heartbeats is waited for.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.bounded_wait import BoundedStore

BEAT_S = 5.0
"""Seconds between two heartbeats; a fifth of the timeout where that is less."""
FIRST_POLL_S, LAST_POLL_S = 0.001, 0.1
LINGER_S = 10.0
"""Seconds that rank 0, with an error, waits for ranks that still work to read it."""


class PeerRaised(RuntimeError):
    """What another rank raised in work that all wait for, where it is not an error for the user."""


@dataclass
class Meeting:
    """The point where the ranks of a group meet.

    Args:
        store: shared by the group, empty at first; any of torch's that can be cloned.
        timeout_s: seconds of silence after which a rank counts as lost.
    """

    store: Any
    rank: int
    world_size: int
    timeout_s: float

    def __post_init__(self) -> None:
        # Over a cut link a request would block until the kernel gives up the connection.
        self.store = BoundedStore(self.store, self.timeout_s)

    @contextlib.contextmanager
    def uneven(self) -> Iterator[None]:
        """Work that may take one rank much longer than another; all leave together (collective).

        Raises:
            UserError: a rank raised it (raised here on every rank), or had no space left on its disk.
            PeerRaised: another rank raised something else.
            DistStoreError, DistNetworkError: a rank is gone, stopped, or never arrived.
        """
        call = self.store.add(f"calls/{self.rank}", 1)
        beat = _Heartbeat(self.store, f"beat/{self.rank}", call, self.every)
        try:
            with beat:
                yield
        except BaseException as error:
            if isinstance(error, UserError):
                error.shared = True
            with contextlib.suppress(Exception):
                self.store.set(_outcome_key(call), pickle.dumps(self._error_for_peers(error)))
                if self.rank == 0:
                    self._wait_until_read(call, self.world_size)
            raise
        self.store.set(f"left/{self.rank}", str(call))
        raised: Exception | None = None
        if self.store.add(f"{call}/left", 1) == self.world_size:
            self.store.set(_outcome_key(call), b"")
        else:
            raised = self._wait(call)
        self._wait_until_read(
            call, self.world_size - (raised is not None)
        )  # the rank that raised doesn't read it
        if raised is not None:
            if isinstance(raised, UserError):
                raised.shared = True
            raise raised

    def _wait_until_read(self, call: int, readers: int) -> None:
        """Rank 0 waits until the others have read the outcome: the store often ends with it."""
        read = self.store.add(f"{call}/told", 1)
        if self.rank:
            return
        deadline = time.monotonic() + min(LINGER_S, self.timeout_s)
        while read < readers and time.monotonic() < deadline:
            time.sleep(FIRST_POLL_S)
            read = self.store.add(f"{call}/told", 0)
        for name in ("open", "left", "told"):  # all ranks are here: nobody reads the earlier call
            self.store.delete_key(f"{call - 1}/{name}")

    @property
    def every(self) -> float:
        """Seconds between two heartbeats."""
        return min(BEAT_S, self.timeout_s / 5)

    def _error_for_peers(self, error: BaseException) -> Exception:
        """The error that the other ranks raise when this rank has raised ``error``."""
        if isinstance(error, UserError):
            return error
        if (full := durable.disk_full(error, resumes=True)) is not None:
            return full  # its own rank reports it likewise, when its stage ends
        if isinstance(error, Exception):
            return PeerRaised(f"rank {self.rank}: {error!r}")
        return dist.DistStoreError(f"rank {self.rank} was asked to stop ({error!r})")

    def _wait(self, call: int) -> Exception | None:
        """Wait for the others; returns the error that one of them raised, if any."""
        # In a thread: a store whose server was stopped doesn't answer and ignores timeouts.
        watch = _Watch(self, call)
        threading.Thread(target=watch.run, daemon=True).start()
        while not watch.ended.wait(self.every):
            if time.monotonic() - watch.last_answer > self.timeout_s:
                watch.abandoned = True
                raise dist.DistStoreError(
                    f"the store on rank 0 has not answered for {self.timeout_s:g} s"
                )
        if watch.lost is not None:
            raise watch.lost
        return watch.raised


@dataclass
class _Watch:
    """Polls whether a meeting has opened, and whether the missing ranks are still alive."""

    meeting: Meeting
    call: int
    ended: threading.Event = field(default_factory=threading.Event)
    raised: Exception | None = None
    lost: Exception | None = None
    last_answer: float = field(default_factory=time.monotonic)
    abandoned: bool = False

    def run(self) -> None:
        try:
            self._watch(self.meeting.store.clone())
        except Exception as error:
            self.lost = error
        self.ended.set()

    def _watch(self, store: Any) -> None:
        began = next_check = time.monotonic()
        heartbeats: dict[int, tuple[bytes, float]] = {}
        pause = FIRST_POLL_S
        while not self.abandoned:
            if store.check([_outcome_key(self.call)]):
                content = store.get(_outcome_key(self.call))
                self.raised = pickle.loads(content) if content else None
                return
            self.last_answer = now = time.monotonic()
            if now >= next_check:
                self._check_heartbeats(store, heartbeats, began)
                next_check = now + self.meeting.every
            time.sleep(pause)
            pause = min(1.5 * pause, LAST_POLL_S)

    def _check_heartbeats(
        self, store: Any, heartbeats: dict[int, tuple[bytes, float]], began: float
    ) -> None:
        for rank in range(self.meeting.world_size):
            if int(_read(store, f"left/{rank}") or 0) >= self.call:
                continue
            heartbeat, now = _read(store, f"beat/{rank}"), time.monotonic()
            last, since = heartbeats.get(rank, (heartbeat, began))
            if heartbeat != last:
                since = now
            heartbeats[rank] = heartbeat, since
            if now - since > self.meeting.timeout_s:
                raise dist.DistStoreError(
                    f"rank {rank} has sent no heartbeat for {self.meeting.timeout_s:g} s"
                )


class _Heartbeat:
    """Heartbeats from a thread while work lasts."""

    def __init__(self, store: Any, key: str, call: int, every: float) -> None:
        self.store, self.key, self.call, self.every = store, key, call, every
        self.over = threading.Event()

    def __enter__(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def _run(self) -> None:
        store, count = None, 0
        with contextlib.suppress(Exception):  # a store that is gone: the waiting ranks notice it
            while not self.over.wait(self.every):  # short work needs no heartbeat
                store = store or self.store.clone()
                count += 1
                store.set(self.key, f"{self.call}.{count}")


def _outcome_key(call: int) -> str:
    return f"{call}/open"


def _read(store: Any, key: str) -> bytes:
    return bytes(store.get(key)) if store.check([key]) else b""
