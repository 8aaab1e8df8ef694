"""What is left of a forgotten image in a memory: nothing, whenever a process is killed and whatever holds files."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects

from cnn2gnn_dist.data.index.relabel import read_relabel
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.memory import edits, store
from cnn2gnn_dist.inference.memory.view import Memory, forgotten
from tests.unit.inference.test_memory import added_rows, edit


def test_forgetting_leaves_nothing_of_an_image_on_disk(model):
    root = model.memory.root
    key, row = "img-7", 7
    traces = [
        model.memory.x(np.array([row])).tobytes(),
        model.memory.z(np.array([row])).tobytes(),
        model.memory.thumbnail(row),
    ]
    edit(model, lambda one: one.add(added_rows(model)))
    rows = len(model.memory)
    edits.forget(root, [key])
    files = [path for path in root.rglob("*") if path.is_file()]
    for path in files:
        data = path.read_bytes()
        assert not any(trace in data for trace in traces), path
        assert key.encode() + b"," in data or path.name != store.FORGOTTEN
    assert forgotten(root) == [key]
    model.reload()
    assert key not in model.memory.keys(model.memory.live_ids)
    assert len(model.memory.base_table) == len(model.memory) == rows - 1
    edits.forget(root, ["img-8"])
    assert forgotten(root) == ["img-7", "img-8"]


def test_forgetting_an_unknown_key_beside_a_known_one_changes_nothing(model):
    root = model.memory.root
    with pytest.raises(UserError, match="1 of 2 keys is not in the memory: img-2x"):
        editing.forget(model, ["img-1", "img-2x"])
    assert not forgotten(root)
    assert store.head(root) == 0


def test_an_image_that_was_removed_before_can_be_forgotten(model):
    root, thumbnail = model.memory.root, model.memory.thumbnail(7)
    editing.remove(model, ["img-7"])
    editing.forget(model, ["img-7", "img-8"])
    assert not any(thumbnail in file.read_bytes() for file in root.rglob("*") if file.is_file())
    assert forgotten(root) == ["img-7", "img-8"]
    assert len(model.memory) == 38


def test_a_forgotten_image_does_not_come_back_by_undo_after_a_kill(model, monkeypatch):
    root = model.memory.root
    monkeypatch.setattr(edits, "_compact", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        edits.forget(root, ["img-7"])
    with pytest.raises(UserError, match="nothing to undo"):
        edits.undo(root)
    monkeypatch.undo()
    edits.forget(root, ["img-7"])  # the same command completes what was interrupted
    assert forgotten(root) == ["img-7"]
    assert "img-7" not in store.keys_on_disk(root)


def test_nothing_of_a_forgotten_image_stays_after_a_kill_and_another_edit(model, monkeypatch):
    """Stop at every name that is replaced or deleted: once the image is in no version, the next edit finishes."""
    compacted, stop_at, trace = 0, 0, model.memory.x(np.array([7])).tobytes()
    while True:
        folder = model.folder.with_name(f"m{stop_at}")
        shutil.copytree(model.folder, folder)
        root, calls = folder / "memory", iter(range(1000))
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "rmdir"):
                patch.setattr(os, name, _stopping(getattr(os, name), calls, stop_at))
            try:
                edits.forget(root, ["img-7"])
            except KeyboardInterrupt:
                pass
            else:
                break
        if store.read_version(root, store.head(root)).segments[0][1] == 39:
            compacted += 1
            editing.remove(Classifier.open(folder, device="cpu"), ["img-9"])
            assert "img-7" not in store.keys_on_disk(root)
            assert not any(trace in path.read_bytes() for path in root.rglob("*.npy"))
            assert not list(root.glob("*/*.tmp"))
        stop_at += 1
    assert compacted > 10


def _stopping(real, calls, stop_at):
    def stop(*arguments, **options):
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    return stop


def test_an_undone_edit_after_a_compaction_stays(model):
    edits.compact(model.memory.root)
    edit(model, lambda one: one.add(added_rows(model)))
    undone = store.head(model.memory.root)
    edits.undo(model.memory.root)
    editing.remove(model, ["img-1"])
    assert "new-1" in store.keys_on_disk(model.memory.root)
    assert len(Memory.open(model.memory.root, undone)) == 44


def test_forgetting_where_files_in_use_can_not_be_deleted(model, tmp_path, monkeypatch):
    """As on NFS: an unlinked file that is mapped gets another name, and its folder can't be removed."""

    def unlink(path, *, dir_fd=None, real=os.unlink):
        name = os.path.basename(path)
        if name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        if not name.endswith(".npy"):
            return real(path, dir_fd=dir_fd)
        other = os.path.join(os.path.dirname(path), f".nfs{name}")
        return os.rename(path, other, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    root, trace = model.memory.root, model.memory.x(np.array([7])).tobytes()
    editing.remove(model, ["img-9"])
    editing.forget(model, ["img-7"])
    assert len(model.memory) == 38
    assert len(list(root.glob("*/*.tmp"))) >= 2
    assert store.numbers(root) == [store.head(root)]
    editing.remove(model, ["img-1"])  # still in use, and no obstacle
    model.save_pretrained(tmp_path / "copy")
    assert not any(
        trace in path.read_bytes() for path in (tmp_path / "copy").rglob("*") if path.is_file()
    )
    monkeypatch.undo()
    editing.remove(model, ["img-2"])
    assert not any(trace in path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert not list(root.glob("*/*.tmp"))


def test_what_was_forgotten_is_a_relabel_list_that_other_images_pass(model):
    editing.forget(model, ["img-7"])
    found = read_relabel(model.memory.root / store.FORGOTTEN)
    assert found["img-7"].name is None
    assert not found["img-7"].required


def test_an_upload_leaves_nothing_of_an_earlier_memory_in_the_repository(model, monkeypatch):
    """The Hub's client alone would only add files. Its network is left out: what is here is how it deletes."""
    there = {".gitattributes", "memory/notes.txt", "calibration.npz", "extra/a.bin"}

    def upload(api, *, folder_path, delete_patterns, **_):
        there.difference_update(filter_repo_objects(list(there), allow_patterns=delete_patterns))
        there.update(
            path.relative_to(folder_path).as_posix()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        )
        return "commit"

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: SimpleNamespace(repo_id="me/m"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert model.push_to_hub("me/m") == "commit"
    first = {path for path in there if path.startswith("memory/segments")}
    assert first
    editing.forget(model, ["img-7"])
    model.push_to_hub("me/m", delete_patterns="extra/*")
    assert there.isdisjoint(first)
    kept = (".gitattributes", "memory/notes.txt")
    own = {
        path.relative_to(model.folder).as_posix()
        for path in model.folder.rglob("*")
        if path.is_file() and path.name != store.LOCK
    }
    assert there == own.union(kept)
