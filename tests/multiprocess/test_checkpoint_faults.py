"""Checkpoints under faults: kills, corruption, full disks and files of other runs cost at most one save."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training.checkpoint import folder as checkpoint_folder
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from tests.support import REPOSITORY, own_mounts, rank_group, tiny
from tests.support.saves import HALF, RUN, extra, newest, publish, uninterrupted

# --- cases: run on every rank ---------------------------------------------------------------


def saved_through_faults(root: Path) -> dict[str, Any]:
    """A save that fails on rank 1's disk, one whose folder can't be created, and one that succeeds."""
    engine, saved = tiny.build(2), Checkpoints(root, RUN)
    found: dict[str, Any] = {}

    def attempt(what: str, step: int) -> None:
        tiny.train(engine, range(step - 1, step))
        saved.save(step, engine, extra(step))
        saved.settle()
        collectives.barrier()  # rank 0 has removed what failed
        found[what] = (saved.problem, sorted(path.name for path in root.iterdir()))
        collectives.barrier()

    attempt("before", 1)
    everything = resource.getrlimit(resource.RLIMIT_FSIZE)
    if collectives.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, everything[1]))  # EFBIG at 1,000 bytes
    attempt("disk full on rank 1", 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, everything)
    if collectives.rank() == 0:
        (root / "step-00000003.tmp").write_text("in the way")
    attempt("no folder", 3)
    with pytest.raises(UserError, match="the last checkpoint could not be written"):
        saved.finish()
    strict = Checkpoints(root, RUN, max_failures=2)
    strict.save(3, engine, extra(3))
    with pytest.raises(UserError, match="2 consecutive checkpoints could not be written"):
        strict.save(3, engine, extra(3))
    collectives.barrier()
    if collectives.rank() == 0:
        (root / "step-00000003.tmp").unlink()
    attempt("after", 4)
    found["finish"] = saved.finish().name
    return found


def die_when(rank: int, module: Any, name: str, at: Callable[[Path], bool]) -> None:
    """SIGKILL this rank when ``module.name`` is called on a path that ``at`` picks."""
    real = getattr(module, name)

    def killer(path: Path, *rest: Any) -> Any:
        if collectives.rank() == rank and at(Path(path)):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *rest)

    setattr(module, name, killer)


def killed(root: Path, where: str) -> None:
    """Resume from the latest checkpoint, then die at some point while saving the next."""
    engine = tiny.build(2, seed=99)
    saved = Checkpoints(root, RUN)
    loaded = saved.load(engine)
    assert loaded is not None
    assert loaded.extra == extra(engine.steps)
    step = engine.steps
    tiny.train(engine, range(step, step + 1))
    if where == "shard of rank 1":
        die_when(1, durable, "sync", lambda path: path.name.startswith("rank-00001"))
    elif where == "before the manifest":
        die_when(0, durable, "write_json", lambda path: path.name == "manifest.json")
    elif where == "before the rename":
        die_when(0, durable, "sync", lambda path: path.suffix == ".tmp" and path.is_dir())
    saved.save(step + 1, engine, extra(step + 1))
    saved.settle()


# --- tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def first(root: Path) -> None:
    rank_group.run(uninterrupted, 2, root, 0)


def _flip(folder: Path) -> None:
    path = folder / "rank-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    path = folder / "rank-00000-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _lose(folder: Path) -> None:
    (folder / "state.json").unlink()


def _lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"files": ["half')


def _empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (_flip, "rank-00001-of-00002.safetensors is damaged"),
        (_truncate, "rank-00000-of-00002.safetensors is damaged"),
        (_lose, "state.json is missing"),
        (_lose_manifest, "manifest"),
        (_break_manifest, "manifest"),
        (_empty_manifest, "manifest"),
    ],
)
def test_damaged_newest_falls_back_and_is_named(
    root: Path,
    first: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    console: None,
    harm: Callable[[Path], None],
    word: str,
) -> None:
    shutil.copytree(root / "0", tmp_path / "0")
    last = newest(tmp_path / "0")
    harm(last)
    assert newest(tmp_path / "0").name == f"step-{HALF - 1:08d}"
    said = capsys.readouterr().err
    assert last.name in said
    assert word in said


def test_kills_while_saving_cost_that_save_only(root: Path, first: None, tmp_path: Path) -> None:
    folder = tmp_path / "0"
    shutil.copytree(root / "0", folder)
    for where, victim in (("shard of rank 1", 1), ("before the manifest", 0)):
        outcomes = rank_group.launch(killed, 2, folder, where)
        assert outcomes[victim].returncode == -9, outcomes[victim].output
        assert outcomes[1 - victim].returncode not in (0, -9), "the survivor must notice"
        assert newest(folder).name == f"step-{HALF:08d}"
        assert (folder / f"step-{HALF + 1:08d}.tmp").is_dir()
    outcomes = rank_group.launch(killed, 1, folder, "before the rename")
    assert outcomes[0].returncode == -9
    assert newest(folder).name == f"step-{HALF:08d}"
    (folder / "step-00000001.tmp").mkdir()
    rank_group.run(killed, 1, folder, "nowhere")
    assert sorted(p.name for p in folder.iterdir()) == [
        "latest",
        f"step-{HALF:08d}",
        f"step-{HALF + 1:08d}",
    ]


def test_a_save_that_the_disk_refuses_costs_that_save_only(tmp_path: Path) -> None:
    ranks = rank_group.run(saved_through_faults, 2, tmp_path)
    for found in ranks:
        first, last = "step-00000001", "step-00000004"
        assert found["before"] == (None, ["latest", first])
        problem, files = found["disk full on rank 1"]
        assert "File too large" in problem
        assert files == ["latest", first]
        problem, files = found["no folder"]
        assert "File exists" in problem or "Not a directory" in problem
        assert first in files
        assert found["after"] == (None, ["latest", first, last])
        assert found["finish"] == last


@own_mounts.needed
def test_a_disk_that_is_full_or_read_only(tmp_path: Path) -> None:
    """A real full disk: a tmpfs of 96 KiB. The newest complete checkpoint stays, and saving recovers."""
    (tmp_path / "d").mkdir()
    script = REPOSITORY / "tests/support/full_disk.py"
    *well, full, read_only, again = own_mounts.run(str(script), str(tmp_path / "d"))
    assert len(well) >= 2
    assert all(problem is None for _, problem, _ in well)
    last = well[-1][2]
    assert "No space left" in full[1]
    assert "Read-only" in read_only[1]
    assert full[2] == read_only[2] == last == f"step-{len(well):08d}"
    assert again[1:] == [None, f"step-{len(well) + 3:08d}"]


def test_a_damaged_future_does_not_push_out_the_present(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, RUN, keep_last=1)
    for step in (1, 2, 9):
        publish(saved, step)
    _lose(tmp_path / "step-00000009")
    publish(saved, 3)
    checkpoint_folder.prune(tmp_path, tmp_path / "step-00000003", keep_last=1)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000003"]


def killed_at(call: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a separate process that is killed before its n-th rename or removal."""
    child = os.fork()
    if child == 0:
        calls = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **options)

            return wrapped

        for name in ("rename", "replace", "unlink", "rmdir"):
            setattr(os, name, counted(getattr(os, name)))
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_kill_while_a_step_is_published_again_leaves_one_of_the_two(tmp_path: Path) -> None:
    """A kill at any point leaves the old one or the new one, complete; and saving continues from there."""
    points, seen = 0, set()
    while True:
        root = tmp_path / str(points)
        saved = Checkpoints(root, RUN, keep_last=1)
        publish(saved, 5, extra={"which": "old"})

        def again(saved: Checkpoints = saved) -> None:
            publish(saved, 5, extra={"which": "new"})
            checkpoint_folder.prune(saved.folder, saved.folder / "step-00000005", 1)

        killed = killed_at(points, again)
        last = newest(root)
        which = checkpoint_folder.read_state(last)["extra"]["which"]
        assert last.name == "step-00000005"
        assert which == "new" if not killed else which in ("old", "new")
        seen.add(which)
        shutil.rmtree(root / "step-00000006.tmp", ignore_errors=True)
        publish(saved, 6)
        checkpoint_folder.prune(root, root / "step-00000006", 1)
        assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000006"]
        if not killed:
            break
        points += 1
    assert points >= 5
    assert seen == {"old", "new"}


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, RUN)
    publish(saved, 1, format=3)
    with pytest.raises(UserError, match="format 3"):
        saved.load(object())  # type: ignore[arg-type]
