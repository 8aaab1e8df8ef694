"""Positioned reads of shard members at recorded offsets.

Local shards are read here, remote ones through :mod:`.remote_shards`.
"""

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.remote_shards import CacheSpec, RemoteShards
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import ShardChanged

__all__ = ["OPEN_SHARDS", "CacheSpec", "ShardFiles"]

OPEN_SHARDS = 64


class ShardFiles:
    """Reads the bytes of samples; keeps the last ``OPEN_SHARDS`` shards open. Not thread-safe.

    Remote shards are read from a cache of complete shards, or in ranges if there is no cache or no
    room in it. If the manifest has checksums, the first read of each sample is verified.

    Args:
        manifest: manifest of the samples.
        cache: cache of remote shards; None: read ranges.
    """

    def __init__(self, manifest: Manifest, cache: CacheSpec | None = None) -> None:
        self.manifest = manifest
        self._files: OrderedDict[int, int] = OrderedDict()
        self._remote_S = [is_remote(shard.path) for shard in manifest.shards]
        self._remote = RemoteShards(manifest, cache) if any(self._remote_S) else None
        self._verified_N = None if manifest.crc_N is None else np.zeros(len(manifest), bool)

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            os.close(self._files.popitem()[1])
        if self._remote is not None:
            self._remote.close()

    def __del__(self) -> None:
        if hasattr(self, "_verified_N"):
            self.close()

    def read(self, sample: int) -> bytes:
        """Return the image bytes of a sample; errors as in :meth:`read_all`."""
        return self.read_all([sample])[0]

    def read_all(self, samples: Sequence[int]) -> list[bytes]:
        """Return the image bytes of samples, in the requested order.

        Raises:
            UserError: a shard is missing, truncated, unreadable, unreachable, or not of the indexed
                length; or a sample's bytes don't match the recorded checksum.
        """
        if self._remote is None:
            blobs = [self._read(sample) for sample in samples]
        else:
            remote = [s for s in samples if self._remote_S[int(self.manifest.shard_N[s])]]
            found = self._remote.read(remote)
            blobs = [found[s] if s in found else self._read(s) for s in samples]
        if self._verified_N is not None:
            blobs = [self._verified(*pair) for pair in zip(samples, blobs, strict=True)]
        return blobs

    def _verified(self, sample: int, data: bytes) -> bytes:
        """Return the bytes, verified against the checksum on the first read."""
        seen_N, crc_N = self._verified_N, self.manifest.crc_N
        if seen_N is None or crc_N is None or seen_N[sample]:
            return data
        number, wanted = int(self.manifest.shard_N[sample]), int(crc_N[sample])
        if zlib.crc32(data) != wanted:
            again = self._remote is not None and self._remote_S[number]
            data = self._remote.read_again(sample) if self._remote and again else self._read(sample)
            if zlib.crc32(data) != wanted:
                key = self.manifest.key(sample)
                what = f"the bytes of sample '{key}' differ from those indexed"
                raise self._changed(number, what)
        seen_N[sample] = True
        return data

    def _read(self, sample: int) -> bytes:
        manifest = self.manifest
        number = int(manifest.shard_N[sample])
        size = int(manifest.size_N[sample])
        try:
            data = os.pread(self._file(number), size, int(manifest.offset_N[sample]))
        except OSError as error:  # lost file system, bad disk
            raise self._changed(number, f"it can't be read ({error.strerror})") from None
        if len(data) != size:
            raise self._changed(number, "it ends early")
        return data

    def _file(self, number: int) -> int:
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        shard = self.manifest.shards[number]
        try:
            handle = os.open(shard.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise self._changed(number, error.strerror or "it can't be opened") from None
        found = os.fstat(handle).st_size
        if found != shard.bytes:
            os.close(handle)  # not cached: the next request must fail too
            raise self._changed(
                number, f"it has {found:,} bytes, but had {shard.bytes:,} when indexed"
            )
        self._files[number] = handle
        if len(self._files) > OPEN_SHARDS:
            os.close(self._files.popitem(last=False)[1])
        return handle

    def _changed(self, number: int, what: str) -> ShardChanged:
        return ShardChanged(
            f"this shard is missing, truncated or changed: {what}",
            where=self.manifest.shards[number].path,
        )
