"""Indexing of hostile and unusual shards."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.tar import samples
from cnn2gnn_dist.errors import UserError
from tests.support import archives
from tests.support.archives import (
    END,
    base256,
    file,
    gnu,
    header,
    octal,
    padded,
    pax,
    peak_of,
    shard,
)
from tests.support.shards import write_tar

SAMPLE = file(b"k.cls", b"0") + file(b"k.jpg", b"image")
MB = 1 << 20


def tree(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["/etc/k", "../../k", "a/../../k", "~/k", "C:\\k", "a\nb"])
def test_names_are_text_and_never_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Absolute and ``..`` names are keys as in webdataset: nothing is written anywhere."""
    inside = tmp_path / "x" / "y"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    path = shard(inside, file(f"{name}.cls".encode(), b"0"), file(f"{name}.jpg".encode(), b"im"))
    before = tree(tmp_path)
    manifest = index([path])
    assert [manifest.key(0)] == [key for key, _ in archives.by_webdataset(path)] == [name]
    manifest.save(inside / "m.arrow")
    assert Manifest.load(inside / "m.arrow").key(0) == name
    assert tree(tmp_path) - before == {str(inside / "m.arrow")}


def test_links_devices_and_folders_are_ignored(tmp_path: Path) -> None:
    """A link with the name of an image is not an image, and its target is never opened."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    links = [header(b"k.png", 6, bytes([kind])) for kind in b"123456"]
    link = bytearray(header(b"k.jpeg", 0, b"2"))
    link[157 : 157 + len(str(secret))] = str(secret).encode()
    manifest = index([shard(tmp_path, *links, archives.repair(bytes(link)), SAMPLE)])
    assert (len(manifest), manifest.size_N.tolist()) == (1, [len(b"image")])
    with pytest.raises(UserError, match="no image"):
        index([shard(tmp_path, file(b"k.cls", b"0"), archives.repair(bytes(link)))])


class Mark:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_never_unpickled(tmp_path: Path) -> None:
    """Pickle members are ignored; one in place of an image, label or JSON is treated as bytes."""
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Mark(mark))
    pickle.loads(bomb)
    assert mark.exists()  # unpickling it does run code
    mark.unlink()
    names = (b"k.pyd", b"k.pkl", b"k.pickle", b"k.json", b"k.png", b"k.pth", b"k.npz")
    path = shard(tmp_path, *[file(name, bomb) for name in names], SAMPLE)
    manifest = index([path], checksums=True)
    assert (manifest.classes, manifest.size_N.tolist()) == (("0",), [5])
    with pytest.raises(UserError, match="not a class number"):
        index([shard(tmp_path, file(b"k.cls", bomb), file(b"k.jpg", b""))])
    assert not mark.exists()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (header(b"k.jpg", base256(1 << 40, 12)), "truncated: member 'k.jpg'"),
        (header(b"k.jpg", base256(1 << 63, 12)), "truncated: member 'k.jpg'"),
        (header(b"k.jpg", base256((1 << 87) - 1, 12)), "truncated: member 'k.jpg'"),
        (header(b"k.jpg", b"7" * 12), "truncated: member 'k.jpg'"),
        (header(b"k.jpg", base256(-512, 12)), "impossible size"),
        (header(b"k.jpg", b"-1"), "impossible size"),
        (header(b"k.jpg", b"9"), "impossible number"),
        (header(b"k.jpg", mtime=b"yesterday\0\0\0"), "impossible number"),
        (header(b"k.xyz", base256(1 << 63, 12), b"Z"), "truncated"),
        (pax({b"size": b"9" * 18}) + file(b"k.jpg", b"i"), "truncated: member 'k.jpg'"),
        (pax({b"size": b"9" * 5000}) + file(b"k.jpg", b"i"), "impossible size"),
        (pax({b"size": b"-5"}) + file(b"k.jpg", b"i"), "impossible size"),
        (pax({b"size": b"5000"}, b"g") + file(b"k.jpg", b"i"), "global pax header"),
        (header(b"x", base256(1 << 40, 12), b"x"), "extension header of 1,099,511,627,776 bytes"),
        (header(b"g", base256(1 << 62, 12), b"g"), "extension header of"),
        (header(b"L", base256(1 << 62, 12), b"L"), "extension header of"),
        (header(b"L", 1 << 20, b"L"), "truncated: an extension header"),
        (header(b"k.jpg", 0, b"S"), "sparse file"),
        (pax({b"GNU.sparse.major": b"1"}) + file(b"k.jpg", b"i"), "sparse file"),
        (gnu(b"a.b"), "without a member"),
        (pax({b"path": b"k.jpg"})[:512] + padded(b"9 path=k.jpg"), "malformed pax"),
        (header(b"x", 5, b"x") + padded(b"5 =a\n") + SAMPLE, "malformed pax"),
    ],
)
def test_giant_and_impossible_headers_are_refused(
    tmp_path: Path, head: bytes, message: str
) -> None:
    path = shard(tmp_path, SAMPLE, head)

    def refused() -> None:
        with pytest.raises(UserError, match=message) as caught:
            index([path])
        assert str(path) in caught.value.where
        assert caught.value.remedy

    assert peak_of(refused) < 8 * MB


def test_many_extension_headers_take_no_memory(tmp_path: Path) -> None:
    """Headers of one member don't accumulate, whatever they contain; ``tarfile`` recurses on them and fails."""
    long = b"n" * 100_000
    many = [gnu(b"%07d" % n + long) for n in range(100)]
    many += [pax({b"key%07d" % n: long, b"path": long}) for n in range(100)]
    many += [pax({b"key%07d" % n: long}, b"g") for n in range(100)]
    path = shard(tmp_path, *many, gnu(b"k.cls") * 3000, file(b"x", b"0"), file(b"k.jpg", b"im"))
    with pytest.raises(UserError, match="no label"):  # the first header wins, as in tarfile
        index([path])
    path = shard(tmp_path, gnu(b"k.cls"), *many, file(b"x", b"0"), file(b"k.jpg", b"im"))
    assert len(index([path])) == 1
    assert peak_of(lambda: list(samples.walk(path))) < 4 * MB


