"""Detection of held-out images that are also training images, in a sample, by length and checksum."""

from __future__ import annotations

import zlib

import numpy as np

from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.storage import urls

SAMPLE = 256
"""Number of held-out images to check."""
MOST, MOST_BYTES = 1 << 15, 64 << 20
"""Limits on the training images read for it, in images and bytes: where many lengths coincide, fewer
held-out images are checked."""


def overlap_note(train: Manifest, held: Manifest) -> str | None:
    """Return one sentence if held-out images are byte-identical to training images, else None."""
    rows_K, alike_K, same = _looked_at(train, held)
    if not alike_K.any():
        return None
    twins = int(np.isin(_sums(held, rows_K[alike_K]), _sums(train, same)).sum())
    if not twins:
        return None
    return (
        f"{twins} of {len(rows_K)} checked held-out images are byte-identical to training "
        "images: the results are too optimistic"
    )


def _looked_at(train: Manifest, held: Manifest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return held-out rows, whether training images of equal length exist, and the rows of all those."""
    rows_K = np.random.default_rng(0).permutation(len(held))[:SAMPLE]
    sizes_K = held.size_N[rows_K]
    same = np.flatnonzero(np.isin(train.size_N, np.unique(sizes_K)))
    lengths, counts = np.unique(train.size_N[same], return_counts=True)
    count_K = np.isin(sizes_K, lengths).astype(np.int64)
    alike_K = count_K > 0
    count_K[alike_K] = counts[np.searchsorted(lengths, sizes_K[alike_K])]
    if train.crc_N is not None:
        return rows_K, alike_K, same
    _, first_K = np.unique(sizes_K, return_index=True)
    reads_K = np.zeros(len(rows_K), np.int64)  # each length is read once, however many rows have it
    reads_K[first_K] = count_K[first_K]
    within = (np.cumsum(reads_K) <= MOST) & (np.cumsum(reads_K * sizes_K) <= MOST_BYTES)
    same = same[np.isin(train.size_N[same], sizes_K[within])]
    return rows_K[within], alike_K[within], same


def _sums(manifest: Manifest, rows: np.ndarray) -> np.ndarray:
    """Return length and CRC-32 of images as one number; for remote images it is in the manifest."""
    if manifest.crc_N is not None:
        crcs = manifest.crc_N[rows]
    else:
        crcs = np.asarray([_crc(manifest, row) for row in rows.tolist()], np.uint32)
    return manifest.size_N[rows].astype(np.uint64) << np.uint64(32) | crcs.astype(np.uint64)


def _crc(manifest: Manifest, row: int) -> int:
    path, size = manifest.shards[int(manifest.shard_N[row])].path, int(manifest.size_N[row])
    return zlib.crc32(urls.read_range(path, int(manifest.offset_N[row]), size))
