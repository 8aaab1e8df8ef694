"""Indexing of hostile and unusual shards, and what the index records (checksums, any size)."""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import http.server
import json
import os
import pickle
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cnn2gnn_dist.data.index import build, shard_rows
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.tar import samples
from cnn2gnn_dist.errors import UserError
from tests.support import archives
from tests.support.archives import END, base256, file, gnu, header, octal, padded, pax
from tests.support.shards import make_shards, random_images, write_tar

SAMPLE = file(b"k.cls", b"0") + file(b"k.jpg", b"image")
MB = 1 << 20


def shard(folder: Path, *members: bytes) -> Path:
    path = folder / "shard.tar"
    path.write_bytes(b"".join(members) + END)
    return path


def peak_of(work: Callable[[], object]) -> int:
    """Peak bytes allocated by Python during the work."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


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
    """A link with an image name is not an image, and its target is never opened."""
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    links = [header(b"k.png", 6, bytes([kind])) for kind in b"123456"]
    link = bytearray(header(b"k.jpeg", 0, b"2"))
    link[157 : 157 + len(str(secret))] = str(secret).encode()
    manifest = index([shard(tmp_path, *links, archives.mend(bytes(link)), SAMPLE)])
    assert (len(manifest), manifest.size_N.tolist()) == (1, [len(b"image")])
    with pytest.raises(UserError, match="no image"):
        index([shard(tmp_path, file(b"k.cls", b"0"), archives.mend(bytes(link)))])


class Mark:
    """Unpickled, it leaves a mark."""

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
    """Those of one member don't accumulate, whatever they contain; ``tarfile`` recurses and fails."""
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
    """Holes of 2 GiB in place of a JSON file, a label, an unknown member and an image."""
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


def test_checksums(tmp_path: Path) -> None:
    """Recorded on request, kept by saving and selecting; not part of the digest."""
    images = random_images(10, 8, 8)
    paths = make_shards(tmp_path / "d", images, [0, 1] * 5, shard_size=4)
    plain, sums = index(paths), index(paths, checksums=True)
    assert plain.crc_N is None
    expected = []
    for path in paths:
        for _, fields in archives.by_webdataset(path):
            expected.append(zlib.crc32(fields["png"]))
    assert sums.crc_N is not None
    assert (sums.crc_N.dtype, sums.crc_N.tolist()) == (np.uint32, expected)
    assert sums.digest == plain.digest
    for manifest in (plain, sums, sums.select(np.array([2, 9]))):
        manifest.save(tmp_path / "m.arrow")
        loaded = Manifest.load(tmp_path / "m.arrow")
        known = manifest.crc_N
        assert (loaded.crc_N is None) == (known is None)
        assert known is None or loaded.crc_N.tolist() == known.tolist()
    assert sums.select(np.array([2, 9])).crc_N.tolist() == [expected[2], expected[9]]
    with pytest.raises(ValueError, match="different lengths"):
        Manifest(sums.shards, sums.classes, *_columns(sums), sums.keys, sums.crc_N[1:])


def _columns(manifest: Manifest) -> list[np.ndarray]:
    return [getattr(manifest, f"{name}_N") for name in shard_rows.COLUMNS]


