"""A reader: a pure function from a request (sample ids, view) to arrays."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from cnn2gnn_dist.data.decode import CorruptSample, decode
from cnn2gnn_dist.data.manifest import Manifest
from cnn2gnn_dist.data.views import ViewSpec, render, render_batch
from cnn2gnn_dist.errors import UserError

OPEN_SHARDS = 64
CHUNK = 32
"""Images decoded before they are augmented together: bounds memory, shares the draws' cost."""


@dataclass(frozen=True)
class Request:
    """What to read: sample ids [n] int64 and the number of the view."""

    ids: np.ndarray
    view: int


@dataclass
class Batch:
    """What was read.

    Attributes:
        images: uint8 [n, size, size, 3].
        labels, ids: int64 [n].
        valid: bool [n]; False where the sample is corrupt (its image is black).
        problems: one line for each corrupt sample, in order: "shard: key: reason".
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReaderSpec:
    """What a reader needs to open itself anywhere: the manifest's path and the views."""

    manifest: str
    views: ViewSpec


class Reader:
    """Reads samples by id, in any order, from shards at recorded offsets.

    Keeps the last ``OPEN_SHARDS`` shards open; not to be shared between threads.
    """

    def __init__(self, spec: ReaderSpec) -> None:
        self.views = spec.views
        self.manifest = Manifest.load(spec.manifest)
        self._files: OrderedDict[int, int] = OrderedDict()

    def read(self, request: Request) -> Batch:
        """Read, decode and augment.

        Raises:
            UserError: a shard is missing, truncated, unreadable, or not of the length indexed.
            IndexError: ids outside the manifest.
        """
        ids = np.asarray(request.ids, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.manifest):
            raise IndexError(f"sample ids {ids.min()}..{ids.max()} of {len(self.manifest)}")
        size = self.views.size
        images = np.zeros((len(ids), size, size, 3), np.uint8)
        valid = np.ones(len(ids), bool)
        problems: list[str] = []
        for first in range(0, len(ids), CHUNK):
            rows = slice(first, first + CHUNK)
            problems += self._read_chunk(ids[rows], request.view, images[rows], valid[rows])
        labels = self.manifest.label_N[ids].astype(np.int64)
        return Batch(images, labels, ids.copy(), valid, problems)

    def _read_chunk(
        self, ids: np.ndarray, view: int, images: np.ndarray, valid: np.ndarray
    ) -> list[str]:
        """Fill ``images`` and ``valid``, views of the batch's arrays; returns the problems."""
        decoded: list[np.ndarray] = []
        wrong: dict[int, CorruptSample] = {}
        for row, sample in enumerate(ids.tolist()):
            try:
                decoded.append(decode(self._bytes(sample)))
            except CorruptSample as error:
                wrong[row] = error
        rows = [row for row in range(len(ids)) if row not in wrong]
        try:
            images[rows] = render_batch(self.views, decoded, ids[rows], view)
        except CorruptSample:  # rare: an image too narrow to be resized; find out which
            for row, image in zip(rows, decoded, strict=True):
                try:
                    images[row] = render(self.views, image, int(ids[row]), view)
                except CorruptSample as error:
                    wrong[row] = error
        valid[list(wrong)] = False
        return [self._problem(int(ids[row]), wrong[row]) for row in sorted(wrong)]

    def _problem(self, sample: int, error: CorruptSample) -> str:
        shard = self.manifest.shards[int(self.manifest.shard_N[sample])]
        return f"{shard.path}: {self.manifest.key(sample)}: {error}"

    def close(self) -> None:
        """Close the shards."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _bytes(self, sample: int) -> bytes:
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
