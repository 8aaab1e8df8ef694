"""Checkpoints of ranks on hosts that share no folder: waiting for uploads, and when earlier ones go."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from cnn2gnn_dist.run_storage.depot import StoreDepot
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import host_folders
from cnn2gnn_dist.training.checkpoint import folder as disk
from cnn2gnn_dist.training.checkpoint import separate as separate_checkpoints
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints, _Writing
from tests.support import own_folders, rank_group
from tests.support.stored import s3_bucket

TIMEOUT_S = 3.0


class Store:
    """Takes so many seconds for a file."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def start(self) -> None: ...

    def wait(self) -> None: ...

    def outcomes(self) -> list[str | None]:
        return []

    def note_sent(self, checkpoint: str, files: list[disk.File]) -> None: ...

    def send(self, checkpoint: str, path: Path, file: disk.File) -> None:
        time.sleep(self.seconds)  # the length of the fault


def write(checkpoints: Checkpoints, step: int) -> None:
    """Let a save of this rank's share begin, which ``settle`` waits for."""
    rank = collectives.rank()
    work = disk.path_of(checkpoints.folder, step).with_suffix(".tmp")
    work.mkdir(parents=True)
    collectives.barrier()
    copies, name = checkpoints.copies, f"rank-{rank:05d}-of-00002"
    state: dict[str, Any] = {"format": disk.FORMAT, "run_id": "run", "step": step}
    checkpoints._writing = _Writing(
        work,
        name,
        {"weights/a": torch.full((3,), float(step))},
        {},
        state,
        False,
        (lambda path, file: copies.send(work.stem, path, file)) if rank else None,
    )


def separate(root: str) -> Path:
    own_folders.believe(("a", "b"))
    host_folders.begin(True)
    return Path(root) / "ab"[collectives.rank()]


def settled_slowly(root: str) -> tuple[str | None, list[str]]:
    """What is reported of a save whose upload takes long, and the checkpoints."""
    checkpoints = Checkpoints(separate(root), "run", copies=Store(0.7 * TIMEOUT_S))  # of two files
    write(checkpoints, 1)
    checkpoints.settle()
    return checkpoints.problem, [path.name for path in disk.all_of(checkpoints.folder)]


def test_an_upload_may_take_longer_than_the_timeout(tmp_path: Path) -> None:
    found = rank_group.launch(settled_slowly, 2, str(tmp_path), group_timeout_s=TIMEOUT_S)
    assert [one.returncode for one in found] == [0, 0], found[0].output[-3000:]
    assert [one.value for one in found] == [(None, ["step-00000001"])] * 2


def failing_on_one(root: str) -> list[tuple[bool, list[str]]]:
    """Of three saves, whether each failed, and the checkpoints; the second can't be published on host b."""
    folder, found = separate(root), []
    checkpoints = Checkpoints(folder, "run", keep_last=1, copies=Store(0))
    for step in (1, 2, 3):
        write(checkpoints, step)
        if step == 2 and collectives.rank() == 1:
            real, disk.publish = disk.publish, refuse
        checkpoints.settle()
        if step == 2 and collectives.rank() == 1:
            disk.publish = real
        found.append((checkpoints.problem is not None, [path.name for path in disk.all_of(folder)]))
    return found


def refuse(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_an_earlier_checkpoint_stays_until_all_hosts_have_the_next(tmp_path: Path) -> None:
    first, second = rank_group.run(failing_on_one, 2, str(tmp_path))
    assert [failed for failed, _ in first] == [False, True, False]
    assert "step-00000001" in first[1][1]  # also where the second was published
    assert second[1][1] == ["step-00000001"]
    assert first[2][1][-1] == second[2][1][-1] == "step-00000003"
    assert "step-00000001" not in first[2][1]


def resumed(root: str, url: str) -> tuple[str, list[str], dict[str, int], bool]:
    """Of three checkpoints, of which host b has lost its share of the first: what a resume leaves on this host."""
    folder = separate(root)
    folder.mkdir()
    os.chdir(folder)  # as on real hosts, all have the same path
    host_folders.use(StoreDepot(url, "run"))
    checkpoints = Checkpoints(Path("run"), "run", keep_last=3, copies=Store(0))
    for step in (1, 2, 3):
        write(checkpoints, step)
        checkpoints.settle()
    first = disk.path_of(Path("run"), 1)
    (Path("run") / disk.BEST).write_text(first.name)
    if collectives.rank() == 1:
        for path in first.glob("rank-00001*"):
            path.unlink()
    collectives.barrier()
    newest = separate_checkpoints.newest(Path("run"))
    assert newest is not None
    before = [path.name for path in disk.all_of(Path("run")) if disk.damage(path) is None]
    separate_checkpoints.complete_older(Path("run"), newest)
    shares = {path.name: len(list(path.glob("rank-*"))) for path in disk.all_of(Path("run"))}
    return newest.name, before, shares, (Path("run") / disk.BEST).exists()


def test_a_resume_completes_older_checkpoints_or_removes_them(tmp_path: Path) -> None:
    with s3_bucket():
        found = rank_group.run(resumed, 2, str(tmp_path), "s3://runs/separate")
    for newest, before, shares, best in found:
        assert newest == "step-00000003"
        assert before == [newest]
        assert shares == {"step-00000002": 4, newest: 4}  # two files of each rank
        assert not best
