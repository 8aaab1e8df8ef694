"""Remote shards give the same bytes as local ones through HTTP and S3, whatever the network does."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from threading import Lock

import numpy as np
import pytest

from cnn2gnn_dist.data import Stream, ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.reading import remote_shards
from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.shard_files import CacheSpec
from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.data.storage.shard_cache import ShardCache
from cnn2gnn_dist.data.storage.shard_paths import expand
from cnn2gnn_dist.errors import UserError
from tests.support.forks import fork_context
from tests.support.servers import Served, http_server, s3_server
from tests.support.shards import make_shards, random_images

IMAGES = random_images(40)
VIEWS = ViewSpec("crop_flip", 32, seed=2)
IDS = np.random.default_rng(0).permutation(40)


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(urls, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(urls, "LONGEST_PAUSE", 0.02)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return make_shards(tmp_path / "s", IMAGES, np.arange(40) % 5, shard_size=8)


@pytest.fixture
def web(shards) -> Iterator[Served]:
    with http_server(shards[0].parent) as served:
        yield served


@pytest.fixture
def wanted(shards, tmp_path) -> Batch:
    index(shards, progress=False).save(tmp_path / "local.arrow")
    return Reader(ReaderSpec(str(tmp_path / "local.arrow"), VIEWS)).read(Request(IDS, 1))


def urls_of(web: Served, shards: list[Path]) -> list[str]:
    return [f"{web.url}/{path.name}" for path in shards]


def far_spec(tmp_path: Path, urls: list[str], limit: int = 0) -> ReaderSpec:
    path = tmp_path / "far.arrow"
    if not path.exists():
        index(urls, progress=False).save(path)
    return ReaderSpec(str(path), VIEWS, cache=CacheSpec(str(tmp_path / "cache"), limit))


def assert_same(found: Batch, wanted: Batch) -> None:
    assert found.problems == []
    np.testing.assert_array_equal(found.images, wanted.images)
    np.testing.assert_array_equal(found.labels, wanted.labels)


def files_in(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern))


def test_http_in_ranges_reads_only_what_is_delivered(web, shards, tmp_path, wanted, monkeypatch):
    monkeypatch.setattr(remote_shards, "GAP", -1)  # no neighbors
    spec = far_spec(tmp_path, urls_of(web, shards))
    web.sent = 0
    assert_same(Reader(spec).read(Request(IDS, 1)), wanted)
    assert web.sent == Manifest.load(spec.manifest).size_N.sum()
    assert not (tmp_path / "cache").exists()


def test_http_through_the_cache_downloads_each_shard_once(web, shards, tmp_path, wanted):
    spec = far_spec(tmp_path, urls_of(web, shards), 1 << 30)
    web.requests.clear()
    for _ in range(2):  # a second reader uses what the first has cached
        assert_same(Reader(spec).read(Request(IDS, 1)), wanted)
    assert dict(web.requests) == {f"/{path.name}": 1 for path in shards}
    kept = files_in(tmp_path / "cache", "*.tar")
    assert sorted(p.read_bytes() for p in kept) == sorted(p.read_bytes() for p in shards)


def test_file_urls_are_local_paths(shards):
    assert expand([f"file://{path}" for path in shards]) == [str(path) for path in shards]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_s3(shards, tmp_path, wanted, limit, monkeypatch):
    import fsspec

    with s3_server() as endpoint:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
        }.items():
            monkeypatch.setenv(name, value)
        urls._opened.cache_clear()
        store = fsspec.filesystem("s3", skip_instance_cache=True)
        store.mkdir("pictures")
        for path in shards:
            store.put_file(str(path), f"pictures/train/{path.name}")
        listed = expand("s3://pictures/train/shard-*.tar")
        assert listed == [f"s3://pictures/train/{path.name}" for path in shards]
        assert expand("s3://pictures/train/") == listed
        spec = far_spec(tmp_path, listed, limit)
        assert_same(Reader(spec).read(Request(IDS, 1)), wanted)
        with pytest.raises(UserError, match="can't be read") as error:
            urls.size("s3://pictures/none.tar")
        assert error.value.where == "s3://pictures/none.tar"
    urls._opened.cache_clear()


class Spared:
    """Allows each path this many faults: without a limit one range may by chance meet them in all of its attempts."""

    def __init__(self, most: int) -> None:
        self._most, self._taken, self._lock = most, Counter[str](), Lock()

    def take(self, path: str) -> bool:
        """Whether the path may have another one."""
        with self._lock:
            self._taken[path] += 1
            return self._taken[path] <= self._most


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("fault", ["500", "short", "drop", "whole", "stall"])
def test_transient_faults_are_survived(web, shards, tmp_path, wanted, fault, limit, monkeypatch):
    if fault == "stall":  # otherwise an answer that is only late would be requested again
        monkeypatch.setattr(urls, "READ_SECONDS", 0.5)
    urls._opened.cache_clear()
    spec = far_spec(tmp_path, urls_of(web, shards), limit)
    monkeypatch.setattr(remote_shards, "GAP", -1)
    without = 5 if limit else 40
    begins = web.requests.total()
    every = 20 if fault == "stall" else 3
    spared = Spared(urls.ATTEMPTS - 1)
    web.fault = lambda number, path: (
        fault if (number - begins) % every == 0 and spared.take(path) else None
    )
    assert_same(Reader(spec).read(Request(IDS, 1)), wanted)
    again = fault != "whole"  # a whole file need not be requested again
    assert (web.requests.total() - begins > without) == again
    urls._opened.cache_clear()


@pytest.mark.parametrize(("fault", "attempts"), [("500", urls.ATTEMPTS), ("404", 1)])
def test_permanent_faults_are_named(web, shards, tmp_path, fault, attempts):
    spec = far_spec(tmp_path, urls_of(web, shards))
    web.requests.clear()
    web.fault = lambda number, path: fault
    with pytest.raises(UserError, match="can't be read") as error:
        Reader(spec).read(Request(IDS[:1], 1))
    assert web.requests.total() == attempts
    assert error.value.where == f"{web.url}/{shards[IDS[0] // 8].name}"


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("stays", [False, True])
def test_wrong_bytes_are_fetched_again_then_refused(web, shards, tmp_path, limit, stays):
    spec = far_spec(tmp_path, urls_of(web, shards), limit)
    whole, manifest = shards[0].read_bytes(), Manifest.load(spec.manifest)
    at = int(manifest.offset_N[3]) + int(manifest.size_N[3]) // 2
    shards[0].write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    answered = []

    def repair(number: int, path: str) -> None:
        # The first answer is corrupt; later ones are valid, unless the fault stays.
        if answered and not stays:
            shards[0].write_bytes(whole)
        answered.append(path)

    web.fault = repair
    reader = Reader(spec)
    if stays:
        with pytest.raises(UserError, match="differ from those indexed") as error:
            reader.read(Request(np.array([3]), -1))
        assert error.value.where == f"{web.url}/{shards[0].name}"
    else:
        batch = reader.read(Request(np.array([3]), -1))
        np.testing.assert_array_equal(batch.images[0], IMAGES[3])


def test_local_checksums_are_verified_too(shards, tmp_path):
    path = tmp_path / "m.arrow"
    index(shards, progress=False, checksums=True).save(path)
    manifest = Manifest.load(path)
    whole, at = shards[0].read_bytes(), int(manifest.offset_N[3]) + 30
    shards[0].write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    reader = Reader(ReaderSpec(str(path), VIEWS))
    assert reader.read(Request(np.array([2]), -1)).valid.all()
    with pytest.raises(UserError, match="differ from those indexed"):
        reader.read(Request(np.array([3]), -1))


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_shard_that_changed_its_length_is_refused(web, shards, tmp_path, limit):
    spec = far_spec(tmp_path, urls_of(web, shards), limit)
    shards[0].write_bytes(shards[0].read_bytes()[:2000])
    with pytest.raises(UserError) as error:
        Reader(spec).read(Request(np.arange(8), 1))
    assert error.value.where == f"{web.url}/{shards[0].name}"


def test_a_shard_too_large_for_the_cache_is_read_in_ranges(web, shards, tmp_path, wanted):
    spec = far_spec(tmp_path, urls_of(web, shards), 100)
    assert_same(Reader(spec).read(Request(IDS, 1)), wanted)
    assert files_in(tmp_path / "cache", "*.tar") == []


def read_all(spec: ReaderSpec, go: Barrier) -> None:
    go.wait(60)
    Reader(spec).read(Request(IDS, 1))


def test_processes_of_a_node_download_once(web, shards, tmp_path):
    spec = far_spec(tmp_path, urls_of(web, shards), 1 << 30)
    web.requests.clear()
    context = fork_context()
    go = context.Barrier(3)
    readers = [context.Process(target=read_all, args=(spec, go)) for _ in range(3)]
    for process in readers:
        process.start()
    for process in readers:
        process.join(120)
        assert process.exitcode == 0
    assert dict(web.requests) == {f"/{path.name}": 1 for path in shards}


def open_one(folder: Path, url: str, length: int) -> None:
    ShardCache(folder, 1 << 30).open(url, length)


def test_a_download_that_is_killed_leaves_no_shard_and_is_cleared(web, shards, tmp_path):
    url, length = urls_of(web, shards)[0], shards[0].stat().st_size
    asked, plain = fork_context().Event(), None
    web.fault = lambda number, path: (asked.set(), "stall")[1]
    process = fork_context().Process(target=open_one, args=(tmp_path / "c", url, length))
    process.start()
    assert asked.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert len(files_in(tmp_path / "c", "*.part")) == 1
    assert files_in(tmp_path / "c", "*.tar") == []
    web.fault = lambda number, path: plain
    other = urls_of(web, shards)[1]
    os.close(ShardCache(tmp_path / "c", 1 << 30).open(other, shards[1].stat().st_size))
    assert files_in(tmp_path / "c", "*.part") == []
    handle = ShardCache(tmp_path / "c", 1 << 30).open(url, length)
    assert os.pread(handle, 1 << 20, 0) == shards[0].read_bytes()
    os.close(handle)


def test_a_stream_over_urls(web, shards):
    braces = f"{web.url}/shard-{{000000..000004}}.tar"
    how = {"global_batch": 8, "views": VIEWS, "backend": "local", "window": 2}
    with Stream(braces, **how) as remote_shards, Stream([str(p) for p in shards], **how) as near:
        assert remote_shards.manifest.digest == near.manifest.digest
        for one, other in zip(remote_shards, near, strict=True):
            assert_same(one, other)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (b"<!DOCTYPE html><html>Please log in</html>", "an HTML page, not a tar"),
        (b'{"error": "no such bucket"}', "JSON, not a tar"),
    ],
)
def test_a_page_instead_of_a_shard_is_called_a_page(web, shards, answer, says):
    """Served with status 200, as login pages and portals do."""
    shards[1].write_bytes(answer)
    urls = urls_of(web, shards)
    with pytest.raises(UserError, match=says) as caught:
        index(urls, progress=False)
    assert caught.value.where == urls[1]


def test_a_protocol_that_nobody_knows():
    with pytest.raises(UserError, match="can't be opened"):
        urls.size("gopher://hole/a.tar")
