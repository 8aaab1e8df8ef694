"""Manifest rows of one shard: image, label and class name of each sample.

The only payloads read are labels (at most 64 bytes), class names (see :mod:`.class_names`) and, for
checksums, images. Other members, pickles included, are never opened.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from cnn2gnn_dist.data.images.formats import IMAGE_SUFFIXES
from cnn2gnn_dist.data.index.class_names import SMALL, NamedClass, ShardClassNames
from cnn2gnn_dist.data.index.plain_rows import plain_rows
from cnn2gnn_dist.data.tar.full_header import Member
from cnn2gnn_dist.data.tar.samples import MACOS, TarSample, grouped, hidden
from cnn2gnn_dist.data.tar.tar_file import Archive, SkippedMembers, shown
from cnn2gnn_dist.errors import UserError

COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "row_in_shard": np.int32,
}
_MAX_IMAGE, _MAX_LABEL, _CHUNK, _MEMO = 1 << 31, 64, 1 << 20, 1 << 14
_CLASS_NUMBER = re.compile(rb"\s*([0-9]{1,9})\s*")


@dataclass(frozen=True)
class ShardRows:
    """The n rows of one shard.

    ``offset_n``, ``size_n``, ``label_n`` and ``keys_n`` are as in the manifest, ``crc_n`` holds the
    CRC-32 of the images (None: not requested), ``names`` the class names that were not known before,
    ``skipped`` the members that belong to no sample.
    """

    bytes: int
    offset_n: np.ndarray
    size_n: np.ndarray
    label_n: np.ndarray
    keys_n: pa.LargeStringArray
    crc_n: np.ndarray | None
    names: dict[int, NamedClass]
    skipped: SkippedMembers = field(default_factory=SkippedMembers)

    def __len__(self) -> int:
        return len(self.label_n)


@dataclass(frozen=True)
class ReadOptions:
    """What to read from every shard: ``num_classes`` bounds the labels, ``names`` enables class names."""

    num_classes: int | None
    require_labels: bool
    checksums: bool
    names: bool = True


def read_shard(
    path: str,
    options: ReadOptions,
    known: Mapping[int, NamedClass] = MappingProxyType({}),
    where: str | None = None,
) -> ShardRows:
    """Walk a shard.

    Args:
        path: the shard, as a local file.
        options: what to read from it.
        known: class → name, as known so far.
        where: its name in errors (for example a URL); default: the path.

    Raises:
        UserError: as :func:`cnn2gnn_dist.data.tar.samples.samples`; the shard has no samples; a sample
            has no image, no label, an invalid label, or a name that is not UTF-8; a class has two
            names.
    """
    with Archive(path, where) as archive:
        return _read_plain(archive, options, known) or _read(
            archive, _Payloads(archive), options, ShardClassNames(archive, known)
        )


def _read_plain(
    archive: Archive, options: ReadOptions, known: Mapping[int, NamedClass]
) -> ShardRows | None:
    """Read a shard without anything unusual, many members at a time; None: see :func:`_read`."""

    def class_of(text: bytes | None) -> int | None:
        if text is None:
            return None if options.require_labels else -1
        match = _CLASS_NUMBER.fullmatch(text)
        label = int(match.group(1)) if match else -1
        bound = options.num_classes
        return label if match and (bound is None or label < bound) else None

    names = ShardClassNames(archive, known)
    rows = plain_rows(archive, class_of, names if options.names else None)
    if rows is None:
        return None
    crc_n = None
    if options.checksums:
        places = zip(rows.offset_n.tolist(), rows.size_n.tolist(), strict=True)
        payloads = _Payloads(archive)
        crc_n = np.asarray([payloads.crc(Member("", *place)) for place in places], np.uint32)
    return ShardRows(
        archive.bytes,
        rows.offset_n.astype(COLUMNS["offset"]),
        rows.size_n.astype(COLUMNS["size"]),
        rows.label_n.astype(COLUMNS["label"]),
        rows.keys_n,
        crc_n,
        names.found,
    )


def _read(
    archive: Archive, payloads: _Payloads, options: ReadOptions, names: ShardClassNames
) -> ShardRows:
    where = archive.where
    keys: list[str] = []
    images: list[Member] = []
    labels: list[int] = []
    named, holds = options.names, archive.holds
    for sample in grouped(archive):
        key, fields = sample
        keys.append(key)
        jpg = fields.get("jpg")
        images.append(jpg if jpg and jpg[2] < _MAX_IMAGE else _image(where, sample))
        label = payloads.label(sample, options)
        labels.append(label)
        json = fields.get("json")
        if json and named and label >= 0:
            known = names.bytes.get(label)
            # Fast comparison first: it settles nearly every sample.
            if not known or not (json[2] <= SMALL and holds(json[1], json[2], known)):
                names.see(label, sample)
    if not keys:
        raise UserError(
            "the shard contains no samples",
            where=where,
            remedy="name members KEY.jpg and KEY.cls (webdataset's convention)",
        )
    crcs = [payloads.crc(image) for image in images] if options.checksums else None
    return ShardRows(
        archive.bytes,
        np.asarray([image[1] for image in images], COLUMNS["offset"]),
        np.asarray([image[2] for image in images], COLUMNS["size"]),
        np.asarray(labels, COLUMNS["label"]),
        _encoded(where, keys),
        None if crcs is None else np.asarray(crcs, np.uint32),
        names.found,
        archive.skipped,
    )


class _Payloads:
    """The few payloads that the index reads, each bounded in size."""

    def __init__(self, archive: Archive) -> None:
        self.read = archive.read
        self.where = archive.where
        self._labels: dict[bytes, int] = {}

    def label(self, sample: TarSample, options: ReadOptions) -> int:
        """Return the class of a sample; -1 is none.

        Raises:
            UserError: a required label is missing, or it is not a class number.
        """
        member = sample.fields.get("cls")
        if member is None:
            if options.require_labels:
                raise UserError(
                    f"sample '{shown(sample.key)}' has no label",
                    where=self.where,
                    remedy=f"add a member '{shown(sample.key)}.cls' with its class number",
                )
            return -1
        text = self.read(member[1], min(member[2], _MAX_LABEL + 1))
        if text in self._labels:
            return self._labels[text]
        label = self._checked(text, sample, member, options)
        if len(self._labels) < _MEMO:
            self._labels[text] = label
        return label

    def _checked(self, text: bytes, sample: TarSample, member: Member, options: ReadOptions) -> int:
        match = _CLASS_NUMBER.fullmatch(text)
        if (
            match is None
            and text.strip().isdigit()
            and text.isascii()
            and member.size <= _MAX_LABEL
        ):
            raise UserError(
                f"the label of sample '{shown(sample.key)}' is {text.strip().decode()}: too "
                "large for a class number; it looks like an id",
                where=f"{self.where}, member '{shown(member.name)}'",
                remedy="number the classes from 0 without gaps",
            )
        if match is None or member.size > _MAX_LABEL:
            raise UserError(
                f"the label of sample '{shown(sample.key)}' is not a class number: {text[:24]!r}",
                where=f"{self.where}, member '{shown(member.name)}'",
                remedy="a .cls member must hold the class number in ASCII digits, starting at 0",
            )
        label = int(match.group(1))
        if options.num_classes is not None and label >= options.num_classes:
            raise UserError(
                f"the label of sample '{shown(sample.key)}' is {label}; "
                f"there are {options.num_classes} classes, numbered from 0",
                where=f"{self.where}, member '{shown(member.name)}'",
                remedy="correct the label or the list of classes",
            )
        return label

    def crc(self, member: Member) -> int:
        """Compute the CRC-32 of a member's bytes, in chunks.

        Raises:
            UserError: the shard ends before the member does.
        """
        crc, start, end = 0, member.offset, member.offset + member.size
        while start < end:
            piece = self.read(start, min(_CHUNK, end - start))
            if not piece:
                raise UserError(
                    f"the shard shrank while it was being read: member '{shown(member.name)}'",
                    where=self.where,
                    remedy="index it again once nothing is writing to it",
                )
            crc, start = zlib.crc32(piece, crc), start + len(piece)
        return crc


def _image(where: str, sample: TarSample) -> Member:
    """Return the image of a sample; of several formats, the first in IMAGE_SUFFIXES."""
    for suffix in IMAGE_SUFFIXES:
        if member := sample.fields.get(suffix):
            if member.size >= _MAX_IMAGE:
                break
            return member
    if hidden(sample.key):
        name = next(iter(sample.fields.values())).name
        raise UserError(
            f"the shard contains hidden files of a folder, such as '{shown(name)}'; webdataset "
            f"reads them as fields of a sample '{shown(sample.key)}' that has no image",
            where=f"{where}, member '{shown(name)}'",
            remedy=MACOS,
        )
    fields = ", ".join(f".{shown(suffix, 40)}" for suffix in list(sample.fields)[:8])
    raise UserError(
        f"sample '{shown(sample.key)}' has no image (its fields: {fields}"
        f"{', …' if len(sample.fields) > 8 else ''})",
        where=where,
        remedy=f"add one named '{shown(sample.key)}.jpg' or .{', .'.join(IMAGE_SUFFIXES[1:4])}, "
        "smaller than 2 GiB; a key ends at the first dot of the file name",
    )


def _encoded(where: str, keys: list[str]) -> pa.LargeStringArray:
    try:
        return pa.array(keys, pa.large_string())
    except UnicodeEncodeError as failure:
        wrong = next(key for key in keys if not key.isascii() and ascii(key).find("\\udc") >= 0)
        raise UserError(
            f"the name of sample '{shown(wrong)}' is not UTF-8",
            where=where,
            remedy="rename its members and write the shard again",
        ) from failure
