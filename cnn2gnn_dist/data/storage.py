"""Where the shards' bytes come from: positioned reads of members at recorded offsets."""

from __future__ import annotations

import os
from collections import OrderedDict

from cnn2gnn_dist.data.manifest import Manifest
from cnn2gnn_dist.errors import UserError

OPEN_SHARDS = 64


class ShardFiles:
    """Reads samples' bytes; keeps the last ``OPEN_SHARDS`` shards open. Not for several threads."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._files: OrderedDict[int, int] = OrderedDict()

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
        manifest = self.manifest
        number = int(manifest.shard_N[sample])
        size = int(manifest.size_N[sample])
        try:
            data = os.pread(self._file(number), size, int(manifest.offset_N[sample]))
        except OSError as error:  # a file system gone, a bad disk
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
            os.close(handle)  # not kept: the next request must be refused as well
            raise self._changed(number, f"it has {found:,} bytes, {shard.bytes:,} were indexed")
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
