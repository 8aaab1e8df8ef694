"""Reading the bytes of samples: the bounded shard cache, ranges of neighboring members, checksums."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.reading import remote_shards
from cnn2gnn_dist.data.reading.remote_shards import CacheSpec, merged_ranges
from cnn2gnn_dist.data.reading.shard_files import ShardFiles
from cnn2gnn_dist.data.storage import shard_cache, urls
from cnn2gnn_dist.data.storage.shard_cache import ShardCache, release
from cnn2gnn_dist.errors import UserError
from tests.support.servers import Served, http_server
from tests.support.shards import make_shards, random_images

IMAGES = random_images(40)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return make_shards(tmp_path / "s", IMAGES, np.arange(40) % 5, shard_size=8)


@pytest.fixture
def web(shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(urls, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(urls, "LONGEST_PAUSE", 0.002)
    with http_server(shards[0].parent) as served:
        yield served


def url_of(web: Served, shard: Path) -> str:
    return f"{web.url}/{shard.name}"


def far_manifest(web: Served, shards: list[Path], local: tuple[int, ...] = ()) -> Manifest:
    """The manifest that ``index`` would write for the URLs, made without a request; some shards stay local."""
    manifest = index(shards, progress=False, checksums=True)
    elsewhere = [
        shard if number in local else replace(shard, path=url_of(web, shards[number]))
        for number, shard in enumerate(manifest.shards)
    ]
    return replace(manifest, shards=tuple(elsewhere))


def wanted_of(manifest: Manifest, shards: list[Path]) -> list[bytes]:
    """Each sample's bytes, sliced from the files."""
    whole = [path.read_bytes() for path in shards]
    places = zip(manifest.shard_N, manifest.offset_N, manifest.size_N, strict=True)
    return [whole[shard][start : start + size] for shard, start, size in places]


def damage(shard: Path, manifest: Manifest, sample: int) -> None:
    data = bytearray(shard.read_bytes())
    data[int(manifest.offset_N[sample]) + 40] ^= 1
    shard.write_bytes(data)


def open_one(cache: ShardCache, web: Served, shard: Path) -> int | None:
    return cache.open(url_of(web, shard), shard.stat().st_size)


def held(cache: ShardCache, web: Served, shards: list[Path]) -> list[int]:
    """Which of the shards are in the cache."""
    found = []
    for number, shard in enumerate(shards):
        handle = cache.held(url_of(web, shard), shard.stat().st_size)
        if handle is not None:
            release(handle)
            found.append(number)
    return found


def used(cache: ShardCache) -> int:
    return sum(p.stat().st_size for p in cache.folder.iterdir() if p.name != ".room")


# Ranges


def test_neighbours_come_in_one_range(web, shards):
    manifest = far_manifest(web, shards)
    files, wanted = ShardFiles(manifest), wanted_of(manifest, shards)
    assert files.read_all(list(range(8))) == wanted[:8]
    assert web.requests.total() == 1
    last = 7
    assert web.sent == manifest.offset_N[last] + manifest.size_N[last] - manifest.offset_N[0]
    web.requests.clear()
    asked = [39, 0, 17, 0, 8, 39, 23]  # in any order, some twice
    assert files.read_all(asked) == [wanted[sample] for sample in asked]
    assert set(web.requests) == {f"/{shards[number].name}" for number in (0, 1, 2, 4)}
    assert files.read_all([]) == []


def test_stretches_end_at_gaps_at_their_limit_and_at_shards(shards, monkeypatch):
    manifest = index(shards, progress=False)
    monkeypatch.setattr(remote_shards, "GAP", 1 << 20)
    assert [byte_range.samples for byte_range in merged_ranges(manifest, [9, 3, 0, 8, 3])] == [
        (0, 3),
        (8, 9),
    ]
    monkeypatch.setattr(remote_shards, "SPAN", int(manifest.size_N[:3].max()) + 10)
    assert [byte_range.samples for byte_range in merged_ranges(manifest, [0, 1, 2])] == [
        (0,),
        (1,),
        (2,),
    ]
    monkeypatch.setattr(remote_shards, "SPAN", 1 << 30)
    between = int(manifest.offset_N[2] - manifest.offset_N[0] - manifest.size_N[0])
    for gap, expected in ((between, [(0, 2)]), (between - 1, [(0,), (2,)])):
        monkeypatch.setattr(remote_shards, "GAP", gap)
        assert [byte_range.samples for byte_range in merged_ranges(manifest, [0, 2])] == expected


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_local_and_remote_shards_in_one_manifest(web, shards, tmp_path, limit):
    manifest = far_manifest(web, shards, local=(1, 3))
    files = ShardFiles(manifest, CacheSpec(str(tmp_path / "c"), limit))
    ids = np.random.default_rng(1).permutation(40).tolist()
    wanted = wanted_of(manifest, shards)
    assert files.read_all(ids) == [wanted[sample] for sample in ids]
    assert set(web.requests) == {f"/{shards[number].name}" for number in (0, 2, 4)}


