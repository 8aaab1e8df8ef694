"""Files that are replaced as a whole: what is left, and what is reported, when the disk is full."""

from __future__ import annotations

import errno
import json
from pathlib import Path

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
