"""Members of remote shards, read from the host's cache of complete shards or in as few ranges as possible.

Requests for several members run concurrently, so that the latency of the store is paid once.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.data.storage.shard_cache import REST, ShardCache, release

AT_ONCE = 8
"""Concurrent requests of one reader."""
GAP = 16 << 10
"""Maximum gap in bytes between two members that are read in one range."""
SPAN = 8 << 20
"""Maximum bytes of a range that covers several members."""
RETRY_SECONDS = 10.0
"""Seconds before retrying to cache a shard for which there was no room."""
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class CacheSpec:
    """Folder of the cache of complete remote shards, and its maximum size in bytes (0: no cache).

    ``rest``: see :data:`.shard_cache.REST`.
    """

    folder: str
    limit: int
    rest: float = REST


@dataclass(frozen=True)
class ByteRange:
    """A byte range of a shard, and the samples in it."""

    shard: int
    start: int
    end: int
    samples: tuple[int, ...]


def merged_ranges(manifest: Manifest, samples: Iterable[int]) -> list[ByteRange]:
    """Merge the byte ranges of neighboring samples; each sample occurs once."""
    found: list[ByteRange] = []
    shard_N, offset_N = manifest.shard_N, manifest.offset_N
    places = sorted((int(shard_N[s]), int(offset_N[s]), s) for s in set(samples))
    for shard, start, sample in places:
        end = start + int(manifest.size_N[sample])
        last = found[-1] if found else None
        if last and last.shard == shard and start - last.end <= GAP and end - last.start <= SPAN:
            within = (*last.samples, sample)
            found[-1] = ByteRange(shard, last.start, max(last.end, end), within)
        else:
            found.append(ByteRange(shard, start, end, (sample,)))
    return found


class RemoteShards:
    """Reads members of the remote shards of a manifest. Not thread-safe.

    Args:
        manifest: manifest of the samples.
        cache: cache of complete shards; None: read ranges only.
    """

    def __init__(self, manifest: Manifest, cache: CacheSpec | None) -> None:
        self.manifest = manifest
        self._cache: ShardCache | None = None
        if cache is not None and cache.limit:
            folder = Path(cache.folder).expanduser()
            self._cache = ShardCache(folder, cache.limit, cache.rest)
        self._later: dict[int, float] = {}
        self._pool: ThreadPoolExecutor | None = None

    def read(self, samples: Sequence[int]) -> dict[int, bytes]:
        """Return the bytes of each sample by its id.

        Raises:
            UserError: a shard is missing, changed, or unreachable.
        """
        ranges = merged_ranges(self.manifest, samples)
        handles = self._open(sorted({byte_range.shard for byte_range in ranges}))
        try:
            found: dict[int, bytes] = {}
            away = [byte_range for byte_range in ranges if byte_range.shard not in handles]
            for byte_range, data in zip(away, self._each(self._range, away), strict=True):
                for sample in byte_range.samples:
                    start, end = self._place(sample)
                    found[sample] = data[start - byte_range.start : end - byte_range.start]
            for byte_range in ranges:
                if byte_range.shard in handles:
                    for sample in byte_range.samples:
                        start, end = self._place(sample)
                        found[sample] = os.pread(handles[byte_range.shard], end - start, start)
            return found
        finally:
            for handle in handles.values():
                release(handle)

    def read_again(self, sample: int) -> bytes:
        """Read a sample from the store, and drop the cached shard, whose copy turned out wrong."""
        shard = self.manifest.shards[int(self.manifest.shard_N[sample])]
        if self._cache is not None:
            self._cache.drop(shard.path, shard.bytes)
        return self._range(merged_ranges(self.manifest, [sample])[0])

    def close(self) -> None:
        """Stop the threads."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _open(self, numbers: Sequence[int]) -> dict[int, int]:
        """Return descriptors of the shards that are cached, or can be."""
        if self._cache is None:
            return {}
        handles: dict[int, int] = {}
        missing = []
        for number in numbers:
            shard = self.manifest.shards[number]
            handle = self._cache.held(shard.path, shard.bytes)
            if handle is not None:
                handles[number] = handle
            elif self._later.get(number, 0.0) <= time.monotonic():
                missing.append(number)
        problem: BaseException | None = None
        for number, got in zip(missing, self._each(self._fetched, missing), strict=True):
            if isinstance(got, BaseException):
                problem = problem or got
            elif got is not None:
                handles[number] = got
            else:
                self._later[number] = time.monotonic() + RETRY_SECONDS
        if problem is not None:
            for handle in handles.values():
                release(handle)
            raise problem
        return handles

    def _fetched(self, number: int) -> int | BaseException | None:
        """Return a descriptor, or the error instead of raising it, so that other descriptors don't leak."""
        assert self._cache is not None
        shard = self.manifest.shards[number]
        try:
            return self._cache.open(shard.path, shard.bytes, lambda h: self._wrong(number, h))
        except BaseException as error:
            return error

    def _wrong(self, number: int, handle: int) -> str:
        """Describe the first member of a copy that differs from the indexed one; empty if none does."""
        manifest = self.manifest
        if manifest.crc_N is None:
            return ""
        first, last = np.searchsorted(manifest.shard_N, [number, number + 1]).tolist()
        for row in range(first, last):
            data = os.pread(handle, int(manifest.size_N[row]), int(manifest.offset_N[row]))
            if zlib.crc32(data) != int(manifest.crc_N[row]):
                return f"the bytes of sample '{manifest.key(row)}' differ from those indexed"
        return ""

    def _range(self, byte_range: ByteRange) -> bytes:
        url = self.manifest.shards[byte_range.shard].path
        return urls.read_range(url, byte_range.start, byte_range.end - byte_range.start)

    def _place(self, sample: int) -> tuple[int, int]:
        start = int(self.manifest.offset_N[sample])
        return start, start + int(self.manifest.size_N[sample])

    def _each(self, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        if len(items) <= 1:
            return [work(item) for item in items]
        self._pool = self._pool or ThreadPoolExecutor(AT_ONCE, thread_name_prefix="shards")
        return list(self._pool.map(work, items))
