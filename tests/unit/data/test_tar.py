"""Our walk over tar headers compared with the real webdataset 1.0.2 and with tarfile."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cnn2gnn_dist.data.index.manifest_pair import index_pair
from cnn2gnn_dist.data.tar import samples
from cnn2gnn_dist.errors import UserError
from tests.support import archives
from tests.support.archives import by_webdataset
from tests.support.examples import examples
from tests.support.shards import data_dir, encode_image, random_images, write_tar

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
SIZES = ("octal", "base256", "pax")


def ours(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    data = path.read_bytes()
    return [
        (s.key, {suffix: data[m.offset : m.offset + m.size] for suffix, m in s.fields.items()})
        for s in samples.samples(path)
    ]


def outcome(read: Callable[[Path], archives.Samples], path: Path) -> archives.Samples | Exception:
    try:
        return read(path)
    except (UserError, ValueError) as refusal:
        return refusal


def assert_same(path: Path) -> None:
    """Our samples equal webdataset's, except that duplicate and scattered keys are refused."""
    expected, found = outcome(by_webdataset, path), outcome(ours, path)
    split = [samples.split_name(member.name) for member in samples.walk(path)]
    keys = [s[0] for s in split if s]
    runs = [key for key, before in zip(keys, [None, *keys], strict=False) if key != before]
    if isinstance(expected, Exception):
        assert "duplicate file name" in str(expected)
        assert re.search("duplicate field|not contiguous", str(found))
    elif len(set(runs)) < len(runs):  # webdataset makes two samples of it
        assert "not contiguous" in str(found)
    else:
        assert found == expected


def header_with_size(info: tarfile.TarInfo, kind: int, size: str) -> bytes:
    """A member's header blocks, with the size encoded in another way than tarfile does."""
    if size == "pax":
        info.pax_headers = {"size": str(info.size)}
        kind = tarfile.PAX_FORMAT
    block = bytearray(info.tobuf(kind))  # type: ignore[arg-type]
    if size == "base256":
        block[-512 + 124 : -512 + 136] = b"\x80" + info.size.to_bytes(11, "big")
    if size == "pax":
        block[-512 + 124 : -512 + 136] = b"00000000000\0"  # only the pax record has the size
    block[-512 + 148 : -512 + 156] = b" " * 8
    block[-512 + 148 : -512 + 156] = b"%06o\0 " % sum(block[-512:])
    return bytes(block)


