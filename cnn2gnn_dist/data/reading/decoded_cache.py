"""The decoded cache: clean views of fixed size in one memory-mapped file, shared on a host.

Decoding dominates the cost of a small image, and pad-crop-flip starts from the same clean view every
epoch. So the first reader that decodes a sample stores it here, and readers in all processes reuse it.
Writes are idempotent (a clean view is a pure function of the sample), so no locks are needed. The file
name depends on the manifest's file, the decoder, the size and the boot of the host; deleting the file costs only time.
The layout does not depend on the limit, so that processes with different limits may share the file: one byte
for each of the N samples, which is 1 if its view is present, then the views of the first ones.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from cnn2gnn_dist.data.images.decode import DECODING
from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.errors import UserError

_LAYOUT = 2
KINDS = ("none", "shift", "crop_flip")
"""View kinds that are cropped from the clean view; a random resized crop needs the full image."""


class DecodedCache:
    """Clean views [rows, size, size, 3] uint8 of the first samples that fit into ``limit`` bytes.

    Args:
        path: the file; created if missing.
        samples: N of the manifest.
        size: side of the clean view, in pixels.
        limit: maximum size of the file in bytes.

    Raises:
        UserError: the folder is not writable, or the disk is full.
    """

    def __init__(self, path: Path, samples: int, size: int, limit: int) -> None:
        row = 3 * size * size
        self.rows = min(samples, max(0, limit - samples) // row)
        length = samples + self.rows * row if self.rows else 0
        try:
            # Never truncate: another process may already have it open and be filling it.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(handle).st_size < length:
                    os.posix_fallocate(handle, 0, length)  # a full disk fails here, not by SIGBUS
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(
                f"the cache of decoded images can't be created: {error.strerror}",
                where=str(path),
                remedy="set stream.decoded_bytes=0 to turn it off, or a smaller number to make "
                "it smaller",
            ) from None
        whole = np.memmap(path, np.uint8, "r+", shape=(length,)) if length else np.empty(0, "u1")
        self.there_N = whole[: self.rows]
        self.images_NHWC = whole[samples:].reshape(self.rows, size, size, 3)

    def has(self, ids_n: np.ndarray) -> np.ndarray:
        """Return [n] bool: which samples are cached."""
        inside_n = ids_n < self.rows
        found_n = np.zeros(len(ids_n), bool)
        found_n[inside_n] = self.there_N[ids_n[inside_n]] == 1
        return found_n

    def take(self, ids_n: np.ndarray) -> np.ndarray:
        """Return the clean views [n, size, size, 3] of cached samples."""
        return self.images_NHWC[ids_n]

    def keep(self, ids_n: np.ndarray, clean_nHWC: np.ndarray) -> None:
        """Store clean views; samples beyond the limit are ignored."""
        inside_n = ids_n < self.rows
        self.images_NHWC[ids_n[inside_n]] = clean_nHWC[inside_n]
        self.there_N[ids_n[inside_n]] = 1  # only after the pixels


def cache_path(manifest_path: str | os.PathLike[str], manifest: Manifest, spec: ViewSpec) -> Path:
    """Return the path of the cache of a manifest's clean views: next to it, named after its file and contents.

    The name includes the manifest's own name and time: images that are not compressed have one length, so
    another data set, or the same shards written again, may have the same digest. And the host's boot id: after
    a crash, pages may be missing although their flags were written.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: one permanent cache, whose pages the system flushes in order
        boot = ""
    path = Path(manifest_path).absolute()
    made = f"{path.name} {path.stat().st_mtime_ns} {manifest.digest}"
    what = f"{made} {DECODING} {spec.size} {spec.resize} {boot} {_LAYOUT}"
    name = hashlib.sha256(os.fsencode(what)).hexdigest()[:16]
    return path.with_name(f"decoded-{name}.u8")
