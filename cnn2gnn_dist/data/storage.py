"""Where the shards' bytes come from: positioned reads of members at recorded offsets."""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn2gnn_dist.data.manifest import Manifest
from cnn2gnn_dist.data.shard_cache import ShardCache
from cnn2gnn_dist.data.urls import is_remote, read_range
from cnn2gnn_dist.errors import UserError

OPEN_SHARDS = 64


@dataclass(frozen=True)
class CacheSpec:
    """Where whole copies of remote shards lie, and how many bytes they may take (0: none)."""

    folder: str
    limit: int


class ShardFiles:
    """Reads samples' bytes; keeps the last ``OPEN_SHARDS`` shards open. Not for several threads.

    Remote shards are read from a cache of whole shards, or member by member where there is none
    (or no room in it). Where the manifest holds checksums, each sample's first read is verified.

    Args:
        manifest: of the samples.
        cache: for remote shards; None: read ranges.
    """

    def __init__(self, manifest: Manifest, cache: CacheSpec | None = None) -> None:
        self.manifest = manifest
        self._files: OrderedDict[int, int] = OrderedDict()
        self._cache: ShardCache | None = None
        self._ranges: set[int] = set()  # shards without room in the cache
        self._verified_N = None if manifest.crc_N is None else np.zeros(len(manifest), bool)
        if cache is not None and cache.limit:
            self._cache = ShardCache(Path(cache.folder).expanduser(), cache.limit)

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def read(self, sample: int) -> bytes:
        """The image bytes of a sample.

        Raises:
            UserError: its shard is missing, truncated, unreadable, or not of the length indexed.
        """
        data = self._read(sample)
        if self._verified_N is None or self._verified_N[sample]:
            return data
        assert self.manifest.crc_N is not None
        wanted = int(self.manifest.crc_N[sample])
        if zlib.crc32(data) != wanted:
            data = self._read_again(sample)
            if zlib.crc32(data) != wanted:
                raise self._changed(
                    int(self.manifest.shard_N[sample]),
                    f"the bytes of sample '{self.manifest.key(sample)}' are not those indexed",
                )
        self._verified_N[sample] = True
        return data

    def _read(self, sample: int) -> bytes:
        manifest = self.manifest
        number = int(manifest.shard_N[sample])
        offset, size = int(manifest.offset_N[sample]), int(manifest.size_N[sample])
        url = manifest.shards[number].path
        file = None if number in self._ranges else self._file(number)
        if file is None:
            return read_range(url, offset, size)
        try:
            data = os.pread(file, size, offset)
        except OSError as error:  # a file system gone, a bad disk
            raise self._changed(number, f"it can't be read ({error.strerror})") from None
        if len(data) != size:
            raise self._changed(number, "it ends early")
        return data

    def _read_again(self, sample: int) -> bytes:
        """What a remote store holds now, past a copy that may have been damaged on its way."""
        number = int(self.manifest.shard_N[sample])
        shard = self.manifest.shards[number]
        if is_remote(shard.path):
            if number in self._files:
                os.close(self._files.pop(number))
            if self._cache is not None:
                self._cache.drop(shard.path, shard.bytes)
        return self._read(sample)

    def _file(self, number: int) -> int | None:
        """A descriptor of a shard; None: read ranges of it."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        shard = self.manifest.shards[number]
        if is_remote(shard.path):
            handle = None if self._cache is None else self._cache.open(shard.path, shard.bytes)
            if handle is None:
                self._ranges.add(number)
                return None
            return self._kept(number, handle)
        try:
            handle = os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise self._changed(number, error.strerror or "it can't be opened") from None
        found = os.fstat(handle).st_size
        if found != shard.bytes:
            os.close(handle)  # not kept: the next request must be refused as well
            raise self._changed(number, f"it has {found:,} bytes, {shard.bytes:,} were indexed")
        return self._kept(number, handle)

    def _kept(self, number: int, handle: int) -> int:
        self._files[number] = handle
        if len(self._files) > OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return handle

    def _changed(self, number: int, what: str) -> UserError:
        return UserError(
            f"this shard is missing, truncated or changed: {what}",
            where=self.manifest.shards[number].path,
            remedy="restore the shard, or index again (`cnn2gnn index --update`)",
        )