def test_giant_labels_and_jsons_are_not_read(tmp_path: Path) -> None:
    """Sparse members of 2 GiB in place of a JSON file, a label, an unknown member and an image."""
    path = tmp_path / "giant.tar"

    def write(*members: tuple[bytes, int]) -> Path:
        with open(path, "wb") as out:
            out.write(file(b"k.txt") + file(b"k.label"))
            for name, size in members:
                out.write(header(name, size))
                out.seek(-(-size // 512) * 512, os.SEEK_CUR)
            out.write(file(b"l.cls", b"0") + file(b"l.jpg") + END)
        return path

    size = 1 << 31
    whole = write((b"k.jpg", size - 1), (b"l.json", size), (b"l.pyd", size))
    assert index([whole], require_labels=False).size_N.tolist() == [size - 1, 0]
    assert peak_of(lambda: index([whole], require_labels=False)) < 8 * MB
    with pytest.raises(UserError, match="not a class number"):
        index([write((b"k.cls", size), (b"k.jpg", 1))])
    with pytest.raises(UserError, match="smaller than 2 GiB"):
        index([write((b"k.jpg", size))], require_labels=False)


def test_labels_of_any_length_are_read_whole(tmp_path: Path) -> None:
    """Not truncated to their first bytes, which would turn 1…9 into 1."""
    assert index([shard(tmp_path, file(b"k.cls", b"0".rjust(64)), SAMPLE[1024:])]).label_N[0] == 0
    with pytest.raises(UserError, match="not a class number"):
        index([shard(tmp_path, file(b"k.cls", b"1".ljust(70) + b"9"), SAMPLE[1024:])])


@pytest.mark.parametrize(
    "about",
    [
        b"[" * 100_000,
        b'{"class_name": "\\ud800"}',
        b'{"class_name": "' + b"x" * 2000 + b'"}',
        b'{"class_name": 7}',
        b"\xff\xfe{",
        b"1" * 10_000,
        b"",
    ],
)
def test_odd_jsons_name_nothing(tmp_path: Path, about: bytes) -> None:
    path = shard(tmp_path, file(b"k.json", about), SAMPLE)
    assert index([path], allow_empty_classes=True).classes == ("0",)


def test_what_is_no_plain_file_is_refused(tmp_path: Path) -> None:
    """A folder; a named pipe, which would block forever; a name with a NUL."""
    pipe = tmp_path / "pipe.tar"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(UserError, match="not a regular file"):
            index([path])
    with pytest.raises(UserError, match="cannot be opened"):
        index(["a\0b.tar"])


def test_messages_stay_short_and_printable(tmp_path: Path) -> None:
    name = b"\x1b[2J" + b"n" * 100_000
    for members in (
        [gnu(name + b".txt"), file(b"x")],
        [gnu(name + b".cls"), file(b"x", b"9" * 60)],
        [gnu(name + b".jpg"), file(b"x"), gnu(name + b".jpg"), file(b"x")],
        [gnu(b"\xff.jpg"), file(b"x"), gnu(b"\xff.cls"), file(b"x", b"0")],
    ):
        with pytest.raises(UserError) as caught:
            index([shard(tmp_path, *members)])
        text = str(caught.value)
        assert len(text) < 1500
        assert text.replace("\n", "").isprintable()


def test_hidden_files_of_macos_are_refused_with_the_remedy(tmp_path: Path) -> None:
    for name in ("t/._k.jpg", "t/.DS_Store"):
        path = write_tar(tmp_path / "a.tar", [(name, b"x"), ("t/k.jpg", b"1"), ("t/k.cls", b"0")])
        with pytest.raises(UserError, match="hidden files of a folder") as caught:
            index([path])
        assert name in caught.value.what
        assert "COPYFILE_DISABLE=1" in caught.value.remedy
    top = write_tar(tmp_path / "b.tar", [("._k.jpg", b"x"), ("k.jpg", b"1"), ("k.cls", b"0")])
    assert len(index([top])) == 1


def test_headers_that_change_midway_are_read_as_well_as_the_first(tmp_path: Path) -> None:
    """Alternating owners, times, prefixes and types: the fast check must not keep old ones."""
    members = []
    for n in range(40):
        fields = {"prefix": b"p%d" % (n % 3)} if n % 4 else {}
        fields |= {"owner": octal(n % 5, 8), "mtime": base256(-n, 12) if n % 7 else octal(n, 12)}
        if n % 6 == 0:
            members.append(pax({b"path": b"long/%d.cls" % n}) if n % 12 else gnu(b"L%d.cls" % n))
        members.append(file(b"%d.cls" % n, b"0" * n, b"7" if n % 5 == 0 else b"0", **fields))
        members.append(header(b"%d.jpg" % n, 7, b"2", **fields))
    path = shard(tmp_path, *members)
    found = [(s.key, {k: m.size for k, m in s.fields.items()}) for s in samples.samples(path)]
    expected = archives.by_webdataset(path)
    assert found == [(key, {k: len(v) for k, v in fields.items()}) for key, fields in expected]
    assert len(found) == 40


@pytest.mark.parametrize("at", [0, 50, 105, 120, 130, 140, 150, 156, 300, 350, 511])
def test_damage_anywhere_in_a_header_is_seen_after_many_sound_ones(tmp_path: Path, at: int) -> None:
    """The fast check of headers like earlier ones is as strict as the full check."""
    whole = bytearray(b"".join(file(b"%02d.jpg" % n, b"x") for n in range(20)) + END)
    whole[18 * 1024 + at] ^= 4
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"checksum at byte 18,432|number at byte 18,432"):
        list(samples.walk(path))


@pytest.mark.parametrize("at", [100, 108, 116, 124, 135, 136, 329, 337])
def test_numbers_are_checked_after_many_sound_ones(tmp_path: Path, at: int) -> None:
    """The same for corruption that the checksum does not detect."""
    whole = bytearray(b"".join(file(b"%02d.jpg" % n, b"x") for n in range(20)) + END)
    whole[18 * 1024 + at] = ord("z")
    whole[18 * 1024 : 18 * 1024 + 512] = archives.repair(bytes(whole[18 * 1024 : 18 * 1024 + 512]))
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    with pytest.raises(UserError, match="impossible number at byte 18,432"):
        list(samples.walk(path))
