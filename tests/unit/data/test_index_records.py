"""What index records and a manifest file must contain: checksums, digests, URLs, with any number of workers."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cnn2gnn_dist.data.index import build, shard_rows
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.errors import UserError
from tests.support import archives
from tests.support.archives import (
    file,
    peak_of,
    shard,
)
from tests.support.servers import http_server
from tests.support.shards import make_shards, random_images, write_tar

SAMPLE = file(b"k.cls", b"0") + file(b"k.jpg", b"image")
MB = 1 << 20


def test_checksums(tmp_path: Path) -> None:
    """Recorded on request, preserved by saving and selecting; not part of the digest."""
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
    """Written directly with pyarrow, column by column, as the first release of format version 1 wrote it."""
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
    """Decreasing or unlisted shard numbers, as a single flipped byte in the file would cause."""
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
    """With more keys than are hashed at a time, in string columns with 32-bit and 64-bit offsets."""
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
    """Rows are in shard order, and class names may come from any shard."""
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


def test_remote_shards_are_recorded_by_their_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like local ones, with checksums; saving, loading and checking keep the URLs unchanged."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    paths = make_shards(tmp_path / "d", random_images(10, 8, 8), [0, 1] * 5, shard_size=4)
    local = index(paths, checksums=True)
    with http_server(tmp_path / "d") as server:
        urls = [f"{server.url}/{path.name}?signature=of-today" for path in paths]
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
