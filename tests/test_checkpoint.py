"""Checkpoints: any ZeRO stage and world size reads any other's; kills and damage cost one save."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import procs
import pytest
import tiny
import torch
from torch import nn

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.training import (
    checkpoint,
    checkpoint_folder,
    distributed,
    named_state,
    random_state,
)
from cnn2gnn_dist.training.checkpoint import Checkpoints
from cnn2gnn_dist.training.checkpoint_folder import load_weights
from cnn2gnn_dist.training.engine import Engine

RUN = "teacher-abc"
HALF, END = 3, 6
PAIRS = [(saved, loaded) for saved in tiny.STAGES for loaded in tiny.STAGES]

pytestmark = pytest.mark.slow


def extra(step: int) -> dict[str, Any]:
    return {"cursor": {"epoch": 1, "batch": step}, "corrupt": {"7": "shard, key"}}


# --- cases: run on every rank ---------------------------------------------------------------


def state(engine: Engine) -> str:
    """Digest of weights, both moments, buffers and Adam's step count."""
    tensors, step = named_state.pull(engine, lambda name: True)
    return f"{step:.0f} {tiny.digest(tensors)}"


def uninterrupted(root: Path, stage: int) -> dict[str, Any]:
    """Six steps with a checkpoint after every one from the second on; what there is to compare."""
    engine = tiny.build(stage)
    saved = Checkpoints(root / str(stage), RUN, keep_last=2)
    losses = tiny.train(engine, range(HALF - 1))
    found: dict[str, Any] = {}
    for step in range(HALF - 1, HALF + 1):
        found["own buffers"] = {n: b.clone() for n, b in engine.module.named_buffers()}
        saved.save(step, engine, extra(step), {"rank": distributed.rank()})
        saved.settle()
        if step < HALF:
            losses += tiny.train(engine, range(step, step + 1))
    found["state"] = state(engine)
    found["next"] = tiny.train(engine, range(HALF, END))
    found["last"] = state(engine)
    return found


def first_run(root: Path) -> dict[int, dict[str, Any]]:
    """Two ranks train and save in every stage."""
    return {stage: uninterrupted(root, stage) for stage in tiny.STAGES}


def resume(root: Path, saved: int, loaded: int) -> dict[str, Any]:
    """Another model, another stage: load, compare, go on."""
    engine = tiny.build(loaded, seed=99)
    loaded_state = Checkpoints(root / str(saved), RUN).load(engine)
    assert loaded_state is not None
    assert [own["rank"] for own in loaded_state.owns] == [0, 1]
    found: dict[str, Any] = {"extra": loaded_state.extra}
    found["own buffers"] = {n: b.clone() for n, b in engine.module.named_buffers()}
    found["steps"] = engine.steps
    found["state"] = state(engine)
    found["next"] = tiny.train(engine, range(HALF, END))
    found["last"] = state(engine)
    return found


def refused(root: Path, run_id: str, model: nn.Module) -> str:
    try:
        Checkpoints(root / "0", run_id).load(tiny.build(2, model=model))
    except UserError as error:
        return str(error)
    return "not refused"


def fresh(root: Path) -> tuple[Any, str, str]:
    """No checkpoint yet; then one of a model that has not stepped, read back."""
    engine = tiny.build(1)
    nothing = Checkpoints(root / "none", RUN).load(engine)
    saved = Checkpoints(root / "fresh", RUN)
    saved.save(0, engine, {})
    saved.settle()
    before = state(engine)
    other = tiny.build(2, seed=5)
    Checkpoints(root / "fresh", RUN).load(other)
    return nothing, before, state(other)


def second_run(root: Path) -> dict[Any, Any]:
    """New processes read all pairs of stages, and what a world of another size has written."""
    found: dict[Any, Any] = {pair: resume(root, *pair) for pair in PAIRS}
    found["other run"] = refused(root, "student-xyz", tiny.TinyNet())
    found["other shape"] = refused(root, RUN, tiny.TinyNet(width=5))
    wider = tiny.TinyNet()
    wider.register_buffer("zeal", torch.zeros(2))
    found["other names"] = refused(root, RUN, wider)
    found["fresh"] = fresh(root / f"world-{distributed.world_size()}")
    return found


