"""Shards read many headers at a time: the same rows and the same errors as header by header."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cnn2gnn_dist.data.index import plain_headers, shard_rows
from cnn2gnn_dist.data.index.class_names import NamedClass, ShardClassNames
from cnn2gnn_dist.data.index.plain_rows import plain_rows
from cnn2gnn_dist.data.index.shard_rows import ReadOptions, ShardRows, read_shard
from cnn2gnn_dist.data.tar.tar_file import Archive
from cnn2gnn_dist.errors import UserError
from tests.support import archives
from tests.support.archives import END, file
from tests.support.examples import examples

KNOWN = {1: NamedClass("dog", b'"class_name": "dog"', "elsewhere")}
LONG = b'"note": "' + b"x" * 90 + b'"'
ABOUTS = [
    b'{"class_name": "cat"}',
    b'{"label": 0, "class_name": "cat", %b}' % LONG,
    b'{%b, "class_name":"cat"}' % LONG,
    b'{"class_name": "dog"}',
    b'{"class_name": null, %b}' % LONG,
    b'{"class_name": "caf\\u00e9", %b}' % LONG,
    b'{"class_name": 3}',
    b'{"other": {"class_name": "cat"}, "class_name": "dog", %b}' % LONG,
    b"{%b}" % LONG,
    b"not JSON",
    b"",
    b'{"class_name": "cat", "pad": "%b"}' % (b"y" * 5000),
]
LABELS = [b"0", b"1", b"2", b" 1\n", b"01", b"", b"x", b"12345678901", b"7" * 70]
NAMES = ["a", "b", "c", "d/a", "d.x/b", "e/.f/g", "n" * 70]
IMAGES = ["jpg", "jpg", "png", "JPG", "seg.png", "jpeg"]
OPTIONS = [
    ReadOptions(None, True, False),
    ReadOptions(2, True, False),
    ReadOptions(None, False, True),
    ReadOptions(None, False, False, names=False),
]


@st.composite
def shards(draw: st.DrawFn) -> bytes:
    """Mostly plain: a few samples of usual members, now and then one thing that is unusual."""
    members: list[tuple[str, bytes]] = []
    for key in draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True)):
        if draw(st.integers(0, 9)):
            members.append((f"{key}.cls", draw(st.sampled_from(LABELS[:3] * 4 + LABELS))))
        for suffix in draw(st.lists(st.sampled_from(IMAGES), min_size=1, max_size=2)):
            members.append((f"{key}.{suffix}", b"i" * draw(st.sampled_from([0, 5, 512, 700]))))
        if draw(st.booleans()):
            members.append((f"{key}.json", draw(st.sampled_from(ABOUTS[:2] * 4 + ABOUTS))))
    if not draw(st.integers(0, 3)):
        name = draw(
            st.sampled_from(["__m__.jpg", "plain", "a.jpg", ".x.jpg", "é.jpg", "a\n.jpg", "a."])
        )
        members.insert(draw(st.integers(0, len(members))), (name, b"0"))
    blocks = [file(name.encode(), data) for name, data in members]
    if not draw(st.integers(0, 3)):
        at = draw(st.integers(0, len(blocks) - 1))
        place, value = draw(st.integers(0, 511)), draw(st.integers(0, 255))
        blocks[at] = blocks[at][:place] + bytes([value]) + blocks[at][place + 1 :]
        if draw(st.booleans()):
            blocks[at] = archives.repair(blocks[at][:512]) + blocks[at][512:]
    return b"".join(blocks) + (END if draw(st.integers(0, 9)) else b"")


def one_by_one(path: Path, options: ReadOptions) -> ShardRows:
    with Archive(path) as archive:
        payloads = shard_rows._Payloads(archive)
        return shard_rows._read(archive, payloads, options, ShardClassNames(archive, KNOWN))


def outcome(read: Callable[[], ShardRows]) -> Any:
    try:
        rows = read()
    except UserError as error:
        return str(error)
    arrays = (rows.offset_n, rows.size_n, rows.label_n)
    crcs = None if rows.crc_n is None else rows.crc_n.tolist()
    listed = [(array.dtype, array.tolist()) for array in arrays]
    return (
        rows.bytes,
        listed,
        rows.keys_n.type,
        rows.keys_n.to_pylist(),
        crcs,
        rows.names,
        rows.skipped,
    )


def assert_same(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        path.write_bytes(data)
        for options in OPTIONS:
            wanted = outcome(lambda o=options: one_by_one(path, o))
            assert outcome(lambda o=options: read_shard(str(path), o, KNOWN)) == wanted


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(shards())
@example(file(b"a.cls", b"1") + file(b"a.jpg", b"") + file(b"a.json", ABOUTS[7]) + END)
@example(file(b"a.jpg", b"1") + file(b"b.jpg", b"1") + file(b"a.cls", b"1") + END)
@example(file(b"a.jpg", b"1", mtime=b"14231234567 ") + file(b"b.jpg", b"1") + END)
@example(file(b"a.jpg", b"1") + file(b"b.jpg", b"1", prefix=b"p") + END)
def test_the_rows_are_those_of_one_header_at_a_time(data: bytes) -> None:
    assert_same(data)


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(archives.archives)
def test_odd_archives_too(data: bytes) -> None:
    assert_same(data if data.endswith(END) else data + END)


def plain(path: Path, names: bool = True) -> bool:
    with Archive(path) as archive:
        found = ShardClassNames(archive, KNOWN) if names else None
        return plain_rows(archive, lambda text: int(text) if text else None, found) is not None


@pytest.mark.parametrize("together", [1, 2, 3, 4096])
def test_samples_across_what_is_checked_together(
    tmp_path: Path, monkeypatch, together: int
) -> None:
    monkeypatch.setattr(plain_headers, "_TOGETHER", together)
    blocks = [
        file(f"{'d/' * (n % 3)}k{n}.{suffix}".encode(), data)
        for n in range(50)
        for suffix, data in (
            ("cls", b"%d" % (n % 2)),
            ("jpg", b"i" * n * 97),
            ("json", ABOUTS[1 + 2 * (n % 2)]),
        )
    ]
    path = tmp_path / "s.tar"
    path.write_bytes(b"".join(blocks) + END)
    assert plain(path)
    options = ReadOptions(None, True, True)
    rows = read_shard(str(path), options, KNOWN)
    assert rows.keys_n.to_pylist() == [f"{'d/' * (n % 3)}k{n}" for n in range(50)]
    assert rows.size_n.tolist() == [n * 97 for n in range(50)]
    assert rows.label_n.tolist() == [n % 2 for n in range(50)]
    assert {label: named.name for label, named in rows.names.items()} == {0: "cat"}
    assert outcome(lambda: rows) == outcome(lambda: one_by_one(path, options))


def test_packed_shards_are_plain(tmp_path: Path) -> None:
    """Otherwise every shard would be read twice, without a word."""
    import numpy as np

    from tests.support.shards import make_shards, random_images

    for path in make_shards(tmp_path, random_images(20), np.zeros(20, int), shard_size=10):
        assert plain(path, names=False)


@pytest.mark.parametrize("suffix", ["JPG", "seg.png", "jpg"])
def test_every_damaged_byte_is_seen(tmp_path: Path, suffix: str) -> None:
    """In the header of the second sample's image, whatever the byte becomes."""
    good = [
        file(b"a.cls", b"0"),
        file(b"a.jpg", b"1"),
        file(b"b.cls", b"0"),
        file(f"b.{suffix}".encode(), b"2"),
    ]
    path = tmp_path / "s.tar"
    for place in range(512):
        header = bytearray(good[3])
        header[place] = (header[place] + 1) % 256
        path.write_bytes(b"".join(good[:3]) + bytes(header) + END)
        wanted = outcome(lambda: one_by_one(path, OPTIONS[0]))
        assert outcome(lambda: read_shard(str(path), OPTIONS[0], KNOWN)) == wanted


def test_more_copies_of_a_field_than_a_sum_of_bits_can_hold() -> None:
    """With 60 suffixes the last one's bit is 1 << 59: of 33 copies the sum is again 1 << 59, modulo 1 << 64."""
    others = [file(f"b.s{n:02}".encode(), b"1") for n in range(58)]
    copies = [file(b"a.zz", b"1")] * 33
    assert_same(b"".join([file(b"a.jpg", b"1"), *copies, file(b"b.jpg", b"1"), *others]) + END)


def test_a_later_sample_is_compared_with_the_name_known_by_then() -> None:
    """It looks like the first one, which has no name, but names its class differently from the second one."""
    abouts = [
        b'{"class_name": null}',
        b'{"class_name": "cat"}',
        b'{"other": {"class_name": null}, "class_name": "dog"}',
    ]
    blocks = [
        file(f"{n}.{suffix}".encode(), data)
        for n, about in enumerate(abouts)
        for suffix, data in (("cls", b"0"), ("jpg", b"1"), ("json", about))
    ]
    assert_same(b"".join(blocks) + END)