def test_checksums_of_images_longer_than_one_read(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes(3 * MB + 17)
    path = shard(tmp_path, file(b"k.cls", b"0"), file(b"k.jpg", data))
    assert index([path], checksums=True).crc_N.tolist() == [zlib.crc32(data)]
    assert peak_of(lambda: index([path], checksums=True)) < 3 * MB


def test_a_manifest_of_before_checksums_loads(tmp_path: Path) -> None:
    """Written directly with pyarrow, column by column, as the first version 1 was."""
    header_ = {"version": 1, "digest": "d", "classes": ["a"], "shards": []}
    header_["shards"] = [{"path": "s.tar", "bytes": 9, "samples": 2}]
    values = {"shard": [0, 0], "offset": [512, 1 << 40], "size": [3, 4], "label": [0, -1]}
    values["row_in_shard"] = [0, 1]
    columns = {
        n: pa.array(v, pa.from_numpy_dtype(shard_rows.COLUMNS[n])) for n, v in values.items()
    }
    columns["key"] = pa.array(["é", "b"])
    batch = pa.RecordBatch.from_pydict(columns)
    batch = batch.replace_schema_metadata({"cnn2gnn.manifest": json.dumps(header_)})
    with pa.ipc.new_file(str(tmp_path / "m.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    manifest = Manifest.load(tmp_path / "m.arrow")
    assert {n: getattr(manifest, f"{n}_N").tolist() for n in values} == values
    assert (manifest.key(0), manifest.crc_N) == ("é", None)
    assert manifest.shards[0].path == str(tmp_path / "s.tar")


@pytest.mark.parametrize("wrong", [pa.array([0, None], pa.int32()), pa.array([0, 1], pa.int64())])
def test_a_manifest_with_other_columns_is_refused(tmp_path: Path, wrong: pa.Array) -> None:
    manifest = index([shard(tmp_path, SAMPLE, file(b"l.cls", b"0"), file(b"l.jpg"))])
    manifest.save(tmp_path / "m.arrow")
    batch = pa.ipc.open_file(str(tmp_path / "m.arrow")).get_batch(0)
    at = batch.schema.get_field_index("size")
    batch = batch.set_column(at, "size", wrong)
    with pa.ipc.new_file(str(tmp_path / "n.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(UserError, match="not a complete manifest"):
        Manifest.load(tmp_path / "n.arrow")


def test_a_manifest_whose_rows_make_no_sense_is_refused(tmp_path: Path) -> None:
    """Decreasing or unlisted shard numbers, as one flipped byte in the file would cause."""
    manifest = index([shard(tmp_path, SAMPLE, file(b"l.cls", b"0"), file(b"l.jpg"))])
    for wrong in ([0, -1], [0, 1], [-1, 0], [5, 5]):
        columns = [np.array(wrong, np.int32), *_columns(manifest)[1:]]
        broken = copy.copy(manifest)
        object.__setattr__(broken, "shard_N", columns[0])
        broken.save(tmp_path / "m.arrow")
        with pytest.raises(UserError, match="not a complete manifest"):
            Manifest.load(tmp_path / "m.arrow")
    none = manifest.select(np.array([], np.int64))
    none.save(tmp_path / "m.arrow")
    assert len(Manifest.load(tmp_path / "m.arrow")) == 0


def test_digest_is_that_of_the_rows_one_by_one() -> None:
    """With more keys than are hashed at a time, in strings with 32-bit and 64-bit offsets."""
    n = 70_000
    keys = [f"ключ/{i}" for i in range(n)]
    zeros = np.zeros(n, np.int32)
    digest = hashlib.sha256(json.dumps([1, [], ["a"]]).encode())
    for kind in (np.int32, np.int64, np.int32, np.int32, np.int32):
        digest.update(np.zeros(n, kind).tobytes())
    digest.update("".join(f"{key}\n" for key in keys).encode())
    for kind in (pa.string(), pa.large_string()):
        offsets = np.zeros(n, np.int64)
        manifest = Manifest((), ("a",), zeros, offsets, zeros, zeros, zeros, pa.array(keys, kind))
        assert manifest.digest == digest.hexdigest()[:32]


def test_keys_beyond_two_gibibytes_keep_long_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    short = build.joined([pa.array(["a", "b"], pa.large_string())] * 2)
    assert (short.type, short.to_pylist()) == (pa.string(), ["a", "b"] * 2)
    monkeypatch.setattr(build, "SHORT", 3)
    assert build.joined([pa.array(["a", "b"], pa.large_string())] * 2).type == pa.large_string()


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    """Rows in shard order, class names from any shard."""
    members = [[(f"{s}.cls", b"%d" % (s % 3)), (f"{s}.jpg", b"x" * s)] for s in range(20)]
    for s, sample in enumerate(members):
        sample.append((f"{s}.json", b'{"class_name": "from %d"}' % (s % 3)))
    paths = [write_tar(tmp_path / f"{s:02d}.tar", sample) for s, sample in enumerate(members)]
    manifest = index(paths, workers=workers)
    assert manifest.size_N.tolist() == list(range(20))
    assert manifest.shard_N.tolist() == list(range(20))
    assert manifest.classes == ("from 0", "from 1", "from 2")
    paths[7].write_bytes(b"x" * 512)
    with pytest.raises(UserError, match="not a valid tar") as caught:
        index(paths, workers=workers)
    assert caught.value.where == str(paths[7])
    assert not [t for t in threading.enumerate() if t.name.startswith("index")]


def test_headers_that_change_midway_are_read_as_well_as_the_first(tmp_path: Path) -> None:
    """Owners, times, prefixes and types that alternate: the fast check must not keep old ones."""
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
    """As above, for corruption that the checksum does not detect."""
    whole = bytearray(b"".join(file(b"%02d.jpg" % n, b"x") for n in range(20)) + END)
    whole[18 * 1024 + at] = ord("z")
    whole[18 * 1024 : 18 * 1024 + 512] = archives.mend(bytes(whole[18 * 1024 : 18 * 1024 + 512]))
    path = tmp_path / "x.tar"
    path.write_bytes(whole)
    with pytest.raises(UserError, match="impossible number at byte 18,432"):
        list(samples.walk(path))


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without logging."""

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """URL of a real HTTP server on the loopback that serves a folder."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_remote_shards_are_recorded_by_their_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like local ones, with checksums; saving, loading and checking keep the URLs unchanged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = make_shards(tmp_path / "d", random_images(10, 8, 8), [0, 1] * 5, shard_size=4)
    local = index(paths, checksums=True)
    with served(tmp_path / "d") as url:
        urls = [f"{url}/{path.name}?signature=of-today" for path in paths]
        far = index(urls)
        assert [shard.path for shard in far.shards] == urls
        assert far.crc_N.tolist() == local.crc_N.tolist()
        assert far.keys.to_pylist() == local.keys.to_pylist()
        assert far.digest == local.digest  # neither host nor query count
        far.save(tmp_path / "m.arrow")
        loaded = Manifest.load(tmp_path / "m.arrow")
        assert loaded.shards == far.shards
        loaded.check_shards()
        mixed = index([urls[0], paths[1]])
        assert (mixed.crc_N.tolist(), mixed.digest) == (
            local.crc_N[:8].tolist(),
            index(paths[:2]).digest,
        )
        paths[1].write_bytes(paths[1].read_bytes()[:3000])
        with pytest.raises(UserError, match="is truncated: 3,000 bytes") as caught:
            loaded.check_shards()
        assert caught.value.where == urls[1]
        with pytest.raises(UserError) as caught:
            index(urls)
        assert urls[1] in caught.value.where