# The cache and its bound


def test_the_bound_holds_whatever_is_read(web, shards, tmp_path):
    most = max(path.stat().st_size for path in shards)
    manifest, wanted = far_manifest(web, shards), None
    wanted = wanted_of(manifest, shards)
    spec = CacheSpec(str(tmp_path / "c"), 2 * most, rest=0)
    files, cache = ShardFiles(manifest, spec), ShardCache(tmp_path / "c", 2 * most, rest=0)
    for seed in range(4):
        for sample in np.random.default_rng(seed).permutation(40).tolist():
            assert files.read(sample) == wanted[sample]
            assert used(cache) <= cache.limit
    assert len(held(cache, web, shards)) == 2


def test_what_was_used_longest_ago_goes_first(web, shards, tmp_path):
    cache = ShardCache(tmp_path / "c", 2 * max(p.stat().st_size for p in shards), rest=0)
    for number in (0, 1, 0, 2):
        release(open_one(cache, web, shards[number]))
    assert held(cache, web, shards) == [0, 2]
    assert dict(web.requests) == {f"/{shards[number].name}": 1 for number in (0, 1, 2)}


def test_a_shard_that_is_read_is_not_removed(web, shards, tmp_path):
    """If deleted, it would still occupy disk space, and the bound would not hold."""
    cache = ShardCache(tmp_path / "c", 2 * max(p.stat().st_size for p in shards), rest=0)
    handles = [open_one(cache, web, shards[number]) for number in (0, 1)]
    assert open_one(cache, web, shards[2]) is None
    assert used(cache) <= cache.limit
    release(handles.pop(0))
    release(open_one(cache, web, shards[2]))
    assert held(cache, web, shards) == [1, 2]
    assert os.pread(handles[0], 1 << 20, 0) == shards[1].read_bytes()
    release(handles[0])


def test_a_window_larger_than_the_cache_does_not_turn_it_over(web, shards, tmp_path, monkeypatch):
    """Part of it is cached and the rest is read in ranges; nothing is downloaded again with every batch."""
    monkeypatch.setattr(remote_shards, "RETRY_SECONDS", 0.0)
    manifest = far_manifest(web, shards)
    wanted = wanted_of(manifest, shards)
    limit = 2 * max(path.stat().st_size for path in shards)
    files = ShardFiles(manifest, CacheSpec(str(tmp_path / "c"), limit))
    for sample in np.random.default_rng(0).permutation(40).tolist():
        assert files.read(sample) == wanted[sample]
    kept = held(ShardCache(tmp_path / "c", limit), web, shards)
    assert len(kept) == 2
    assert [web.requests[f"/{shards[number].name}"] for number in kept] == [1, 1]


def test_other_files_in_the_folder_are_left_alone(web, shards, tmp_path):
    (tmp_path / "c").mkdir()
    mine = tmp_path / "c" / "notes.tar"
    mine.write_bytes(bytes(1000))
    cache = ShardCache(tmp_path / "c", max(p.stat().st_size for p in shards), rest=0)
    for shard in shards:
        release(open_one(cache, web, shard))
    assert mine.read_bytes() == bytes(1000)


def test_names_in_urls_lead_nowhere(web, shards, tmp_path):
    cache = ShardCache(tmp_path / "deep" / "c", 1 << 30)
    (shards[0].parent / "x").mkdir()
    url = f"{web.url}/x/..%2f../../{shards[0].name}"
    with contextlib.suppress(UserError):  # the server may answer 404
        release(cache.open(url, shards[0].stat().st_size))
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"c"}
    names = [p.name for p in (tmp_path / "deep" / "c").iterdir() if p.name != ".room"]
    assert all(shard_cache._OURS.fullmatch(name) for name in names)


# Failures of the cache


