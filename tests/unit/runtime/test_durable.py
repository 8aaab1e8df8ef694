"""Files that are replaced as a whole: what is left, and what is reported, when the disk is full."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@needs_full
@pytest.mark.parametrize("shared", [False, True])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, shared):
    path = tmp_path / "state.json"
    path.write_text("old")

    def replace() -> None:
        with durable.replacing(path, shared=shared) as temporary:
            temporary.symlink_to(FULL)
            temporary.write_text("x" * 100_000)

    with pytest.raises(UserError, match="disk full") as caught:
        replace()
    assert caught.value.where == str(path)
    assert "free some space" in caught.value.remedy
    assert [found.name for found in tmp_path.iterdir()] == ["state.json"]
    assert path.read_text() == "old"


@needs_full
def test_a_json_file_on_a_full_disk():
    with pytest.raises(UserError, match="disk full"):
        durable.write_json(FULL, ["x" * 100_000])


@needs_full
@pytest.mark.parametrize("count", [3, 900, 2_000_000])
def test_an_array_on_a_full_disk(tmp_path, count):
    (tmp_path / "a.npy").symlink_to(FULL)
    with pytest.raises(UserError, match="disk full"):
        durable.write_array(tmp_path / "a.npy", np.zeros(count, np.float32))


@pytest.mark.parametrize("count", [900, 2_000_000])
def test_an_array_that_fits_in_part_is_an_error_with_its_number(tmp_path, count):
    """``np.save`` cuts the small one off without an error, and the other's error has no number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            durable.write_array(tmp_path / "a.npy", np.zeros(count, np.float32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.empty((0, 5), np.int32),
        np.array(7, np.int64),
        np.array([True, False]),
        np.array(["é", "ab"]),
        np.arange(10)[::2],
    ],
)
def test_an_array_is_written_as_numpy_writes_it(tmp_path, array):
    durable.write_array(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
    turned = np.asfortranarray(np.arange(6).reshape(2, 3))
    durable.write_array(tmp_path / "a.npy", turned)
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), turned)
    with pytest.raises(ValueError, match="object"):
        durable.write_array(tmp_path / "a.npy", np.array([None]))


def test_what_a_killed_process_left_is_removed(tmp_path):
    path = tmp_path / "train-000000.tar"
    path.write_text("old")
    killed = durable.replacing(path, shared=True)
    killed.__enter__().write_text("new")  # and never gets any further
    assert len(list(tmp_path.iterdir())) == 2
    durable.remove_unfinished(tmp_path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_other_errors_are_passed_on(tmp_path):
    with pytest.raises(FileNotFoundError):
        durable.write_text(tmp_path / "none" / "state.json", json.dumps({}))
    for error in (OSError(errno.EIO, "broken"), ValueError("full")):
        assert durable.disk_full(error) is None
    quota = durable.disk_full(OSError(errno.EDQUOT, "quota exceeded", "here"))
    assert quota is not None
    assert (quota.where, quota.exit_code) == ("here", 2)
    assert quota.remedy == "free some space and run the same command again"
    resumed = durable.disk_full(OSError(errno.ENOSPC, "full", "here"), resumes=True)
    assert resumed is not None
    assert resumed.remedy.endswith(": it resumes where it stopped")


def test_a_folder_is_created_by_several_at_once(tmp_path, monkeypatch):
    """Another one with the same process id, as on another host, and one that removes what killed ones left."""
    real, probes = Path.touch, []

    def touch(path, *given, **named):
        real(path, *given, **named)
        probes.append(path.name)
        if len(probes) == 1:
            durable.create_folder(tmp_path / "a")
            durable.remove_unfinished(tmp_path / "a")

    monkeypatch.setattr(Path, "touch", touch)
    durable.create_folder(tmp_path / "a")
    assert len(set(probes)) == 2
    assert not list((tmp_path / "a").iterdir())
