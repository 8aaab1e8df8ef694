"""The checkpoint manager, rule by rule, with an engine of one rank in this process.

Quick, because ``benchmarks/mutants.py`` runs these tests for every mutant of the manager.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.training import engine as engines
from cnn2gnn_dist.training.checkpoint import folder as disk
from cnn2gnn_dist.training.checkpoint import manager
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from cnn2gnn_dist.training.engine import Engine
from tests.support import tiny
from tests.support.saves import RUN, extra, newest, state

SHARE = "rank-00000-of-00001"


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A group of this process alone."""
    variables, threads = dict(os.environ), torch.get_num_threads()
    engines.init(Ranks(), "cpu")
    yield
    engines.shutdown()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(variables)


@pytest.fixture
def engine() -> Engine:
    """After two steps."""
    built = tiny.build(0)
    tiny.train(built, range(2))
    return built


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def save(saved: Checkpoints, step: int, engine: Engine, **how: Any) -> None:
    saved.save(step, engine, extra(step), **how)
    saved.settle()


# Saving.


def test_a_save_is_the_whole_state_and_counts_once_it_is_settled(tmp_path, engine):
    root = tmp_path / "run" / "checkpoints"
    saved = Checkpoints(root, RUN, {"seed": 3})
    assert saved.written
    assert not saved.pending
    saved.settle()
    saved.save(2, engine, extra(2), {"rank": 0})
    assert saved.pending
    assert saved.latest() is None
    saved.settle()
    assert saved.written
    assert not saved.pending
    path = saved.finish()
    assert path == saved.latest() == root / "step-00000002"
    assert saved.problem is None
    assert names(root) == ["latest", path.name]
    assert names(path) == ["manifest.json", f"{SHARE}.json", f"{SHARE}.safetensors", "state.json"]
    assert disk.read_state(path) == {
        "format": disk.FORMAT,
        "run_id": RUN,
        "step": 2,
        "optimizer_step": 2.0,
        "world_size": 1,
        "zero_stage": 0,
        "extra": extra(2),
        "about": {"seed": 3},
    }
    assert disk.read_owns(path) == [{"rank": 0}]
    tensors = disk.read_tensors(path)
    parameters = [name for name, _ in engine.module.named_parameters()]
    buffers = [name for name, _ in engine.module.named_buffers()]
    wanted = [f"{kind}/{name}" for kind in "wmv" for name in parameters]
    assert sorted(tensors) == sorted(wanted + [f"b/{name}" for name in buffers])
    for name, tensor in engine.weights().items():
        assert torch.equal(tensors[("b/" if name in buffers else "w/") + name], tensor), name


def test_nothing_private_and_nothing_known_of_the_config_are_empty(tmp_path, engine):
    saved = Checkpoints(tmp_path, RUN)
    save(saved, 2, engine)
    assert disk.read_owns(newest(tmp_path)) == [{}]
    assert disk.read_state(newest(tmp_path))["about"] == {}


def test_the_next_save_settles_the_one_before(tmp_path, engine):
    saved = Checkpoints(tmp_path, RUN)
    saved.save(1, engine, extra(1))
    saved.save(2, engine, extra(2))
    assert newest(tmp_path).name == "step-00000001"
    assert saved.finish().name == "step-00000002"


def test_weights_of_a_step_that_diverged_are_not_saved(tmp_path, engine):
    images, labels = tiny.share(2)
    engine.backward(nn.functional.cross_entropy(engine(images), labels) * float("nan"))
    engine.step_ahead(0.1)
    with pytest.raises(UserError, match="not finite at step 2"):
        Checkpoints(tmp_path, RUN).save(3, engine, extra(3))
    assert names(tmp_path) == []


