"""How far a pool of readers reads ahead, whatever its backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Request


def assert_read_ahead_is_the_prefetch(
    pool: ReaderPool,
    requests: Sequence[Request],
    prefetch: int,
    folder: Path,
    settle: Callable[[ReaderPool], None],
) -> None:
    """Take batch after batch; assert that each time exactly ``prefetch`` more have been requested and read.

    ``folder`` gets a file from the readers for each request, named by its view: 0, 1, 2, …. ``settle``
    returns when everything that was requested has been read, as under a slow trainer.
    """
    taken = 0

    def source() -> Iterator[Request]:
        nonlocal taken
        for request in requests:
            taken += 1
            yield request

    for received, _ in enumerate(pool.batches(source()), 1):
        settle(pool)
        wanted = min(len(requests), received + prefetch)
        assert taken == wanted
        assert sorted(int(path.name) for path in folder.iterdir()) == list(range(wanted))
