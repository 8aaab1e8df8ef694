"""The stream with its cache of decoded images: the same bytes, shared, bounded, never of another set."""

from __future__ import annotations

import os

import numpy as np
import pytest

from cnn2gnn_dist.data import ViewSpec
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.reading import shard_files
from cnn2gnn_dist.errors import UserError
from tests.support.shards import (
    make_shards,
    own_cache,  # noqa: F401 (fixture)
    shard_pattern,
)
from tests.unit.data.test_stream import IMAGES, VIEWS, a_stream, shards  # noqa: F401 (fixture)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("kind", ["none", "shift", "crop_flip", "random_resized_crop"])
@pytest.mark.parametrize("limit", [0, 70 + 20 * 3072, 1 << 30])
def test_the_decoded_cache_changes_no_byte(shards, kind, limit, monkeypatch):
    views = ViewSpec(kind, 32, seed=1)
    with a_stream(shards, views=views) as stream:
        wanted = [batch for _ in range(2) for batch in stream]
    decoded, plain = [], shard_files.ShardFiles.read_all
    monkeypatch.setattr(
        shard_files.ShardFiles,
        "read_all",
        lambda self, samples: (decoded.extend(samples), plain(self, samples))[1],
    )
    with a_stream(shards, views=views, decoded_bytes=limit) as stream:
        found = [batch for _ in range(2) for batch in stream]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.images, other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    # Samples below the limit are decoded once, the others each time that they are read.
    kept = 0 if kind == "random_resized_crop" else min(70, max(0, limit - 70) // 3072)
    shown = np.concatenate([batch.ids for batch in wanted])
    assert len(decoded) == np.sum(shown >= kept) + len(np.unique(shown[shown < kept]))


def test_decoded_caches_of_other_limits_are_the_same_file(tmp_path):
    """All pixels are 1, like the mark of an image that is cached: neither may be taken for the other."""
    images = np.ones((70, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(70)
    shards = shard_pattern(tmp_path / "ones", images, np.zeros(70, int))
    views = ViewSpec("none", 32)
    with a_stream(shards, views=views, train=False) as stream:
        wanted = list(stream)
        folder = stream.manifest_path.parent
    for images in (20, 50, 30, 70):
        with a_stream(shards, views=views, train=False, decoded_bytes=70 + images * 3072) as stream:
            for one, other in zip(stream, wanted, strict=True):
                np.testing.assert_array_equal(one.images, other.images)
    (file,) = folder.glob("decoded-*.u8")
    assert file.stat().st_size == 70 + 70 * 3072


def test_the_decoded_cache_is_shared_and_bounded_and_not_for_the_corrupt(tmp_path):
    images = [IMAGES[i] for i in range(16)]
    make_shards(tmp_path / "s", images, np.zeros(16, int), shard_size=16)
    tar = tmp_path / "s" / "shard-000000.tar"
    with a_stream(str(tar), decoded_bytes=1 << 20, max_corrupt=1.0) as stream:
        list(stream)
        (file,) = stream.manifest_path.parent.glob("decoded-*.u8")
        assert file.stat().st_size == 16 * 3073
        damaged = bytearray(tar.read_bytes())
        at = int(stream.manifest.offset_N[3])
        damaged[at : at + 40] = bytes(40)
    file.unlink()
    stat = tar.stat()
    tar.write_bytes(damaged)
    os.utime(
        tar, ns=(stat.st_atime_ns, stat.st_mtime_ns)
    )  # the cache still takes the manifest for the same one
    with a_stream(str(tar), decoded_bytes=1 << 20, max_corrupt=1.0) as stream:
        for _ in range(2):  # first decoded, then from the cache
            batches = list(stream)
            bad = [i for b in batches for i in b.ids[~b.valid].tolist()]
            assert bad == [3]
            assert sum(len(b.problems) for b in batches) == 1


@pytest.mark.parametrize("where", ["other", "same"])
def test_images_of_another_set_of_one_length_are_not_taken_from_the_decoded_cache(tmp_path, where):
    """Uncompressed images have one length: names, lengths, keys and labels of two sets may be the same."""
    how = {"views": ViewSpec("none", 32), "train": False, "decoded_bytes": 1 << 20}
    digests, times = set(), (0, 10**9)
    for images, folder, at in zip(
        (IMAGES[:16], 255 - IMAGES[:16]), ("first", where), times, strict=True
    ):
        place = tmp_path / ("first" if folder == "same" else folder)
        for shard in make_shards(place, images, np.arange(16) % 2, suffix="bmp"):
            os.utime(shard, ns=(at, at))
        with a_stream(str(place), **how) as stream:
            digests.add(stream.manifest.digest)
            for _ in range(2):  # decoded, then from the cache
                found = np.concatenate([batch.images for batch in stream])
                np.testing.assert_array_equal(found, images)
    assert len(digests) == 1


def test_a_manifest_written_again_has_another_decoded_cache(tmp_path):
    path, how = tmp_path / "m.arrow", {"views": ViewSpec("none", 32), "train": False}
    for images, at in ((IMAGES[:8], 10**9), (255 - IMAGES[:8], 2 * 10**9)):
        index(make_shards(tmp_path / "s", images, np.arange(8) % 2, suffix="bmp")).save(path)
        os.utime(path, ns=(at, at))
        with a_stream(str(path), decoded_bytes=1 << 20, **how) as stream:
            np.testing.assert_array_equal(next(iter(stream)).images, images)


def test_a_cache_that_cannot_be_created_is_the_users_error(shards):
    with a_stream(shards) as stream:
        path, manifest = stream.manifest_path, stream.manifest
    from cnn2gnn_dist.data.reading.decoded_cache import cache_path

    cache_path(path, manifest, VIEWS).mkdir()
    with pytest.raises(UserError, match=r"stream\.decoded_bytes=0"):
        a_stream(shards, decoded_bytes=1 << 20)
