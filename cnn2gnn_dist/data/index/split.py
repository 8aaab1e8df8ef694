"""Held-out split: a fraction of every class, determined only by the keys and a seed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from cnn2gnn_dist.errors import UserError

if TYPE_CHECKING:
    from cnn2gnn_dist.data.index.manifest import Manifest

_CHUNK = 1 << 16  # keys converted to Python strings at a time


def split_per_class(
    manifest: Manifest, fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split the rows of every class into (training, held out), each ascending int64.

    A class of n samples holds out round(fraction·n) of them: at least one if it has two or more, and
    never all. The choice depends only on seed and keys, not on the order of the samples or their
    packing into shards. Samples without a label are split as one more class.

    Raises:
        UserError: the fraction is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(
            f"the held-out fraction is {fraction}",
            remedy="choose a fraction of at least 0 and less than 1",
        )
    hash_N = _hashes(manifest, seed)
    # Sort by class, then by hash; equal hashes (equal keys) keep row order.
    order_N = np.lexsort((hash_N, manifest.label_N))
    label_N = manifest.label_N[order_N]
    _, first_C, inverse_N, count_C = np.unique(
        label_N, return_index=True, return_inverse=True, return_counts=True
    )
    quota_C = np.rint(fraction * count_C).astype(np.int64)
    if fraction > 0:
        quota_C = np.clip(quota_C, np.minimum(count_C - 1, 1), np.maximum(count_C - 1, 0))
    held_N = np.arange(len(order_N)) - first_C[inverse_N] < quota_C[inverse_N]
    return np.sort(order_N[~held_N]), np.sort(order_N[held_N])


def split_labelled(manifest: Manifest, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``split_per_class`` that holds out no sample without a label, since it can't be evaluated.

    Raises:
        UserError: the fraction is not in [0, 1).
    """
    held_N = split_per_class(manifest, fraction, seed)[1]
    held_N = held_N[manifest.label_N[held_N] >= 0]
    return np.setdiff1d(np.arange(len(manifest)), held_N), held_N


def _hashes(manifest: Manifest, seed: int) -> np.ndarray:
    salt = int(seed).to_bytes(8, "little", signed=True)
    hash_N = np.empty(len(manifest), "<u8")
    for start in range(0, len(manifest), _CHUNK):
        keys = manifest.keys.slice(start, _CHUNK).to_pylist()
        digests = (hashlib.blake2b(key.encode(), digest_size=8, key=salt).digest() for key in keys)
        hash_N[start : start + len(keys)] = np.frombuffer(b"".join(digests), "<u8")
    return hash_N
