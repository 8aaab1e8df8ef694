"""A reader: a pure function from a request (sample ids, view) to arrays."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from cnn2gnn_dist.data.images.batch_views import Wanted, fill_several
from cnn2gnn_dist.data.images.crops import Crops, Views, crops_of, view_numbers
from cnn2gnn_dist.data.images.decode import CorruptSample
from cnn2gnn_dist.data.images.views import CLEAN, shifted
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading import decoded_cache
from cnn2gnn_dist.data.reading.decoded_cache import DecodedCache
from cnn2gnn_dist.data.reading.shard_files import CacheSpec, ShardFiles

if TYPE_CHECKING:  # takes two seconds to import, and readers of small images need none of it
    import torch

CHUNK = 32
"""Images decoded before they are augmented together: bounds memory and amortizes the random draws."""


@dataclass(frozen=True)
class Request:
    """A request: sample ids [n] int64 and the view number (of several views: see ``images/crops.py``)."""

    ids: np.ndarray
    view: int


@dataclass
class Batch:
    """A batch of samples.

    Attributes:
        images: uint8 [n, size, size, 3]; of several views the first.
        labels, ids: int64 [n].
        valid: bool [n]; False where the sample is corrupt (its image is black).
        problems: one line per corrupt sample, in order: "shard: key: reason".
        crops: if groups of views were requested, each group's views uint8 [count, n, size, size, 3]; else
            empty.
        view: the request's view number.
        partners: the samples to mix these with, row by row (``Stream(pairs=True)``); else None.
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    problems: list[str] = field(default_factory=list)
    crops: tuple[np.ndarray, ...] = ()
    view: int = CLEAN
    partners: Batch | None = None

    def tensors(
        self, device: str | torch.device = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return images uint8 [n, H, W, 3], labels int64 [n] and valid bool [n] on the device.

        Copies to a GPU go through pinned memory and are asynchronous.
        """
        return (
            on_device(self.images, device),
            on_device(self.labels, device),
            on_device(self.valid, device),
        )

    def halves(self) -> tuple[Batch, Batch]:
        """Return the first and the second half of the rows as batches over the same memory."""
        middle = len(self.ids) // 2
        bad = int((~self.valid[:middle]).sum())
        return (
            self._rows(slice(None, middle), self.problems[:bad]),
            self._rows(slice(middle, None), self.problems[bad:]),
        )

    def _rows(self, rows: slice, problems: list[str]) -> Batch:
        crops = tuple(crop[:, rows] for crop in self.crops)
        arrays = (self.images[rows], self.labels[rows], self.ids[rows], self.valid[rows])
        return Batch(*arrays, problems, crops, self.view)


def use_one_thread() -> None:
    """Let torch compute in one thread in this process, even if it is imported only later."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)


def on_device(array: np.ndarray, device: str | torch.device) -> torch.Tensor:
    """Copy an array to the device; to a GPU asynchronously, through pinned memory."""
    import torch

    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class ReaderSpec:
    """All that is needed to open a reader in any process.

    Attributes:
        manifest: path of the manifest.
        views: view specification, or groups of several views of each sample.
        decoded_bytes: maximum bytes of the host's cache of decoded images (0: none). Views that are
            cropped from a clean view of fixed size use it; a random resized crop, or a second group of
            views, does not.
        cache: cache of complete remote shards; None: remote samples are read in ranges.
    """

    manifest: str
    views: Views
    decoded_bytes: int = 0
    cache: CacheSpec | None = None


class Reader:
    """Reads samples by id, in any order, from shards at recorded offsets.

    Not thread-safe.
    """

    def __init__(self, spec: ReaderSpec) -> None:
        self.groups = crops_of(spec.views)
        self._several = isinstance(spec.views, tuple)
        self.manifest = Manifest.load(spec.manifest)
        self._files = ShardFiles(self.manifest, spec.cache)
        self._cache: DecodedCache | None = None
        first = self.groups[0].views
        if spec.decoded_bytes and len(self.groups) == 1 and first.kind in decoded_cache.KINDS:
            path = decoded_cache.cache_path(spec.manifest, self.manifest, first)
            self._cache = DecodedCache(path, len(self.manifest), first.size, spec.decoded_bytes)

    def read(self, request: Request, into: Sequence[np.ndarray] | None = None) -> Batch:
        """Read, decode and augment.

        Args:
            request: what to read.
            into: each group's views [V, n, size, size, 3] uint8, to be overwritten; None: new arrays.

        Raises:
            UserError: a shard is missing, truncated, unreadable, or not of the indexed length.
            IndexError: ids outside the manifest.
        """
        ids = np.asarray(request.ids, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.manifest):
            raise IndexError(f"sample ids {ids.min()}..{ids.max()} of {len(self.manifest)}")
        numbers = view_numbers(self.groups, request.view)
        made = list(into or map(partial(_empty, len(ids)), self.groups, numbers))
        valid = np.ones(len(ids), bool)
        if self._cache is None:
            problems = self._read_rows(ids, numbers, made, valid)
        else:
            clean = _empty(len(ids), self.groups[0], [CLEAN])[0]
            problems = self._read_clean(self._cache, ids, clean, valid)
            views = [shifted(self.groups[0].views, clean, ids, number) for number in numbers[0]]
            if into is None and len(views) == 1:
                made = [views[0][None]]
            else:
                np.stack(views, out=made[0])
        if problems:
            for images in made:
                images[:, ~valid] = 0  # old contents, or what a distortion wrote
        labels = self.manifest.label_N[ids].astype(np.int64)
        crops = tuple(made) if self._several else ()
        return Batch(made[0][0], labels, ids.copy(), valid, problems, crops, request.view)

    def _read_clean(
        self, cache: DecodedCache, ids: np.ndarray, clean: np.ndarray, valid: np.ndarray
    ) -> list[str]:
        """Fill ``clean`` with clean views, from the cache where present."""
        there = cache.has(ids)
        if there.all():
            clean[:] = cache.take(ids)
            return []
        clean[there] = cache.take(ids[there])
        absent = np.flatnonzero(~there)
        made, sound = np.zeros_like(clean[absent]), np.ones(len(absent), bool)
        problems = self._read_rows(ids[absent], [(CLEAN,)], [made[None]], sound)
        clean[absent], valid[absent] = made, sound
        cache.keep(ids[absent[sound]], made[sound])
        return problems

    def _read_rows(
        self,
        ids: np.ndarray,
        numbers: Sequence[Sequence[int]],
        made: Sequence[np.ndarray],
        valid: np.ndarray,
    ) -> list[str]:
        """Fill each group's views and ``valid``; return the problems."""
        problems: list[str] = []
        for first in range(0, len(ids), CHUNK):
            rows = slice(first, first + CHUNK)
            blobs = self._files.read_all(ids[rows].tolist())
            wanted = [
                Wanted(group.views, own, images[:, rows])
                for group, own, images in zip(self.groups, numbers, made, strict=True)
            ]
            wrong = fill_several(wanted, blobs, ids[rows])
            valid[rows][list(wrong)] = False
            problems += [self._problem(int(ids[first + row]), wrong[row]) for row in sorted(wrong)]
        return problems

    def _problem(self, sample: int, error: CorruptSample) -> str:
        shard = self.manifest.shards[int(self.manifest.shard_N[sample])]
        return f"{shard.path}: {self.manifest.key(sample)}: {error}"

    def close(self) -> None:
        """Close the shards."""
        self._files.close()


def _empty(rows: int, group: Crops, numbers: Sequence[int]) -> np.ndarray:
    size = group.views.size
    return np.zeros((len(numbers), rows, size, size, 3), np.uint8)