def build(members: list[tuple[str, bytes, str, int, str]]) -> bytes:
    out = io.BytesIO()
    for name, data, kind, form, size in members:
        info = tarfile.TarInfo(name)
        if kind != "file":
            info.type = {"dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}[kind]
            info.linkname = "target/" * 30 if form != tarfile.USTAR_FORMAT else "target"
            data = b""
        info.size = len(data)
        try:
            out.write(header_with_size(info, form, size if kind == "file" else "octal"))
        except ValueError:  # too long for ustar: use GNU
            out.write(header_with_size(info, tarfile.GNU_FORMAT, "octal"))
        out.write(data + bytes(-len(data) % 512))
    return out.getvalue() + bytes(1024)


part = st.sampled_from(
    ["a", "b", "ab", "A", "n01_é", ".hidden", "..", "__m__", "__x", "v2", "long" * 30, "x" * 260]
)
suffix = st.sampled_from(
    ["jpg", "JPG", "cls", "json", "seg.png", "Seg.PNG", "tar.gz", "", "v2_3.jpg"]
)
folder = st.sampled_from(["", "", "", "./", "dir/", "dir.x/", "__m__/", "deep/" * 40, ".git/"])
names = st.one_of(
    st.builds("{}{}.{}".format, folder, part, suffix),
    st.builds("{}{}".format, folder, part),  # no suffix
    st.text("aB./_", min_size=1, max_size=12).filter(lambda n: n.strip("/") == n),
)
member = st.tuples(
    names,
    st.binary(max_size=1100),
    st.sampled_from(["file"] * 5 + ["dir", "link"]),
    st.sampled_from(FORMATS),
    st.sampled_from(SIZES),
)


@settings(max_examples=examples(400), deadline=None, derandomize=True)
@given(st.lists(member, max_size=7))
@example([("a/.x.jpg", b"1", "file", tarfile.GNU_FORMAT, "octal")])
@example([("__m__.json", b"1", "file", tarfile.GNU_FORMAT, "octal")])
@example([("x" * 300 + ".jpg", b"1" * 600, "file", tarfile.PAX_FORMAT, "pax")])
@example([("x" * 300 + ".jpg", b"1" * 600, "file", tarfile.GNU_FORMAT, "base256")])
@example([("d/" * 70 + "a.b.c", b"1", "file", tarfile.USTAR_FORMAT, "octal")])
def test_samples_are_those_of_webdataset(members: list[tuple[str, bytes, str, int, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        path.write_bytes(build(members))
        assert_same(path)


@settings(max_examples=examples(1500), deadline=None, derandomize=True)
@given(archives.archives)
@example(archives.file(b"BZhou.jpg") + archives.END)
@example(archives.file(b"old/", b"", b"\0") + archives.file(b"a.b", b"1") + archives.END)
@example(archives.file(b"a.b", b"1", prefix=b"14231234567", magic=b"ustar  \0") + archives.END)
@example(archives.pax({b"path": b""}) + archives.file(b"a.b", b"1") + archives.END)
@example(archives.pax({b"path": b"g.h"}, b"g") + archives.gnu(b"l.m") * 2 + archives.file(b"a.b"))
@example(archives.file(b"a.__bad__", b"1") + archives.file(b"b.__bad__") + archives.END)
@example(archives.file(b"a.__local_path__", b"1") + archives.END)
def test_samples_of_odd_archives_are_those_of_webdataset(data: bytes) -> None:
    """Valid archives built block by block: equal, except for duplicate and scattered keys."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        path.write_bytes(data if data.endswith(archives.END) else data + archives.END)
        assert_same(path)


@settings(max_examples=examples(150), deadline=None, derandomize=True)
@given(st.lists(member, min_size=1, max_size=5))
def test_members_are_those_of_tarfile(members: list[tuple[str, bytes, str, int, str]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shard.tar"
        path.write_bytes(build(members))
        with tarfile.open(path) as archive:
            expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
        assert [(m.name, m.offset, m.size) for m in samples.walk(path)] == expected


def test_global_pax_header_and_signed_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "git"}) as t:
        t.addfile(tarfile.TarInfo("é.jpg"))
    assert [s.key for s in samples.samples(path)] == ["é"]
    data = bytearray(path.read_bytes())
    start = len(data.rstrip(b"\0")) // 512 * 512  # the last header
    data[start : start + 4] = b"\xe9.b\0"  # Latin-1 in the bare name, overruled by the pax path
    high = sum(byte > 127 for byte in data[start : start + 512])
    data[start + 148 : start + 156] = b" " * 8
    total = sum(data[start : start + 512]) - 256 * high
    data[start + 148 : start + 156] = b"%06o\0 " % total
    path.write_bytes(data)
    assert [s.key for s in samples.samples(path)] == ["é"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"1"), ("a.JPG", b"2")], "sample 'a' has a duplicate field '.jpg'"),
        ([("a.jpg", b"1"), ("a.jpg", b"2")], "duplicate field"),
        ([("a.__key__", b"1")], "duplicate field '.__key__'.*webdataset reserves"),
        (
            [("a.jpg", b""), ("b.jpg", b""), ("a.cls", b"0")],
            "members of sample 'a' are not contiguous",
        ),
    ],
)
def test_ambiguous_names_are_refused(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=message) as caught:
        list(samples.samples(path))
    assert str(path) in caught.value.where
    assert caught.value.remedy


def test_hidden_files_of_macos_are_explained(tmp_path: Path) -> None:
    """Skipped at the top level; in folders they become fields, as in webdataset, or scatter a sample."""
    top = write_tar(tmp_path / "a.tar", [("._b.jpg", b""), ("./._b.jpg", b""), ("b.jpg", b"1")])
    assert ours(top) == by_webdataset(top) == [("b", {"jpg": b"1"})]
    inside = write_tar(tmp_path / "b.tar", [("t/._a.jpg", b"x"), ("t/a.jpg", b"1")])
    assert (
        ours(inside) == by_webdataset(inside) == [("t/", {"_a.jpg": b"x"}), ("t/a", {"jpg": b"1"})]
    )
    again = [("t/._a.jpg", b"x"), ("t/a.jpg", b"1"), ("t/._b.jpg", b"x"), ("t/b.jpg", b"1")]
    with pytest.raises(UserError, match="hidden files") as caught:
        ours(write_tar(tmp_path / "c.tar", again))
    assert "t/._b.jpg" in caught.value.where
    assert "COPYFILE_DISABLE=1" in caught.value.remedy


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    members = [("a.cls", b"0"), ("l" * 150 + ".jpg", b"x" * 700), ("b.cls", b"1")]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # the last payload block
    path = tmp_path / "cut.tar"
    for length in range(0, end + 1, 64):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"truncated|empty|end-of-archive") as caught:
            list(samples.walk(path))
        assert caught.value.where == str(path)
        assert "again" in caught.value.remedy
    path.write_bytes(whole[:end] + bytes(1024))
    assert len(list(samples.walk(path))) == 3


def test_foreign_and_damaged_files(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", [("a.cls", b"0"), ("a.jpg", b"x")]).read_bytes()
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(UserError, match=r"compressed \(gzip\)"):
        list(samples.walk(path))
    path.write_bytes(whole[:1024] + b"?" + whole[1025:])  # one byte of the second header
    with pytest.raises(UserError, match="wrong checksum at byte 1,024"):
        list(samples.walk(path))
    with pytest.raises(UserError, match="cannot be opened: No such file"):
        list(samples.walk(tmp_path / "none.tar"))
    info = tarfile.TarInfo("s.jpg")
    info.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match="sparse"):
        list(samples.walk(path))
    info = tarfile.TarInfo("a.jpg")
    info.size = 9 << 30  # tarfile encodes it in base 256; the file is far shorter
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(UserError, match=r"member 'a.jpg' extends to byte 9,663,676,928"):
        list(samples.walk(path))


@settings(max_examples=examples(150), deadline=None, derandomize=True)
@given(st.data())
def test_damage_never_escapes_as_another_error(data: st.DataObject) -> None:
    whole = bytearray(build([("l" * 120 + ".jpg", b"x" * 30, "file", tarfile.PAX_FORMAT, "pax")]))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(whole) - 1025))
        whole[at] = data.draw(st.integers(0, 255))
    for start in (0, 1024):  # checksums corrected, so that the corruption passes them
        block = whole[start : start + 512]
        block[148:156] = b" " * 8
        whole[start + 148 : start + 156] = b"%06o\0 " % sum(block)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.tar"
        path.write_bytes(whole)
        with contextlib.suppress(UserError):
            list(samples.samples(path))


def test_real_shards_equal_webdataset() -> None:
    paths = sorted(data_dir("imagenet-sample").glob("*.tar"))
    assert sum(len(list(samples.samples(path))) for path in paths) == 200
    assert ours(paths[0]) == by_webdataset(paths[0])


def parquet_bytes() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "what", "remedy"),
    [
        (b"<html>not found</html>".ljust(2048), "is an HTML page, not a tar", "login page"),
        (b"\n<!DOCTYPE html><html>Please log in</html>", "is an HTML page, not a tar", "login"),
        (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "an XML response", "store"),
        (
            b'{"error": "Repository not found"}',
            "is JSON, not a tar",
            "error message from the server",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS", "git lfs pull"),
        (parquet_bytes(), "is a Parquet file, not a tar", "data.source=parquet"),
        (encode_image(random_images(1)[0]), "is a PNG image, not", "data.source=imagefolder"),
        (encode_image(random_images(1)[0], "jpg"), "is a JPEG image", "data.source=imagefolder"),
        (b"PK\x03\x04" + bytes(600), "is a zip archive, not", "data.source=imagefolder"),
        (b"train-0.tar\ntrain-1.tar\n", "not a valid tar archive but text: 'train-0", "a list"),
        (b"x" * 512, "not a valid tar archive but text", "name the .tar files"),
    ],
)
def test_what_is_no_tar_is_called_what_it_is(
    tmp_path: Path, data: bytes, what: str, remedy: str
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        list(samples.walk(path))
    assert caught.value.where == str(path)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("name", ["BZhou.jpg", "PAR1.jpg", "{x}.jpg", "<html>.jpg", "RIFF.jpg"])
def test_a_first_member_may_be_called_like_another_kind_of_file(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "x.tar", [(name, b"x")])
    assert [member.name for member in samples.walk(path)] == [name]


def test_what_is_part_of_no_sample_is_counted_by_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    image = encode_image(random_images(1, 8, 8)[0])
    plain = ["__meta__/info.json", "README", ".DS_Store", "b.__bad__", "b.jpg", "b.cls"]
    with tarfile.open(path, "w") as archive:
        for name, data in [("a.cls", b"0"), ("a.png", image), *((n, b"x") for n in plain)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        kinds = [tarfile.LNKTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
        for number, kind in enumerate([*kinds, tarfile.DIRTYPE]):
            info = tarfile.TarInfo(f"c{number}.png")
            info.type, info.linkname = kind, "a.png"
            archive.addfile(info)
    pair = index_pair([path], [path])
    assert len(pair.train) == 1
    words = (
        "10 members of the shards of {} are left out: 3 of samples marked __bad__ (first: "
        "b.__bad__), 2 hard links (first: c0.png), 1 devices and pipes (first: c3.png), 1 hidden "
        "(first: .DS_Store), 1 named __…__, which webdataset does not read as samples (first: "
        "__meta__/info.json), 1 symbolic links (first: c2.png), 1 without a suffix (first: README)"
    )
    assert pair.notes == [words.format("data.train"), words.format("data.test")]
