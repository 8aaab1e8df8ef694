"""Rows of a plain shard, computed for all of its members at once: see :mod:`.plain_headers`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute

from cnn2gnn_dist.data.images.formats import IMAGE_SUFFIXES
from cnn2gnn_dist.data.index.class_names import ShardClassNames
from cnn2gnn_dist.data.index.plain_headers import PlainHeaders, class_name_in, plain_headers
from cnn2gnn_dist.data.tar.samples import TarSample
from cnn2gnn_dist.data.tar.tar_file import Archive
from cnn2gnn_dist.errors import UserError

_SUFFIX = 16  # bytes of the longest suffix
_FIELDS = 32  # maximum number of different suffixes: each has a bit of an int64, whose sums must not overflow
_NO_IMAGE = len(IMAGE_SUFFIXES)


@dataclass(frozen=True)
class PlainRows:
    """The n samples of a plain shard: byte ranges of their images, labels (-1: none) and keys."""

    offset_n: np.ndarray
    size_n: np.ndarray
    label_n: np.ndarray
    keys_n: pa.LargeStringArray


def plain_rows(
    archive: Archive, class_of: Callable[[bytes | None], int | None], names: ShardClassNames | None
) -> PlainRows | None:
    """Read a shard's rows.

    Args:
        archive: the shard.
        class_of: returns the class that a label says, and of None (no label) what such a sample gets; None: it is
            to be refused.
        names: collects the class names (None: not wanted); not to be used any more if the result is None.

    Returns:
        The rows; None if any header or name is unusual, or if anything is to be refused.
    """
    headers = plain_headers(archive)
    if headers is None:
        return None
    group = _grouped(headers)
    if group is None:
        return None
    image_n = group.images()
    if image_n is None or (headers.size_m[image_n] >= 1 << 31).any():
        return None
    label_n = _labels(headers, group.member_of("cls"), class_of)
    if label_n is None:
        return None
    if names is not None and not _named(headers, group, label_n, names):
        return None
    return PlainRows(headers.offset_m[image_n], headers.size_m[image_n], label_n, group.keys_n)


@dataclass(frozen=True)
class _Groups:
    """Members by sample: sample_m [m], the samples' first members [n] and keys, suffixes and each member's."""

    sample_m: np.ndarray
    first_n: np.ndarray
    keys_n: pa.LargeStringArray
    suffixes: list[str]
    suffix_m: np.ndarray

    def member_of(self, suffix: str) -> np.ndarray:
        """Return the member with this suffix of each sample, int64 [n]; -1: none."""
        member_n = np.full(self.first_n.size, -1)
        if suffix in self.suffixes:
            members = np.flatnonzero(self.suffix_m == self.suffixes.index(suffix))
            member_n[self.sample_m[members]] = members
        return member_n

    def images(self) -> np.ndarray | None:
        """Return each sample's image, the first in the order of IMAGE_SUFFIXES; None if one has none."""
        order = {suffix: rank for rank, suffix in enumerate(IMAGE_SUFFIXES)}
        rank_m = np.array([order.get(s, _NO_IMAGE) for s in self.suffixes])[self.suffix_m]
        total = rank_m.size
        best_n = np.minimum.reduceat(rank_m * total + np.arange(total), self.first_n)
        return best_n % total if (best_n < _NO_IMAGE * total).all() else None


