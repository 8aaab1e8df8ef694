"""Transfers under network faults: across processes."""

from __future__ import annotations

import multiprocessing
import threading

import pytest

from cnn2gnn_dist.data.storage import urls
from tests.unit.data.test_transfer import BYTES, web  # noqa: F401 (fixtures)


def read_in_child(url: str, answer: multiprocessing.queues.Queue) -> None:
    answer.put(urls.read_range(url, 100, 1000))


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_threads_and_children_read_on_their_own(web, way):
    url = f"{web.url}/a.tar"
    found: dict[int, bytes] = {}

    def work(number: int) -> None:
        found[number] = urls.read_range(url, 1000 * number, 1000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert b"".join(found[number] for number in range(8)) == BYTES[:8000]
    context = multiprocessing.get_context(way)  # while the parent's loop and sessions are in use
    answer = context.Queue()
    child = context.Process(target=read_in_child, args=(url, answer))
    child.start()
    assert answer.get(timeout=300) == BYTES[100:1100]
    child.join()
    assert child.exitcode == 0
    assert urls.read_range(url, 0, 10) == BYTES[:10]