def single_writes(root: Path) -> dict[Any, Any]:
    """One rank: reads what two wrote, then writes itself."""
    found = second_run(root)
    for stage in tiny.STAGES:
        engine = tiny.build(stage)
        tiny.train(engine, range(HALF))
        saved = Checkpoints(root / f"single-{stage}", RUN)
        saved.save(HALF, engine, extra(HALF))
        saved.finish()
        found["single", stage] = state(engine)
    return found


def pair_reads_single(root: Path) -> dict[Any, Any]:
    """Two ranks read what one wrote."""
    found = second_run(root)
    for stage in tiny.STAGES:
        engine = tiny.build(3 - stage, seed=99)
        Checkpoints(root / f"single-{stage}", RUN).load(engine)
        found["single", stage] = state(engine)
    return found


def saved_through_faults(root: Path) -> dict[str, Any]:
    """A save that rank 1's disk refuses, one whose folder can't be made, and one that succeeds."""
    engine, saved = tiny.build(2), Checkpoints(root, RUN)
    found: dict[str, Any] = {}

    def attempt(what: str, step: int) -> None:
        tiny.train(engine, range(step - 1, step))
        saved.save(step, engine, extra(step))
        saved.settle()
        distributed.barrier()  # rank 0 has cleared away what failed
        found[what] = (saved.problem, sorted(path.name for path in root.iterdir()))
        distributed.barrier()

    attempt("before", 1)
    everything = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, everything[1]))  # EFBIG at 1,000 bytes
    attempt("disk full on rank 1", 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, everything)
    if distributed.rank() == 0:
        (root / "step-00000003.tmp").write_text("in the way")
    attempt("no folder", 3)
    with pytest.raises(UserError, match="the last checkpoint could not be written"):
        saved.finish()
    if distributed.rank() == 0:
        (root / "step-00000003.tmp").unlink()
    attempt("after", 4)
    found["finish"] = saved.finish().name
    return found


def best_and_last(root: Path) -> list[list[str]]:
    """Five saves of which the second is the best, two left."""
    engine, saved = tiny.build(0), Checkpoints(root, RUN, keep_last=2)
    found = []
    for step in range(1, 6):
        tiny.train(engine, range(step - 1, step))
        saved.save(step, engine, extra(step), best=step in (1, 2))
        saved.settle()
        found.append(sorted(path.name for path in root.glob("step-*")))
    return found


def random_numbers(root: Path) -> tuple[list[float], list[float]]:
    """Draws of a rank after a save, and of another process-like state after its load."""
    engine, saved = tiny.build(1), Checkpoints(root, RUN)
    tiny.train(engine, range(1))
    random_state.seed(5, distributed.rank())
    draws()
    saved.save(1, engine, {}, {"random": random_state.capture()})
    expected = draws()
    saved.settle()
    random_state.seed(77)
    loaded = saved.load(tiny.build(1, seed=4))
    assert loaded is not None
    random_state.restore(loaded.owns[distributed.rank()]["random"])
    return expected, draws()


def draws() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


def save_changes_nothing(root: Path) -> list[str]:
    """Six steps, saved after every one, and not saved at all."""
    found = []
    for often in (True, False):
        engine, saved = tiny.build(1), Checkpoints(root / str(often), RUN)
        losses = []
        for step in range(END):
            losses += tiny.train(engine, range(step, step + 1))
            if often:
                saved.save(step + 1, engine, extra(step + 1))  # settled by the next
        saved.settle()
        own = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        found.append(f"{losses} {tiny.digest(own)} {state(engine)}")
    return found


LONG = 50


def long_run(root: Path) -> dict[int, list[list[float]]]:
    """Two ranks, 3 steps, a save, 50 steps more: the losses of each step's micro-batches."""
    found = {}
    for stage in tiny.STAGES:
        engine, saved = tiny.build(stage), Checkpoints(root / f"wide-{stage}", RUN)
        tiny.train(engine, range(HALF))
        saved.save(HALF, engine, extra(HALF))
        saved.finish()
        mine = tiny.train(engine, range(HALF, HALF + LONG))
        found[stage] = [
            list(step) for step in zip(*distributed.all_gather_object(mine), strict=True)
        ]
    return found