def _grouped(headers: PlainHeaders) -> _Groups | None:
    """Group members into samples by webdataset's rule; None if a name or a sample is unusual."""
    names, length = headers.name_m, headers.length_m
    total, width = names.shape
    column = np.arange(width)
    base = width - np.argmax((names == ord("/"))[:, ::-1], axis=1)  # after the last slash
    base[~(names == ord("/")).any(axis=1)] = 0
    dots = (names == ord(".")) & (column >= base[:, None])
    dot = np.argmax(dots, axis=1)
    tail = length - dot - 1
    if (
        not dots.any(axis=1).all()
        or (dot <= base).any()
        or (tail < 1).any()
        or (tail > _SUFFIX).any()
        or (names[:, 0] == ord("_")).any()
    ):
        return None
    differ = names[1:] != names[:-1]
    at = np.where(differ.any(axis=1), np.argmax(differ, axis=1), width)
    starts = np.r_[True, (dot[1:] != dot[:-1]) | (at < dot[1:])]
    first_n = np.flatnonzero(starts)
    keys_n = _keys(names[first_n], dot[first_n])
    if pyarrow.compute.count_distinct(keys_n).as_py() != first_n.size:
        return None  # a key that reappears
    reach = np.pad(names, ((0, 0), (0, _SUFFIX + 1)))
    cut = np.take_along_axis(reach, dot[:, None] + 1 + np.arange(_SUFFIX), axis=1)
    coded = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(_SUFFIX), total, [None, pa.py_buffer(np.ascontiguousarray(cut))]
    ).dictionary_encode()
    written = [value.rstrip(b"\0").decode().lower() for value in coded.dictionary.to_pylist()]
    suffixes = sorted(set(written))
    if len(suffixes) > _FIELDS or any(suffix.startswith("__") for suffix in suffixes):
        return None  # webdataset gives some of these a meaning
    suffix_m = np.array([suffixes.index(s) for s in written])[coded.indices.to_numpy()]
    bit_m = np.int64(1) << suffix_m
    if (np.add.reduceat(bit_m, first_n) != np.bitwise_or.reduceat(bit_m, first_n)).any():
        return None  # two members for one field
    return _Groups(np.cumsum(starts) - 1, first_n, keys_n, suffixes, suffix_m)


def _keys(names: np.ndarray, dot: np.ndarray) -> pa.LargeStringArray:
    """The bytes before each dot as Arrow strings."""
    data = names[np.arange(names.shape[1]) < dot[:, None]]
    ends = np.r_[0, np.cumsum(dot)].astype(np.int64)
    return pa.LargeStringArray.from_buffers(dot.size, pa.py_buffer(ends), pa.py_buffer(data))


def _labels(
    headers: PlainHeaders, cls_n: np.ndarray, class_of: Callable[[bytes | None], int | None]
) -> np.ndarray | None:
    has_n = cls_n >= 0
    code = headers.text_m[cls_n[has_n]]
    absent = class_of(None)
    if (code < 0).any() or (absent is None and not has_n.all()):
        return None
    classes: dict[int, int] = {}
    for one in np.unique(code).tolist():
        label = class_of(headers.texts[one])
        if label is None:
            return None
        classes[one] = label
    label_n = np.full(cls_n.size, -1 if absent is None else absent)
    table = np.zeros(len(headers.texts), np.int64)
    table[list(classes)] = list(classes.values())
    label_n[has_n] = table[code]
    return label_n


def _named(
    headers: PlainHeaders, group: _Groups, label_n: np.ndarray, names: ShardClassNames
) -> bool:
    """Record the class names; False unless every ``.json`` gives its class the one known name, as known.

    Of samples that agree in label and name only the first is read, so a class has one name or none: what a later
    sample is compared with would depend on the order of several.
    """
    json_n = group.member_of("json")
    rows = np.flatnonzero((json_n >= 0) & (label_n >= 0))
    code = headers.text_m[json_n[rows]]
    if (code < 0).any():
        return False
    written = {b"": 0}
    name_of_code = np.zeros(len(headers.texts), np.int64)
    for one in np.unique(code).tolist():
        name = class_name_in(headers.texts[one])
        if name is None:
            return False
        name_of_code[one] = written.setdefault(name, len(written))
    name_r = name_of_code[code]
    texts = list(written)
    _, first = np.unique(label_n[rows] * len(texts) + name_r, return_index=True)
    first = first[name_r[first] > 0]
    if np.unique(label_n[rows[first]]).size != first.size:
        return False
    for at in np.sort(first).tolist():
        label, member = int(label_n[rows[at]]), headers.member(int(json_n[rows[at]]))
        try:
            names.see(label, TarSample("", {"json": member}))
        except UserError:
            return False
        if names.bytes.get(label) != texts[name_r[at]]:
            return False
    return True
