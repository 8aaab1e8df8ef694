"""The decoded cache: clean views of fixed size in one memory-mapped file, shared by a node.

Decoding is most of what a small image costs, and pad-crop-flip starts from the same clean view
every epoch. So the first reader that decodes a sample leaves it here; the others, in whatever
process, gather it. Writing is idempotent (a clean view is a pure function of the sample), so
nobody locks. The file is a cache: it is named after the data, the size and the boot of the
machine, and whoever deletes it loses only time.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.errors import UserError

KINDS = ("none", "shift", "crop_flip")
"""Views that are cut from the clean view; a random resized crop needs the whole image."""


class DecodedCache:
    """Clean views [rows, size, size, 3] uint8 of the first samples that fit into ``limit`` bytes.

    Args:
        path: the file; made (sparse) when it is not there.
        samples: N of the manifest.
        size: side of the clean view, in pixels.
        limit: most bytes the file may take.

    Raises:
        UserError: the folder can't be written, or has no room.
    """

    def __init__(self, path: Path, samples: int, size: int, limit: int) -> None:
        row = 3 * size * size
        self.rows = min(samples, limit // (row + 1))
        length = self.rows * (row + 1)
        try:
            # Never truncated: another process may have it open, and fill it, already.
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if os.fstat(handle).st_size < length:
                    os.posix_fallocate(handle, 0, length)  # a full disk is said here, not by SIGBUS
            finally:
                os.close(handle)
        except OSError as error:
            raise UserError(
                f"the cache of decoded images can't be made: {error.strerror}",
                where=str(path),
                remedy="stream.decoded_bytes=0 turns it off; a smaller number makes it smaller",
            ) from None
        whole = np.memmap(path, np.uint8, "r+", shape=(length,)) if length else np.empty(0, "u1")
        self.there_N = whole[: self.rows]
        self.images_NHWC = whole[self.rows :].reshape(self.rows, size, size, 3)

    def has(self, ids_n: np.ndarray) -> np.ndarray:
        """[n] bool: which samples are there."""
        inside_n = ids_n < self.rows
        found_n = np.zeros(len(ids_n), bool)
        found_n[inside_n] = self.there_N[ids_n[inside_n]] == 1
        return found_n

    def take(self, ids_n: np.ndarray) -> np.ndarray:
        """[n, size, size, 3] clean views of samples that are there."""
        return self.images_NHWC[ids_n]

    def keep(self, ids_n: np.ndarray, clean_nHWC: np.ndarray) -> None:
        """Leave clean views for whoever comes next; those beyond the limit are not kept."""
        inside_n = ids_n < self.rows
        self.images_NHWC[ids_n[inside_n]] = clean_nHWC[inside_n]
        self.there_N[ids_n[inside_n]] = 1  # after the pixels, never before


def cache_path(manifest_path: str | os.PathLike[str], manifest: Manifest, spec: ViewSpec) -> Path:
    """Where the cache of a manifest's clean views lies: beside it, named by what it holds.

    The boot of the machine is part of the name: after a crash pages may be missing whose
    flags were written.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: one cache for ever, whose pages the system flushes in order
        boot = ""
    what = f"{manifest.digest} {spec.size} {spec.resize} {boot}"
    name = hashlib.sha256(what.encode()).hexdigest()[:16]
    return Path(manifest_path).absolute().with_name(f"decoded-{name}.u8")
