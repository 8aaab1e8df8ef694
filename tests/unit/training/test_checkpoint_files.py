"""Checkpoints as folders: published atomically, found complete or not at all, pruned in order.

Without an engine: the shares are a few bytes; the rules are those of ``checkpoint/folder.py``.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cnn2gnn_dist import ledger
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.training.checkpoint import folder as disk
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints

STATE = {"format": disk.FORMAT, "run_id": "r", "step": 0, "extra": {}, "about": {}}


def publish(root: Path, step: int, ranks: int = 2) -> Path:
    """A checkpoint of two tensors per rank, as ranks leave it."""
    final = disk.path_of(root, step)
    work = final.with_name(final.name + ".tmp")
    work.mkdir(parents=True)
    files = []
    for rank in range(ranks):
        share, own = (work / f"rank-{rank:05d}-of-{ranks:05d}.{s}" for s in ("safetensors", "json"))
        names = (f"w/a{rank}", f"b/b{rank}", f"m/a{rank}", f"v/a{rank}")
        save_file({name: torch.full((2,), float(step + rank)) for name in names}, share)
        own.write_text(json.dumps({"rank": rank}))
        files += [disk.describe(share), disk.describe(own)]
    disk.publish(work, final, {**STATE, "step": step}, files)
    return final


def steps(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in disk.all_of(root)]


def test_what_is_published_is_whole_and_reads_back(tmp_path):
    final = publish(tmp_path, 7)
    assert final.name == "step-00000007"
    assert disk.damage(final) is None
    assert (tmp_path / "latest").read_text() == final.name
    listed = json.loads((final / "manifest.json").read_text())
    assert listed["format"] == disk.FORMAT
    on_disk = {p.name: p.stat().st_size for p in final.iterdir() if p.name != "manifest.json"}
    assert {name: size for name, (size, _) in listed["files"].items()} == on_disk
    assert disk.read_state(final)["step"] == 7
    assert disk.read_owns(final) == [{"rank": 0}, {"rank": 1}]
    tensors = disk.read_tensors(final)
    assert sorted(tensors) == sorted(
        f"{k}{r}" for k in ("w/a", "b/b", "m/a", "v/a") for r in (0, 1)
    )
    weights = disk.load_weights(final)
    assert {name: t.tolist() for name, t in weights.items()} == {
        "a0": [7.0, 7.0], "b0": [7.0, 7.0], "a1": [8.0, 8.0], "b1": [8.0, 8.0],
    }  # fmt: skip
    assert not list(tmp_path.glob("*.tmp"))


def test_files_that_the_manifest_does_not_name_are_not_read(tmp_path):
    final = publish(tmp_path, 1)
    save_file({"w/a9": torch.ones(1)}, final / "rank-00009-of-00010.safetensors")
    (final / "rank-00009-of-00010.json").write_text("{}")
    assert disk.damage(final) is None
    assert "a9" not in disk.load_weights(final)
    assert len(disk.read_owns(final)) == 2


def test_answers_come_from_the_averages_where_there_are_any():
    weights = {
        name: torch.tensor([float(i)]) for i, name in enumerate(("w/one", "w/two", "b/mean"))
    }
    assert disk.answering({**weights, "own-0/mean": torch.tensor([6.0])}) == weights
    averages = {"a/one": torch.tensor([7.0]), "c/mean": torch.tensor([9.0])}
    others = {"m/one": torch.tensor([5.0]), "own-0/b/mean": torch.tensor([6.0])}
    found = disk.answering({**weights, **averages, **others})
    assert {name: tensor.item() for name, tensor in found.items()} == {
        "w/one": 7.0,
        "w/two": 1.0,
        "b/mean": 9.0,
        "a/one": 7.0,
        "c/mean": 9.0,
        "m/one": 5.0,
    }


def test_a_finished_training_names_its_last_checkpoint(tmp_path):
    assert disk.recorded(tmp_path) is None
    assert disk.root_of(tmp_path) == tmp_path / "checkpoints"
    for step in (3, 5):
        publish(tmp_path / "checkpoints", step)
    last = disk.path_of(tmp_path / "checkpoints", 3)
    entry = ledger.Entry("key", {}, outputs=ledger.outputs(tmp_path, list(last.iterdir())))
    ledger.finish(tmp_path, entry)
    assert disk.recorded(tmp_path) == last
    both = [*last.iterdir(), *disk.path_of(tmp_path / "checkpoints", 5).iterdir()]
    ledger.finish(tmp_path, replace(entry, outputs=ledger.outputs(tmp_path, both)))
    assert disk.recorded(tmp_path) is None
    ledger.finish(tmp_path, replace(entry, outputs=()))
    assert disk.recorded(tmp_path) is None


def test_every_file_counts_for_the_whole(tmp_path):
    names = [path.name for path in publish(tmp_path, 0).iterdir()]
    for number, name in enumerate(names, 1):
        final = publish(tmp_path, number)
        (final / name).unlink()
        assert disk.damage(final) is not None, name
        again = publish(tmp_path / "again", number)
        data = bytearray((again / name).read_bytes())
        data[len(data) // 2] ^= 1  # same length: the checksum has to notice
        (again / name).write_bytes(data)
        assert disk.damage(again) is not None, name


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"files": 3}', '{"files": {"state.json": 7}}', '{"files": {"x": [1, "a"]}}']
)  # fmt: skip
def test_a_manifest_of_another_form_is_damage(tmp_path, text):
    final = publish(tmp_path, 3)
    (final / "manifest.json").write_text(text)
    assert disk.damage(final) is not None


def test_a_step_that_is_published_again_replaces_the_first(tmp_path):
    publish(tmp_path, 4)
    (disk.path_of(tmp_path, 4) / "mark").touch()
    final = publish(tmp_path, 4)
    assert not (final / "mark").exists()
    assert disk.damage(final) is None
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000004"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_pruning_leaves_the_last_and_the_best(tmp_path, keep):
    for step in (1, 2, 3, 4, 5):
        publish(tmp_path, step)
    (tmp_path / "best").write_text("step-00000002\n")
    (tmp_path / "step-00000006.tmp").mkdir()
    disk.prune(tmp_path, disk.path_of(tmp_path, 5), keep)
    assert steps(tmp_path) == sorted({2, *range(6 - keep, 6)})
    assert not (tmp_path / "step-00000006.tmp").exists()
    assert disk.best_of(tmp_path) == disk.path_of(tmp_path, 2)


def test_pruning_counts_from_the_step_just_written(tmp_path):
    """In a run that fell back, a checkpoint ahead of it is deleted if corrupt and kept if complete."""
    for step in (1, 2, 3, 8, 9):
        publish(tmp_path, step)
    (disk.path_of(tmp_path, 9) / "state.json").unlink()
    disk.prune(tmp_path, disk.path_of(tmp_path, 3), 2)
    assert steps(tmp_path) == [2, 3, 8]


def test_best_is_what_the_note_names_and_is_there(tmp_path):
    assert disk.best_of(tmp_path) is None
    (tmp_path / "best").write_text("step-00000009")
    assert disk.best_of(tmp_path) is None
    publish(tmp_path, 9)
    assert disk.best_of(tmp_path) == disk.path_of(tmp_path, 9)
    (disk.path_of(tmp_path, 9) / "manifest.json").unlink()
    assert disk.best_of(tmp_path) is None


def test_only_folders_named_so_are_checkpoints(tmp_path):
    publish(tmp_path, 12)
    publish(tmp_path, 3)
    (tmp_path / "step-00000099").write_text("a file")
    (tmp_path / "step-00000013.tmp").mkdir()
    (tmp_path / "steps").mkdir()
    assert steps(tmp_path) == [3, 12]


def test_the_newest_whole_one_is_the_latest(tmp_path, capsys, console):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    checkpoints = Checkpoints(tmp_path, "r")
    assert checkpoints.latest() == disk.path_of(tmp_path, 3)
    assert capsys.readouterr().err == ""
    (disk.path_of(tmp_path, 3) / "rank-00001-of-00002.json").unlink()
    assert checkpoints.latest() == disk.path_of(tmp_path, 2)
    assert "step-00000003" in capsys.readouterr().err
    assert Checkpoints(tmp_path / "none", "r").latest() is None


def test_what_is_no_checkpoint_or_of_another_format_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        disk.read_state(tmp_path)
    final = publish(tmp_path, 2)
    for text in ("{", "[]", '{"step": 1}'):
        (final / "state.json").write_text(text)
        with pytest.raises(UserError, match="not a checkpoint"):
            disk.read_state(final)
    for number in (disk.FORMAT + 1, disk.FORMAT - 1):
        (final / "state.json").write_text(json.dumps({**STATE, "format": number}))
        with pytest.raises(UserError, match=f"format {number}"):
            disk.read_state(final)


def test_an_unreadable_share_is_named(tmp_path):
    final = publish(tmp_path, 2)
    (final / "rank-00000-of-00002.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="can't be read") as caught:
        disk.read_tensors(final)
    assert caught.value.where.endswith("rank-00000-of-00002.safetensors")


def mark(folder: Path, text: str) -> None:
    """Make two checkpoints of a step distinguishable, by a file that no manifest names."""
    (folder / "who").write_text(text)


def cut_off(root: Path, *, final: str, work: str, aside: str) -> Path:
    """What a kill may leave when step 4 is published again: each folder is complete, partial or absent."""
    for name, how in (("", final), (".tmp", work), (disk.ASIDE, aside)):
        if how == "absent":
            continue
        made = publish(root / "elsewhere", 4)
        mark(made, name or "final")
        if how == "torn":
            (made / "state.json").unlink()
        made.rename(root / f"step-00000004{name}")
    return disk.path_of(root, 4)


@pytest.mark.parametrize(
    ("final", "work", "aside", "kept"),
    [
        ("absent", "whole", "whole", ".tmp"),  # between the two renames
        ("absent", "torn", "whole", disk.ASIDE),
        ("absent", "absent", "whole", disk.ASIDE),
        ("whole", "absent", "whole", "final"),  # after both
        ("torn", "absent", "whole", disk.ASIDE),
        ("torn", "whole", "torn", ".tmp"),
    ],
)
def test_a_kill_while_publishing_again_leaves_one_whole(tmp_path, final, work, aside, kept):
    at = cut_off(tmp_path, final=final, work=work, aside=aside)
    disk.recover(tmp_path)
    assert disk.damage(at) is None
    assert (at / "who").read_text() == kept
    assert not (tmp_path / f"step-00000004{disk.ASIDE}").exists()


def test_the_first_is_there_until_the_second_has_its_name(tmp_path, monkeypatch):
    """A kill right before the rename of an actual publication, not a state built by hand."""
    publish(tmp_path, 4)
    at, rename = disk.path_of(tmp_path, 4), os.rename

    def killed(source, target):
        if target == at:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(disk.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 4)
    monkeypatch.undo()
    disk.recover(tmp_path)
    assert disk.damage(at) is None


def test_recovering_touches_nothing_else(tmp_path):
    publish(tmp_path, 3)
    mark(disk.path_of(tmp_path, 3), "3")
    at = cut_off(tmp_path, final="torn", work="torn", aside="torn")
    disk.recover(tmp_path)  # no complete one to fall back to: everything is kept for inspection
    assert (at / "who").read_text() == "final"
    assert (tmp_path / f"step-00000004{disk.ASIDE}").is_dir()
    assert (disk.path_of(tmp_path, 3) / "who").read_text() == "3"
    disk.prune(tmp_path, disk.path_of(tmp_path, 3), 1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000003"]
