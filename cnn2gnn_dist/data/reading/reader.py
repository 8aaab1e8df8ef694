"""A reader: a pure function from a request (sample ids, view) to arrays."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from cnn2gnn_dist.data.images.batch_views import fill_views
from cnn2gnn_dist.data.images.decode import CorruptSample
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, shifted
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading import decoded_cache
from cnn2gnn_dist.data.reading.decoded_cache import DecodedCache
from cnn2gnn_dist.data.reading.shard_files import CacheSpec, ShardFiles

CHUNK = 32
"""Images decoded before they are augmented together: bounds memory and amortizes the random draws."""


@dataclass(frozen=True)
class Request:
    """A request: sample ids [n] int64 and the view number."""

    ids: np.ndarray
    view: int


@dataclass
class Batch:
    """A batch of samples.

    Attributes:
        images: uint8 [n, size, size, 3].
        labels, ids: int64 [n].
        valid: bool [n]; False where the sample is corrupt (its image is black).
        problems: one line per corrupt sample, in order: "shard: key: reason".
    """

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray
    valid: np.ndarray
    problems: list[str] = field(default_factory=list)

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


def on_device(array: np.ndarray, device: str | torch.device) -> torch.Tensor:
    """Copy an array to the device; to a GPU asynchronously, through pinned memory."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class ReaderSpec:
    """All that is needed to open a reader in any process.

    Attributes:
        manifest: path of the manifest.
        views: view specification.
        decoded_bytes: maximum bytes of the host's cache of decoded images (0: none). Views that are
            cropped from a clean view of fixed size use it; a random resized crop does not.
        cache: cache of complete remote shards; None: remote samples are read in ranges.
    """

    manifest: str
    views: ViewSpec
    decoded_bytes: int = 0
    cache: CacheSpec | None = None


class Reader:
    """Reads samples by id, in any order, from shards at recorded offsets.

    Not thread-safe.
    """

    def __init__(self, spec: ReaderSpec) -> None:
        self.views = spec.views
        self.manifest = Manifest.load(spec.manifest)
        self._files = ShardFiles(self.manifest, spec.cache)
        self._cache: DecodedCache | None = None
        if spec.decoded_bytes and spec.views.kind in decoded_cache.KINDS:
            path = decoded_cache.cache_path(spec.manifest, self.manifest, spec.views)
            self._cache = DecodedCache(
                path, len(self.manifest), spec.views.size, spec.decoded_bytes
            )

    def read(self, request: Request) -> Batch:
        """Read, decode and augment.

        Raises:
            UserError: a shard is missing, truncated, unreadable, or not of the indexed length.
            IndexError: ids outside the manifest.
        """
        ids = np.asarray(request.ids, dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < len(self.manifest):
            raise IndexError(f"sample ids {ids.min()}..{ids.max()} of {len(self.manifest)}")
        size = self.views.size
        images = np.zeros((len(ids), size, size, 3), np.uint8)
        valid = np.ones(len(ids), bool)
        if self._cache is None:
            problems = self._read_rows(ids, request.view, images, valid)
        else:
            problems = self._read_cached(self._cache, ids, images, valid)
            images = shifted(self.views, images, ids, request.view)
            images[~valid] = 0  # as without a cache, whatever a distortion has put there
        labels = self.manifest.label_N[ids].astype(np.int64)
        return Batch(images, labels, ids.copy(), valid, problems)

    def _read_cached(
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
        problems = self._read_rows(ids[absent], CLEAN, made, sound)
        clean[absent], valid[absent] = made, sound
        cache.keep(ids[absent[sound]], made[sound])
        return problems

    def _read_rows(
        self, ids: np.ndarray, view: int, images: np.ndarray, valid: np.ndarray
    ) -> list[str]:
        problems: list[str] = []
        for first in range(0, len(ids), CHUNK):
            rows = slice(first, first + CHUNK)
            problems += self._read_chunk(ids[rows], view, images[rows], valid[rows])
        return problems

    def _read_chunk(
        self, ids: np.ndarray, view: int, images: np.ndarray, valid: np.ndarray
    ) -> list[str]:
        """Fill ``images`` and ``valid``, views of the batch's arrays; return the problems."""
        blobs = self._files.read_all(ids.tolist())
        wrong = fill_views(self.views, blobs, ids, view, images)
        valid[list(wrong)] = False
        return [self._problem(int(ids[row]), wrong[row]) for row in sorted(wrong)]

    def _problem(self, sample: int, error: CorruptSample) -> str:
        shard = self.manifest.shards[int(self.manifest.shard_N[sample])]
        return f"{shard.path}: {self.manifest.key(sample)}: {error}"

    def close(self) -> None:
        """Close the shards."""
        self._files.close()
