"""Detection of data sets made of copies of a few images, in a sample, by length and checksum."""

from __future__ import annotations

import zlib

import numpy as np

from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.storage import urls

SAMPLE = 256
"""Number of images to check; they are read where no checksums are recorded."""


def copies_note(manifest: Manifest) -> str | None:
    """Return one sentence if at least half of the checked images are copies of others, else None."""
    rows = np.arange(len(manifest))
    if len(rows) > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(rows, SAMPLE, replace=False))
    sums = _sums(manifest, rows)
    if len(sums) < 8 or len(set(sums)) > len(sums) / 2:
        return None
    return (
        f"{len(sums) - len(set(sums))} of {len(sums)} checked images are byte-identical copies "
        "of others: held-out images may also be training images, so the results mean little"
    )


def _sums(manifest: Manifest, rows: np.ndarray) -> list[tuple[int, int]]:
    """Return length and CRC-32 of images; for remote images the CRC is in the manifest."""
    sums = []
    for row in rows.tolist():
        size, path = int(manifest.size_N[row]), manifest.shards[int(manifest.shard_N[row])].path
        if manifest.crc_N is not None:
            sums.append((size, int(manifest.crc_N[row])))
        elif not urls.is_remote(path):
            data = urls.read_range(path, int(manifest.offset_N[row]), size)
            sums.append((size, zlib.crc32(data)))
    return sums
