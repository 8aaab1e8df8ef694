"""Reading the bytes of samples: across processes."""

from __future__ import annotations

import os
import signal

from cnn2gnn_dist.data.storage.shard_cache import ShardCache, release
from tests.support.forks import fork_context
from tests.unit.data.test_storage import IMAGES, held, open_one, shards, url_of, web  # noqa: F401 (fixtures)


def hold_open(cache: ShardCache, url: str, length: int, told: object, go: object) -> None:
    handle = cache.open(url, length)
    told.set()
    go.wait(60)
    release(handle)


def test_another_process_reads_what_must_stay_until_it_dies(web, shards, tmp_path):
    context = fork_context()
    told, go = context.Event(), context.Event()
    cache = ShardCache(tmp_path / "c", max(p.stat().st_size for p in shards), rest=0)
    job = (cache, url_of(web, shards[0]), shards[0].stat().st_size, told, go)
    reader = context.Process(target=hold_open, args=job)
    reader.start()
    assert told.wait(60)
    assert open_one(cache, web, shards[1]) is None
    os.kill(reader.pid, signal.SIGKILL)
    reader.join()
    release(open_one(cache, web, shards[1]))
    assert held(cache, web, shards) == [1]
