"""Graph versions: several writers, one reader, nothing incomplete."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.graph.version import (
    MANIFEST,
    WORK_FOLDER,
    GraphWriter,
    latest_version,
    open_version,
    prune,
)
from tests.support.graphs import random_table

N, D, DIM, M = 40, 6, 3, 4


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(N, D)).astype(np.float16),
        "z": rng.normal(size=(N, DIM)).astype(np.float32),
        "labels": rng.integers(-1, 5, N).astype(np.int32),
        "candidates": random_table(N, M, 0),
        "part": rng.integers(0, 3, N).astype(np.int32),
    }


def write(root, number: int = 3) -> dict[str, np.ndarray]:
    """Write a version by two writers, half of the rows each."""
    made = arrays()
    shapes = {name: (a.shape, a.dtype.type) for name, a in made.items()}
    GraphWriter.create(root, number, shapes)
    for start, stop in ((20, N), (0, 20)):
        writer = GraphWriter.open(root, number)
        for name, array in made.items():
            writer.rows(name, start, array[start:stop])
    for number_of_part in range(3):
        part = partition.build_part(made["candidates"], made["part"], number_of_part)
        part.save(writer.path / f"part-{number_of_part:02d}")
    assert latest_version(root) is None or latest_version(root).name != f"v{number:04d}"
    writer.finalise({"key": "k", "nodes": N})
    return made


def test_what_two_ranks_wrote_is_read_as_one(tmp_path):
    made = write(tmp_path)
    version = open_version(latest_version(tmp_path))
    version.verify()
    assert version.meta == {"key": "k", "nodes": N}
    for name, array in made.items():
        np.testing.assert_array_equal(getattr(version, name), array)
    with pytest.raises(AttributeError):
        version.features  # noqa: B018


def test_unfinished_versions_do_not_exist_and_are_cleared(tmp_path):
    write(tmp_path, 1)
    shapes = {"x": ((N, D), np.float16)}
    GraphWriter.create(tmp_path, 2, shapes)
    assert latest_version(tmp_path).name == "v0001"
    write(tmp_path, 5)
    prune(tmp_path, tmp_path / "v0005", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["v0005"]


def test_damage(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    file = tmp_path / "v0002" / "z.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match=r"z\.npy.*checksum"):
        open_version(tmp_path / "v0002").verify()
    file.write_bytes(data[:-8])
    with pytest.raises(UserError, match=r"z\.npy is missing or incomplete"):
        open_version(tmp_path / "v0002")
    assert latest_version(tmp_path).name == "v0001"


def test_pruning_spares_the_last_whole_version(tmp_path):
    for number in (1, 2, 3):
        write(tmp_path, number)
    (tmp_path / "v0003" / "z.npy").write_bytes(b"")
    prune(tmp_path, tmp_path / "v0003", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["v0002"]
    prune(tmp_path, tmp_path / "v0003", 0)
    assert latest_version(tmp_path).name == "v0002"


def test_the_version_just_built_stays_and_a_lost_future_goes(tmp_path):
    """A run that fell back to an older checkpoint builds version 2 although 3 and 5 exist."""
    for number in (1, 3, 5):
        write(tmp_path, number)
    write(tmp_path, 2)
    prune(tmp_path, tmp_path / "v0002", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v0001", "v0002"]
    prune(tmp_path, tmp_path / "v0002", 1)
    assert latest_version(tmp_path).name == "v0002"


def test_a_version_that_cannot_be_removed_yet_does_not_count(tmp_path, monkeypatch):
    """As on NFS, while a process of this host maps its arrays."""

    def busy(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    for number in (1, 2, 3):
        write(tmp_path, number)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", busy)
        prune(tmp_path, tmp_path / "v0002", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v0001", "v0002", "v0003"]
    assert latest_version(tmp_path).name == "v0002"
    prune(tmp_path, tmp_path / "v0002", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["v0002"]


@pytest.mark.parametrize("start", [-1, N - 1, N, N + 5])
def test_rows_outside_an_array_are_refused(tmp_path, start):
    writer = GraphWriter.create(tmp_path, 1, {"x": ((N, D), np.float16)})
    count = 2 if start == N - 1 else 1  # numpy would broadcast one row over none
    with pytest.raises(IndexError, match="x: rows"):
        writer.rows("x", start, np.ones((count, D)))
    writer.rows("x", N - 1, np.ones((1, D)))
    np.testing.assert_array_equal(writer.array("x")[N - 2 :], [[0] * D, [1] * D])


@pytest.mark.parametrize("text", ["", "[]", "3", "null", '{"files": {"x.npy": 1}, "meta": {}}'])
def test_a_manifest_of_another_form_is_refused(tmp_path, text):
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "v0002" / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="no valid manifest"):
        open_version(tmp_path / "v0002")
    assert latest_version(tmp_path).name == "v0001"


def test_a_file_that_went_after_opening(tmp_path):
    write(tmp_path, 1)
    version = open_version(tmp_path / "v0001")
    (tmp_path / "v0001" / "x.npy").unlink()
    with pytest.raises(UserError, match=r"x\.npy is missing"):
        version.verify()


def test_verify_finds_a_flipped_byte_in_every_file(tmp_path):
    write(tmp_path, 1)
    version = open_version(tmp_path / "v0001")
    files = [p for p in version.path.rglob("*") if p.is_file() and p.name != MANIFEST]
    assert len(files) == 5 + 3 * 3
    for file in files:
        good = file.read_bytes()
        for place in (0, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(UserError, match="checksum does not match") as raised:
                open_version(version.path).verify()
            assert str(file.relative_to(version.path)) in raised.value.what
        file.write_bytes(good)
    version.verify()


def test_a_cut_anywhere_makes_a_version_not_exist(tmp_path):
    write(tmp_path, 1)
    write(tmp_path, 2)
    for file in [p for p in (tmp_path / "v0002").rglob("*") if p.is_file()]:
        good = file.read_bytes()
        for kept in (0, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:kept])
            with pytest.raises(UserError):
                open_version(tmp_path / "v0002")
            assert latest_version(tmp_path).name == "v0001"
        file.unlink()
        assert latest_version(tmp_path).name == "v0001"
        file.write_bytes(good)
    assert latest_version(tmp_path).name == "v0002"


def test_writers_see_each_others_rows_before_the_end(tmp_path):
    GraphWriter.create(tmp_path, 1, {"z": ((4, 2), np.float32)})
    one, two = (GraphWriter.open(tmp_path, 1) for _ in range(2))
    one.rows("z", 2, np.full((2, 2), 3.0))
    np.testing.assert_array_equal(two.array("z"), [[0, 0], [0, 0], [3, 3], [3, 3]])
    two.rows("z", 0, np.full((2, 2), 5.0))
    np.testing.assert_array_equal(one.array("z"), [[5, 5], [5, 5], [3, 3], [3, 3]])
    assert latest_version(tmp_path) is None


def test_a_second_attempt_starts_from_nothing_and_replaces(tmp_path):
    old = write(tmp_path, 1)
    GraphWriter.create(tmp_path, 1, {"junk": ((3,), np.int32)})
    assert latest_version(tmp_path).name == "v0001"  # complete until it is replaced
    np.testing.assert_array_equal(open_version(tmp_path / "v0001").z, old["z"])
    fresh = GraphWriter.create(tmp_path, 1, {"z": ((2, 2), np.float32)})
    assert [path.name for path in fresh.path.iterdir()] == ["z.npy"]
    fresh.finalise({"again": True})
    version = open_version(tmp_path / "v0001")
    assert version.meta == {"again": True}
    assert version.z.shape == (2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["v0001"]


def test_an_attempt_goes_on_only_if_it_is_the_same(tmp_path):
    shapes = {"z": ((4, 2), np.float32)}
    first = GraphWriter.create(tmp_path, 1, shapes, "weights of step 7")
    first.rows("z", 1, np.ones((1, 2)))
    (first.path / WORK_FOLDER).mkdir()
    again = GraphWriter.create(tmp_path, 1, shapes, "weights of step 7")
    np.testing.assert_array_equal(again.array("z")[1], [1, 1])
    other = GraphWriter.create(tmp_path, 1, shapes, "weights of step 8")
    np.testing.assert_array_equal(other.array("z"), np.zeros((4, 2)))
    (other.path / WORK_FOLDER).mkdir()
    made = other.finalise({})
    assert sorted(path.name for path in made.iterdir()) == ["manifest.json", "z.npy"]