def narrow_run(root: Path) -> dict[str, dict[int, list[list[float]]]]:
    """One rank of two micro-batches: goes on from the two ranks' save; and a save of its own."""
    found: dict[str, dict[int, list[list[float]]]] = {"resumed": {}, "own": {}}
    for stage in tiny.STAGES:
        engine = tiny.build(stage, seed=9, accumulation=2)
        assert Checkpoints(root / f"wide-{stage}", RUN).load(engine) is not None
        found["resumed"][stage] = in_pairs(tiny.train(engine, range(HALF, HALF + LONG)))
        engine = tiny.build(stage, accumulation=2)
        saved = Checkpoints(root / f"narrow-{stage}", RUN)
        tiny.train(engine, range(HALF))
        saved.save(HALF, engine, extra(HALF))
        saved.finish()
        found["own"][stage] = in_pairs(tiny.train(engine, range(HALF, HALF + LONG)))
    return found


def wide_again(root: Path) -> dict[int, list[list[float]]]:
    """Two ranks go on from the one rank's save."""
    found = {}
    for stage in tiny.STAGES:
        engine = tiny.build(stage, seed=9)
        assert Checkpoints(root / f"narrow-{stage}", RUN).load(engine) is not None
        mine = tiny.train(engine, range(HALF, HALF + LONG))
        found[stage] = [
            list(step) for step in zip(*distributed.all_gather_object(mine), strict=True)
        ]
    return found


def in_pairs(losses: list[float]) -> list[list[float]]:
    return [losses[i : i + 2] for i in range(0, len(losses), 2)]


def die_when(rank: int, module: Any, name: str, at: Callable[[Path], bool]) -> None:
    """SIGKILL this rank when ``module.name`` is called on a path that ``at`` picks."""
    real = getattr(module, name)

    def killer(path: Path, *rest: Any) -> Any:
        if distributed.rank() == rank and at(Path(path)):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(path, *rest)

    setattr(module, name, killer)


def killed(root: Path, where: str) -> None:
    """Go on from the latest, then die at one point of saving the next."""
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
def first(root: Path) -> list[dict[int, dict[str, Any]]]:
    return procs.run(first_run, 2, root)


@pytest.fixture(scope="module")
def single(root: Path, first: object) -> dict[Any, Any]:
    return procs.run(single_writes, 1, root)[0]


@pytest.fixture(scope="module")
def second(root: Path, single: object) -> list[dict[Any, Any]]:
    return procs.run(pair_reads_single, 2, root)


def test_all_stages_write_the_same(first: list[dict[int, dict[str, Any]]]) -> None:
    assert len({found["state"] for rank in first for found in rank.values()}) == 1


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_resumed_run_is_the_uninterrupted_run(
    first: list[dict], second: list[dict], saved: int, loaded: int
) -> None:
    for rank, (before, after) in enumerate(zip(first, second, strict=True)):
        resumed = after[saved, loaded]
        assert resumed["extra"] == extra(HALF)
        assert resumed["steps"] == HALF
        for name, buffer in before[saved]["own buffers"].items():
            assert torch.equal(resumed["own buffers"][name], buffer), (rank, name)
        for what in ("state", "next", "last"):
            assert resumed[what] == before[saved][what], (rank, what)


@pytest.mark.parametrize(("saved", "loaded"), PAIRS)
def test_another_world_size_gets_the_same_state(
    first: list[dict], single: dict, saved: int, loaded: int
) -> None:
    assert single[saved, loaded]["state"] == first[0][saved]["state"]
    assert all(loss == loss for loss in single[saved, loaded]["next"])


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_a_larger_world_reads_a_smaller_ones(single: dict, second: list[dict], stage: int) -> None:
    assert [rank["single", stage] for rank in second] == [single["single", stage]] * 2