def test_a_full_disk_means_ranges_and_is_reported_once(web, shards, tmp_path, console, capfd):
    manifest = far_manifest(web, shards)
    files = ShardFiles(manifest, CacheSpec(str(tmp_path / "c"), 1 << 30))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # maximum length of any file
    try:
        blobs = files.read_all(list(range(40)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert blobs == wanted_of(manifest, shards)
    assert capfd.readouterr().err.count("reading ranges instead") == 1
    assert [p.name for p in (tmp_path / "c").iterdir()] == [".room"]


def test_an_unusable_cache_folder_means_ranges(web, shards, tmp_path, console, capfd):
    (tmp_path / "c").write_text("a file")
    manifest = far_manifest(web, shards)
    files = ShardFiles(manifest, CacheSpec(str(tmp_path / "c"), 1 << 30))
    assert files.read_all([3, 30]) == [wanted_of(manifest, shards)[s] for s in (3, 30)]
    assert capfd.readouterr().err.count("reading ranges instead") == 1


def test_a_file_system_without_locks_means_ranges_and_no_descriptor_leaks(
    web, shards, tmp_path, monkeypatch
):
    manifest = far_manifest(web, shards)
    cache = ShardCache(tmp_path / "c", 1 << 30)
    release(open_one(cache, web, shards[0]))
    monkeypatch.setattr(remote_shards, "RETRY_SECONDS", 0.0)  # every read tries to cache its shard

    def no_locks(handle: int, kind: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")  # Lustre, without the option flock

    monkeypatch.setattr(fcntl, "flock", no_locks)
    files, wanted = (
        ShardFiles(manifest, CacheSpec(str(tmp_path / "c"), 1 << 30)),
        wanted_of(manifest, shards),
    )
    files.read(3)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for sample in (3, 30):
            assert files.read(sample) == wanted[sample]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_copy_that_somebody_cut_is_fetched_again(web, shards, tmp_path):
    cache = ShardCache(tmp_path / "c", 1 << 30)
    release(open_one(cache, web, shards[0]))
    (kept,) = (tmp_path / "c").glob("*.tar")
    os.truncate(kept, 1000)
    handle = open_one(cache, web, shards[0])
    assert os.pread(handle, 1 << 20, 0) == shards[0].read_bytes()
    release(handle)


def test_a_copy_that_rots_is_dropped_and_its_sample_fetched(web, shards, tmp_path):
    manifest = far_manifest(web, shards)
    wanted = wanted_of(manifest, shards)
    spec = CacheSpec(str(tmp_path / "c"), 1 << 30)
    assert ShardFiles(manifest, spec).read(3) == wanted[3]
    (kept,) = (tmp_path / "c").glob("*.tar")
    damage(kept, manifest, 3)
    later = ShardFiles(manifest, spec)  # as in a new process: nothing verified yet
    assert later.read(3) == wanted[3]
    assert not kept.exists()
    assert later.read(4) == wanted[4]
    assert kept.read_bytes() == shards[0].read_bytes()


def test_a_download_is_verified_as_a_whole(web, shards, tmp_path):
    """The requested sample is intact, but another is not: such a copy is not cached."""
    manifest = far_manifest(web, shards)
    damage(shards[0], manifest, 5)
    files = ShardFiles(manifest, CacheSpec(str(tmp_path / "c"), 1 << 30))
    with pytest.raises(UserError, match=f"'{manifest.key(5)}' differ from those indexed") as caught:
        files.read(3)
    assert caught.value.where == url_of(web, shards[0])
    assert web.requests.total() == 2  # retried once before it was refused
    assert [p.name for p in (tmp_path / "c").iterdir()] == [".room"]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_grown_shard_is_refused_or_still_read_right(web, shards, tmp_path, limit):
    manifest = far_manifest(web, shards)
    wanted = wanted_of(manifest, shards)
    with open(shards[0], "ab") as file:
        file.write(bytes(1024))
    files = ShardFiles(manifest, CacheSpec(str(tmp_path / "c"), limit))
    if limit:
        with pytest.raises(UserError, match="has changed"):
            files.read(3)
    else:
        assert files.read(3) == wanted[3]  # its checksum matches


# Several processes


def test_who_waits_too_long_reads_ranges(web, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "WAIT_SECONDS", 0.2)
    manifest = far_manifest(web, shards)
    name = shard_cache._name(url_of(web, shards[0]), shards[0].stat().st_size)
    (tmp_path / "c").mkdir()
    with open(tmp_path / "c" / f"{name}.part", "wb") as part:
        fcntl.flock(part, fcntl.LOCK_EX)  # a downloader that hangs
        files = ShardFiles(manifest, CacheSpec(str(tmp_path / "c"), 1 << 30))
        assert files.read(3) == wanted_of(manifest, shards)[3]
        assert (tmp_path / "c" / f"{name}.part").exists()


# Through the command line


def test_urls_in_a_config_stay_as_they_are(tmp_path):
    given = [
        "data.source=shards",
        "data.train=['s3://b/a-{0..3}.tar', x.tar]",
        "data.test=http://h/t.tar",
    ]
    data = settings.load(None, given).data
    assert data.train == ["s3://b/a-{0..3}.tar", os.path.abspath("x.tar")]
    assert data.test == "http://h/t.tar"


def test_a_run_indexes_urls(web, shards, tmp_path, capsys):
    given = [
        f"run.dir={tmp_path / 'run'}",
        "data.source=shards",
        f"data.train={web.url}/shard-{{000000..000004}}.tar",
    ]
    code = cli.main(["index", "--config", "demo", *given])
    assert code == 0, capsys.readouterr()
    manifest = Manifest.load(tmp_path / "run" / "manifest" / "train.arrow")
    assert [shard.path for shard in manifest.shards] == [url_of(web, path) for path in shards]
    assert manifest.crc_N is not None
    web.requests.clear()
    assert cli.main(["index", "--config", "demo", *given]) == 0
    assert web.requests.total() == 0  # the stage is complete
