"""Wait for a limited time only for work that may never end: a call into a lost file server, or over a cut link.

The kernel gives up a connection to a silent peer after a quarter of an hour; a file system never gives up. Neither
call can be interrupted, so it is made in a thread, which is left behind when time is up and ends with the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


def result(work: Callable[[], T], seconds: float, name: str = "bounded work") -> T:
    """What ``work`` returns or raises, within ``seconds``.

    Raises:
        TimeoutError: it is not done by then.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((work(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"not done within {seconds:g} s")
    value, error = outcome[0]
    if error is not None:
        raise error
    return value  # type: ignore[no-any-return]


class BoundedStore:
    """Requests to one of torch's stores, which are answered in time or raise DistStoreError.

    A TCPStore's requests have no timeout, except for ``wait``.
    """

    def __init__(self, store: Any, seconds: float) -> None:
        self._store, self._seconds = store, seconds

    def add(self, key: str, amount: int) -> int:
        """As the store's."""
        return int(self._ask(lambda: self._store.add(key, amount)))

    def set(self, key: str, value: str | bytes) -> None:
        """As the store's."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> bytes:
        """As the store's."""
        return bytes(self._ask(lambda: self._store.get(key)))

    def check(self, keys: list[str]) -> bool:
        """As the store's."""
        return bool(self._ask(lambda: self._store.check(keys)))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """As the store's."""
        self._ask(lambda: self._store.wait(keys, timeout), timeout.total_seconds())

    def delete_key(self, key: str) -> bool:
        """As the store's."""
        return bool(self._ask(lambda: self._store.delete_key(key)))

    def clone(self) -> Any:
        """A separate connection, for a thread that nobody waits for; its requests are not bounded."""
        return self._store.clone()

    def _ask(self, request: Callable[[], T], more: float = 0.0) -> T:
        try:
            return result(request, self._seconds + more, "request to the store")
        except TimeoutError:
            from torch import distributed as dist  # checks of a host do without torch

            raise dist.DistStoreError(
                f"the store on rank 0 has not answered for {self._seconds + more:g} s"
            ) from None
