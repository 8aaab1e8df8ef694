"""Readers: requests to arrays, corrupt samples marked, wrong shards refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.data.images import views as viewing
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.reading import shard_files
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.errors import UserError
from tests.support.shards import encode_image, make_shards, random_images, write_tar

IMAGES = random_images(40)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return make_shards(tmp_path / "s", IMAGES, np.arange(40) % 6, shard_size=8)


def spec_of(shards: list[Path], views: ViewSpec | None = None) -> ReaderSpec:
    path = shards[0].parent.parent / "m.arrow"
    index(shards, progress=False).save(path)
    return ReaderSpec(str(path), views or ViewSpec("none", 32))


def test_images_and_labels_in_the_order_asked(shards):
    reader = Reader(spec_of(shards))
    ids = np.array([39, 0, 17, 8, 8, 23])
    batch = reader.read(Request(ids, CLEAN))
    np.testing.assert_array_equal(batch.images, IMAGES[ids])  # PNG is lossless
    np.testing.assert_array_equal(batch.labels, ids % 6)
    np.testing.assert_array_equal(batch.ids, ids)
    assert batch.valid.all()
    assert batch.problems == []
    kinds = (batch.images.dtype, batch.labels.dtype, batch.ids.dtype, batch.valid.dtype)
    assert kinds == (np.uint8, np.int64, np.int64, np.bool_)
    empty = reader.read(Request(np.empty(0, np.int64), CLEAN))
    assert empty.images.shape == (0, 32, 32, 3)


@pytest.mark.parametrize("kind", ["shift", "crop_flip", "random_resized_crop"])
def test_augmented_as_views_say_in_any_company(shards, kind):
    spec = spec_of(shards, ViewSpec(kind, 24, seed=3))
    ids = np.random.default_rng(0).permutation(40)  # more than one chunk
    batch = Reader(spec).read(Request(ids, 2))
    for row, sample in enumerate(ids.tolist()):
        np.testing.assert_array_equal(
            batch.images[row], render(spec.views, IMAGES[sample], sample, 2)
        )
    again = Reader(pickle.loads(pickle.dumps(spec))).read(Request(ids[5:9], 2))
    np.testing.assert_array_equal(again.images, batch.images[5:9])


def test_ids_of_a_selection_are_its_rows(shards, tmp_path):
    rows = np.array([3, 9, 10, 38])
    index(shards, progress=False).select(rows).save(tmp_path / "few.arrow")
    batch = Reader(ReaderSpec(str(tmp_path / "few.arrow"), ViewSpec("none", 32))).read(
        Request(np.array([3, 1]), CLEAN)
    )
    np.testing.assert_array_equal(batch.images, IMAGES[[38, 9]])
    np.testing.assert_array_equal(batch.labels, [38 % 6, 9 % 6])


def test_corrupt_samples_are_black_marked_and_named(shards):
    spec = spec_of(shards)
    manifest = Manifest.load(spec.manifest)
    for sample in (5, 35):
        with open(manifest.shards[int(manifest.shard_N[sample])].path, "r+b") as file:
            file.seek(int(manifest.offset_N[sample]))
            file.write(b"no image")
    batch = Reader(spec).read(Request(np.arange(39, -1, -1), CLEAN))
    wrong = np.isin(batch.ids, (5, 35))
    np.testing.assert_array_equal(batch.valid, ~wrong)
    assert not batch.images[wrong].any()
    np.testing.assert_array_equal(batch.images[~wrong], IMAGES[batch.ids[~wrong]])
    np.testing.assert_array_equal(batch.labels, batch.ids % 6)
    assert len(batch.problems) == 2
    for sample, problem in zip((35, 5), batch.problems, strict=True):
        assert problem.startswith(f"{shards[sample // 8]}: {manifest.key(sample)}: ")


def test_an_image_too_narrow_to_resize_is_corrupt_in_its_place(tmp_path, monkeypatch):
    monkeypatch.setattr(viewing, "MAX_PIXELS", 32 * 32 * 50)
    images = [IMAGES[0], np.zeros((2, 300, 3), np.uint8), IMAGES[1], IMAGES[2]]
    members = [(f"k{i}.png", encode_image(image)) for i, image in enumerate(images)]
    members[2] = ("k2.png", b"no image")
    labelled = [m for i, member in enumerate(members) for m in (member, (f"k{i}.cls", b"0"))]
    spec = spec_of([write_tar(tmp_path / "s" / "a.tar", labelled)])
    batch = Reader(spec).read(Request(np.arange(4), CLEAN))
    assert batch.valid.tolist() == [True, False, False, True]
    assert [problem.split(": ")[1] for problem in batch.problems] == ["k1", "k2"]
    assert "too narrow" in batch.problems[0]
    np.testing.assert_array_equal(batch.images[3], IMAGES[2])
    assert not batch.images[1:3].any()


@pytest.mark.parametrize("damage", ["missing", "truncated", "grown", "folder"])
def test_a_wrong_shard_is_refused_every_time(shards, damage):
    reader = Reader(spec_of(shards))
    bad = shards[2]
    if damage in ("missing", "folder"):
        bad.unlink()
        if damage == "folder":
            bad.mkdir()
    else:
        os.truncate(bad, bad.stat().st_size + (-600 if damage == "truncated" else 512))
    for _ in range(2):  # the handle of a refused shard is not cached
        with pytest.raises(UserError) as caught:
            reader.read(Request(np.array([1, 16, 2]), CLEAN))
        assert caught.value.where == str(bad)
        assert "missing, truncated or changed" in caught.value.what
        assert caught.value.remedy
    assert str(bad) not in open_files()
    assert reader.read(Request(np.array([1, 30]), CLEAN)).valid.all()


@pytest.mark.parametrize("left", [-5000, 0, 1, -1], ids=str)
def test_a_shard_cut_while_it_is_open(shards, left):
    """Truncated before the sample, at its first byte, after that byte, or one byte before its end."""
    reader = Reader(spec_of(shards))
    assert reader.read(Request(np.array([16]), CLEAN)).valid.all()
    start, size = int(reader.manifest.offset_N[23]), int(reader.manifest.size_N[23])
    os.truncate(shards[2], start + (size - 1 if left == -1 else left))
    with pytest.raises(UserError, match="ends early") as caught:
        reader.read(Request(np.array([23]), CLEAN))
    assert caught.value.where == str(shards[2])


def test_a_read_error_names_the_shard(shards, monkeypatch):
    reader = Reader(spec_of(shards))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(shard_files.os, "pread", fail)
    with pytest.raises(UserError, match="Input/output error") as caught:
        reader.read(Request(np.array([0]), CLEAN))
    assert caught.value.where == str(shards[0])


def open_files() -> set[str]:
    """Files that this process has open; empty if /proc is missing."""
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        return set()
    return {os.readlink(folder / n) for n in os.listdir(folder) if (folder / n).is_symlink()}


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_open_shards_are_bounded_and_closed(shards, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN_SHARDS", 2)
    reader = Reader(spec_of(shards))
    for sample in (0, 8, 16, 9, 24, 1, 39):
        batch = reader.read(Request(np.array([sample]), CLEAN))
        np.testing.assert_array_equal(batch.images[0], IMAGES[sample])
        assert len(open_files() & {str(path) for path in shards}) <= 2
    reader.close()
    assert not open_files() & {str(path) for path in shards}
    assert reader.read(Request(np.array([4]), CLEAN)).valid.all()  # opens again


def test_shards_in_use_stay_open(shards, monkeypatch):
    monkeypatch.setattr(shard_files, "OPEN_SHARDS", 2)
    reader = Reader(spec_of(shards))
    opened = []
    plain = os.open
    monkeypatch.setattr(shard_files.os, "open", lambda p, *a: (opened.append(p), plain(p, *a))[1])
    for sample in (0, 8, 1, 16, 2, 24, 3):  # the first shard is always among the last two used
        reader.read(Request(np.array([sample]), CLEAN))
    assert opened == [str(shards[i]) for i in (0, 1, 2, 3)]


def test_nothing_but_corrupt_samples(tmp_path):
    members = [(f"k{i}.{s}", b"0") for i in range(35) for s in ("cls", "jpg")]
    spec = spec_of([write_tar(tmp_path / "s" / "a.tar", members)], ViewSpec("crop_flip", 32))
    batch = Reader(spec).read(Request(np.arange(35), 1))
    assert not batch.valid.any()
    assert not batch.images.any()
    assert [problem.split(": ")[1] for problem in batch.problems] == [f"k{i}" for i in range(35)]


@pytest.mark.parametrize("ids", [[-1], [40], [3, 99]])
def test_ids_outside_the_manifest(shards, ids):
    with pytest.raises(IndexError, match="of 40"):
        Reader(spec_of(shards)).read(Request(np.array(ids), CLEAN))


def test_a_missing_manifest(tmp_path):
    with pytest.raises(UserError, match="no manifest"):
        Reader(ReaderSpec(str(tmp_path / "none.arrow"), ViewSpec("none", 32)))