def test_shares_are_even_and_old_checkpoints_go(root: Path, first: object) -> None:
    names = sorted(path.name for path in (root / "1").iterdir())
    assert names == ["latest", f"step-{HALF - 1:08d}", f"step-{HALF:08d}"]
    assert (root / "1" / "latest").read_text() == f"step-{HALF:08d}"
    sizes = [p.stat().st_size for p in (root / "1" / names[-1]).glob("rank-*-of-00002.safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 2 * min(sizes)


def test_buffers_are_saved_as_the_mean_over_ranks(root: Path, first: list[dict]) -> None:
    own = [rank[2]["own buffers"]["norm.running_var"] for rank in first]
    saved = load_weights(newest(root / "2"))["norm.running_var"]
    assert not torch.equal(own[0], own[1])
    torch.testing.assert_close(saved, (own[0] + own[1]) / 2)


def test_weights_load_without_deepspeed(root: Path, first: object) -> None:
    model = tiny.TinyNet(seed=42)
    model.load_state_dict(load_weights(newest(root / "3")))
    assert int(model.state_dict()["norm.num_batches_tracked"]) == HALF


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_does_not_fit_is_refused(single: dict, second: list[dict], world_size: int) -> None:
    for found in [single] if world_size == 1 else second:
        assert "another run" in found["other run"]
        assert f"step-{HALF:08d}" in found["other run"]
        assert "gate: shape (6,) saved, (5,) wanted" in found["other shape"]
        assert "zeal: shape absent saved" in found["other names"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_before_the_first_step(single: dict, second: list[dict], world_size: int) -> None:
    for found in [single] if world_size == 1 else second:
        nothing, before, after = found["fresh"]
        assert nothing is None
        assert before == after
        assert before.startswith("0 ")


def newest(folder: Path) -> Path:
    found = Checkpoints(folder, RUN).latest()
    assert found is not None
    return found


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
    first: object,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
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


def test_kills_while_saving_cost_that_save_only(
    root: Path, first: list[dict], tmp_path: Path
) -> None:
    folder = tmp_path / "0"
    shutil.copytree(root / "0", folder)
    for where, victim in (("shard of rank 1", 1), ("before the manifest", 0)):
        outcomes = procs.launch(killed, 2, folder, where)
        assert outcomes[victim].returncode == -9, outcomes[victim].output
        assert outcomes[1 - victim].returncode not in (0, -9), "the survivor must notice"
        assert newest(folder).name == f"step-{HALF:08d}"
        assert (folder / f"step-{HALF + 1:08d}.tmp").is_dir()
    outcomes = procs.launch(killed, 1, folder, "before the rename")
    assert outcomes[0].returncode == -9
    assert newest(folder).name == f"step-{HALF:08d}"
    (folder / "step-00000001.tmp").mkdir()
    procs.run(killed, 1, folder, "nowhere")
    assert sorted(p.name for p in folder.iterdir()) == [
        "latest",
        f"step-{HALF:08d}",
        f"step-{HALF + 1:08d}",
    ]


def test_a_save_that_the_disk_refuses_costs_that_save_only(tmp_path: Path) -> None:
    ranks = procs.run(saved_through_faults, 2, tmp_path)
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


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None,
    reason="a file system of one's own wants a mount namespace (root, unshare)",
)
def test_a_disk_that_is_full_or_read_only(tmp_path: Path) -> None:
    """Really so: a tmpfs of 96 KiB. The newest whole checkpoint stays, and saving recovers."""
    (tmp_path / "d").mkdir()
    script = Path(__file__).with_name("full_disk.py")
    environment = {**os.environ, "PYTHONPATH": f"{script.parent.parent}:{script.parent}"}
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, str(script), str(tmp_path / "d")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *well, full, read_only, again = json.loads(done.stdout.splitlines()[-1])
    assert len(well) >= 2
    assert all(problem is None for _, problem, _ in well)
    last = well[-1][2]
    assert "No space left" in full[1]
    assert "Read-only" in read_only[1]
    assert full[2] == read_only[2] == last == f"step-{len(well):08d}"
    assert again[1:] == [None, f"step-{len(well) + 3:08d}"]


def another_config(root: Path) -> list[str]:
    """A save of one config; what is said to another, and what force does."""
    old = {"teacher.lr": 0.1, "teacher.epochs": 5, "seed": 0}
    saved = Checkpoints(root, RUN, old)
    engine = tiny.build(0)
    tiny.train(engine, range(1))
    saved.save(1, engine, extra(1))
    saved.finish()
    other = Checkpoints(root, "another", {**old, "teacher.epochs": 9})
    said = []
    with pytest.raises(UserError) as caught:
        other.load(tiny.build(0, seed=2))
    said.append(str(caught.value))
    fresh_engine = tiny.build(0, seed=2)
    loaded = other.load(fresh_engine, force=True)
    assert loaded is not None
    said += [str(loaded.same_run), str(state(fresh_engine) == state(engine))]
    return said


def test_another_config_is_named_and_refused_unless_forced(tmp_path: Path) -> None:
    refusal, same, equal = procs.run(another_config, 1, tmp_path)[0]
    assert "teacher.epochs: 5 -> 9" in refusal
    assert "teacher.lr" not in refusal
    assert "--force" in refusal
    assert (same, equal) == ("False", "True")


def test_the_best_is_kept_besides_the_last(tmp_path: Path) -> None:
    steps = procs.run(best_and_last, 1, tmp_path)[0]
    assert steps == [[f"step-{n:08d}" for n in left] for left in
                     ([1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5])]  # fmt: skip
    best = checkpoint_folder.best_of(tmp_path)
    assert best is not None
    assert best.name == "step-00000002"


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    ranks = procs.run(random_numbers, 2, tmp_path)
    for expected, drawn in ranks:
        assert drawn == expected
    assert ranks[0][0] != ranks[1][0]


def test_another_world_size_has_the_same_losses_for_fifty_steps(tmp_path: Path) -> None:
    """Two ranks to one and the reverse, every ZeRO stage, the same micro-batches."""
    wide = procs.run(long_run, 2, tmp_path)[0]
    narrow = procs.run(narrow_run, 1, tmp_path)[0]
    again = procs.run(wide_again, 2, tmp_path)[0]
    for stage in tiny.STAGES:
        for found, expected in ((narrow["resumed"], wide), (again, narrow["own"])):
            assert np.shape(found[stage]) == (LONG, 2)
            np.testing.assert_allclose(found[stage], expected[stage], rtol=1e-3, err_msg=str(stage))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    for often, never in procs.run(save_changes_nothing, 2, tmp_path):
        assert often == never


def test_a_damaged_future_does_not_push_out_the_present(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, RUN, keep_last=1)
    for step in (1, 2, 9):
        publish(saved, step)
    _lose(tmp_path / "step-00000009")
    publish(saved, 3)
    checkpoint_folder.prune(tmp_path, tmp_path / "step-00000003", keep_last=1)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000003"]


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, RUN)
    publish(saved, 1, format=3)
    with pytest.raises(UserError, match="format 3"):
        saved.load(object())  # type: ignore[arg-type]


def publish(saved: Checkpoints, step: int, **fields: Any) -> None:
    """A checkpoint without tensors, by the real publisher."""
    final = saved.folder / f"step-{step:08d}"
    work = final.with_name(final.name + ".tmp")
    work.mkdir(parents=True)
    head: dict[str, Any] = {"format": 2, "run_id": RUN, "step": step, "extra": {}, **fields}
    checkpoint_folder.publish(work, final, head, [])
    assert json.loads((final / "state.json").read_text())["step"] == step


def test_shares_name_every_tensor_once() -> None:
    class Fake:
        module = tiny.TinyNet()

    names = {name for name, _ in Fake.module.named_parameters()}
    names |= {name for name, _ in Fake.module.named_buffers()}
    for world_size in (1, 2, 3, 50):
        shares = checkpoint._shares(Fake(), world_size)  # type: ignore[arg-type]
        assert shares.keys() == names
        assert set(shares.values()) <= set(range(world_size))