def test_writing_goes_on_beside_and_is_waited_for(tmp_path, engine, monkeypatch):
    """Tensors are released once they are written; the file is synced before anything names it."""
    release, tensors, synced = threading.Event(), [], []
    write, sync = manager.save_file, durable.sync

    def slow(found: dict[str, torch.Tensor], path: Path) -> None:
        tensors.extend(weakref.ref(tensor) for tensor in found.values())
        release.wait()
        write(found, path)

    def seen(path: Path) -> None:
        synced.append((path.name, newest_of(tmp_path)))
        sync(path)

    def newest_of(root: Path) -> str | None:
        return (root / "latest").read_text() if (root / "latest").exists() else None

    monkeypatch.setattr(manager, "save_file", slow)
    monkeypatch.setattr(durable, "sync", seen)
    saved = Checkpoints(tmp_path, RUN)
    saved.save(2, engine, extra(2))
    assert not saved.written
    assert saved.pending
    (thread,) = [one for one in threading.enumerate() if one.name == "checkpoint"]
    assert thread.daemon
    wait = thread.join

    def join() -> None:  # who waits lets it go on: who does not publishes nothing
        release.set()
        wait()

    monkeypatch.setattr(thread, "join", join)
    saved.settle()
    manifest = json.loads((newest(tmp_path) / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [f"{SHARE}.json", f"{SHARE}.safetensors", "state.json"]
    assert (f"{SHARE}.safetensors", None) in synced
    saved.save(3, engine, extra(3))
    saved._writing.finish()  # type: ignore[union-attr]
    assert saved.written
    assert saved.pending
    assert len(tensors) == 2 * len(disk.read_tensors(newest(tmp_path)))
    assert not [tensor for tensor in tensors if tensor() is not None]
    saved.settle()


def test_as_many_are_kept_as_requested_and_the_best(tmp_path, engine):
    saved = Checkpoints(tmp_path, RUN, keep_last=1)
    for step, best, kept in (
        (1, True, [1]),
        (2, False, [1, 2]),
        (3, False, [1, 3]),
        (4, True, [4]),
    ):
        save(saved, step, engine, best=best)
        assert names(tmp_path) == ["best", "latest", *(f"step-{n:08d}" for n in kept)]
    assert (tmp_path / "best").read_text() == "step-00000004"
    two = Checkpoints(tmp_path / "two", RUN, keep_last=2)
    for step, kept in ((1, [1]), (2, [1, 2]), (3, [2, 3]), (4, [2, 3, 4]), (5, [2, 4, 5])):
        save(two, step, engine, best=step in (1, 2))
        assert names(tmp_path / "two") == ["best", "latest", *(f"step-{n:08d}" for n in kept)]
    assert disk.best_of(tmp_path / "two") == tmp_path / "two" / "step-00000002"
    usual = Checkpoints(tmp_path / "usual", RUN)
    for step in (1, 2, 3):
        save(usual, step, engine)
    assert names(tmp_path / "usual") == ["latest", "step-00000002", "step-00000003"]


def test_shares_are_dealt_by_bytes_largest_first():
    """Weights count three times, since their moments come with them; expected sizes are by hand."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, elements in (("a", 4), ("b", 5), ("c", 1), ("d", 5)):
                self.register_parameter(name, nn.Parameter(torch.zeros(elements)))
            self.register_buffer("e", torch.zeros(13))
            self.register_buffer("f", torch.zeros(2))

    class Holder:
        module = Net()

    # bytes: b 15, d 15, e 13, a 12, c 3, f 2
    expected = {
        1: dict.fromkeys("abcdef", 0),
        2: {"b": 0, "d": 1, "e": 0, "a": 1, "c": 1, "f": 0},
        3: {"b": 0, "d": 1, "e": 2, "a": 2, "c": 0, "f": 1},
    }
    for world_size, shares in expected.items():
        assert manager._shares(Holder(), world_size) == shares  # type: ignore[arg-type]
    Holder.module = tiny.TinyNet()
    every = {name for name, _ in Holder.module.named_parameters()}
    every |= {name for name, _ in Holder.module.named_buffers()}
    for world_size in (1, 2, 3, 50):
        found = manager._shares(Holder(), world_size)  # type: ignore[arg-type]
        assert found.keys() == every
        assert set(found.values()) <= set(range(world_size))


# Failures.


def test_a_save_that_fails_is_reported_and_costs_only_itself(tmp_path, engine, caplog):
    saved = Checkpoints(tmp_path, RUN)
    save(saved, 1, engine)
    (tmp_path / "step-00000002.tmp").mkdir()  # left by a killed attempt: replaced
    (tmp_path / "step-00000002.tmp" / "stale").touch()
    save(saved, 2, engine)
    assert saved.problem is None
    assert not (newest(tmp_path) / "stale").exists()
    with caplog.at_level(logging.ERROR, "cnn2gnn_dist"):
        save(saved, 3, engine, own={"not": object()})
    assert "not JSON serializable" in str(saved.problem)
    assert "checkpoint step-00000003 was not written: Object of type object" in caplog.text
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]
    with pytest.raises(UserError, match="the last checkpoint could not be written") as caught:
        saved.finish()
    assert "not JSON serializable" in caught.value.what
    save(saved, 4, engine)
    assert saved.problem is None
    (tmp_path / "step-00000005.tmp").touch()
    saved.save(5, engine, extra(5))
    assert "File exists" in str(saved.problem)
    assert not saved.pending
    assert newest(tmp_path).name == "step-00000004"
    for _ in range(3):  # any number may fail
        saved.save(5, engine, extra(5))


def test_so_many_in_succession_may_fail(tmp_path, engine):
    saved, bad = Checkpoints(tmp_path, RUN, max_failures=2), {"not": object()}
    save(saved, 1, engine, own=bad)
    save(saved, 2, engine)
    save(saved, 3, engine, own=bad)
    with pytest.raises(UserError, match=r"^2 consecutive checkpoints could not be written: Obj"):
        save(saved, 4, engine, own=bad)
    assert saved.latest() == tmp_path / "step-00000002"


# Loading.


@pytest.fixture
def root(tmp_path, engine):
    """Checkpoints 1 and 2, which have the states after two and three steps."""
    saved = Checkpoints(tmp_path, RUN, {"teacher.lr": 0.1, "gone": 1, "seed": 0})
    save(saved, 1, engine, own={"rank": 0})
    tiny.train(engine, range(2, 3))
    save(saved, 2, engine, own={"rank": 0})
    return tmp_path


def test_the_newest_is_loaded_or_the_one_requested(root, engine):
    other, saved = tiny.build(1, seed=9), Checkpoints(root, RUN)
    loaded = saved.load(other)
    assert loaded is not None
    assert (loaded.extra, loaded.owns) == (extra(2), [{"rank": 0}])
    assert (other.steps, other.deepspeed.global_steps) == (2, 2)
    assert state(other) == state(engine)
    before = tiny.build(0, seed=9)
    loaded = saved.load(before, only=root / "step-00000001")
    assert loaded is not None
    assert (loaded.extra, before.steps) == (extra(1), 1)
    assert state(before) != state(other)
    assert Checkpoints(root / "none", RUN).load(tiny.build(0)) is None


def test_averages_are_loaded_to_answer_but_not_to_go_on(tmp_path):
    averaging = {"engine": {"average": "ema"}}
    trained = tiny.build(0, **averaging)
    for step in range(2):
        images, labels = tiny.share(step)
        trained.backward(nn.functional.cross_entropy(trained(images), labels))
        trained.step(tiny.lr(step), kept=0.5)
    save(Checkpoints(tmp_path, RUN), 2, trained)
    weights = trained.weights()
    with trained.answering():
        average = trained.weights()
    assert not torch.equal(weights["head.weight"], average["head.weight"])
    for answering, wanted in ((False, weights), (True, average)):
        loaded = tiny.build(0, seed=9, **averaging)
        Checkpoints(tmp_path, RUN).load(loaded, answering=answering)
        for name, tensor in loaded.weights().items():
            assert torch.equal(tensor, wanted[name]), (answering, name)


def test_a_damaged_one_is_passed_over_and_one_renamed_aside_is_found(root):
    saved = Checkpoints(root, RUN)
    os.rename(root / "step-00000002", root / "step-00000002.old")
    assert saved.latest() == root / "step-00000002"
    (root / "step-00000002" / "state.json").write_text("{}")
    assert saved.latest() == root / "step-00000001"


def test_another_runs_is_refused_with_what_differs_unless_forced(root, engine):
    other = Checkpoints(root, "another", {"teacher.lr": 0.2, "new": 3, "seed": 0})
    with pytest.raises(UserError) as caught:
        other.load(tiny.build(0, seed=9))
    assert caught.value.what == (
        "this checkpoint belongs to another run or config: gone: 1 -> None; new: None -> 3; "
        "teacher.lr: 0.1 -> 0.2"
    )
    assert caught.value.where == str(root / "step-00000002")
    assert "--force" in caught.value.remedy
    same = Checkpoints(root, "another", {"teacher.lr": 0.1, "gone": 1, "seed": 0})
    with pytest.raises(UserError, match="its inputs differ, not its config"):
        same.load(tiny.build(0))
    forced = tiny.build(0, seed=9)
    assert other.load(forced, force=True) is not None
    assert state(forced) == state(engine)


@pytest.mark.parametrize("stage", [0, 2])
def test_moments_of_another_optimizer_are_left_out(tmp_path, caplog, stage):
    """Adam's first step is at most the learning rate: with SGD's momentum as its mean it would be many times that."""
    trained = tiny.build(stage, optimizer="sgd")
    tiny.train(trained, range(2))
    save(Checkpoints(tmp_path, RUN), 2, trained)
    other = tiny.build(stage, seed=9)
    Checkpoints(tmp_path, "another").load(other, force=True)
    assert "is of another optimizer, whose moments are left out" in caplog.text
    before = other.weights()
    assert torch.equal(before["head.bias"], trained.weights()["head.bias"])
    tiny.train(other, range(2, 3))
    for name in ("head.bias", "norm.weight", "norm2.bias"):  # without decay
        moved = (other.weights()[name] - before[name]).abs().max()
        assert 0 < moved <= 1.001 * tiny.lr(2), name


def test_another_architecture_is_named_with_its_shapes(root):
    wider = tiny.TinyNet()
    wider.register_buffer("zeal", torch.zeros(2))
    without = tiny.TinyNet()
    del without.gate
    without.gate = 0.0
    for model, what in (
        (tiny.TinyNet(width=5), "gate: shape (6,) saved, (5,) expected"),
        (wider, "zeal: shape absent saved, (2,) expected"),
        (without, "gate: shape (6,) saved, absent expected"),
    ):
        with pytest.raises(UserError, match="does not fit the model at") as caught:
            Checkpoints(root, RUN).load(tiny.build(0, model=model), force=True)
        assert what in caught.value.what
        assert caught.value.where == str(root / "step-00000002")
