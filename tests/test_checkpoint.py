"""Checkpoints: any ZeRO stage and world size reads any other's; kills and damage cost one save."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import procs
import pytest
import tiny
import torch
from torch import nn

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.training import checkpoint, distributed, named_state
from cnn2gnn_dist.training.checkpoint import Checkpoints, load_weights
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
        saved.save(step, engine, extra(step))
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
    found: dict[str, Any] = {"extra": Checkpoints(root / str(saved), RUN).load(engine)}
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
    Checkpoints(root / "fresh", RUN).save(0, engine, {})
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
        Checkpoints(root / f"single-{stage}", RUN).save(HALF, engine, extra(HALF))
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
    assert saved.load(engine) == extra(engine.steps)
    step = engine.steps
    tiny.train(engine, range(step, step + 1))
    if where == "shard of rank 1":
        die_when(1, durable, "sync", lambda path: path.name.startswith("rank-00001"))
    elif where == "before the manifest":
        die_when(0, checkpoint, "_write_json", lambda path: path.name == "manifest.json")
    elif where == "before the rename":
        die_when(0, durable, "sync", lambda path: path.suffix == ".tmp" and path.is_dir())
    saved.save(step + 1, engine, extra(step + 1))


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
    sizes = [p.stat().st_size for p in (root / "1" / names[-1]).glob("rank-*-of-00002.*")]
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


def test_a_damaged_future_does_not_push_out_the_present(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, RUN, keep_last=1)
    for step in (1, 2, 9):
        publish(saved, step)
    _lose(tmp_path / "step-00000009")
    publish(saved, 3)
    saved._prune(tmp_path / "step-00000003")
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000003"]


def test_a_format_of_the_future_is_refused(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, RUN)
    publish(saved, 1, format=2)
    with pytest.raises(UserError, match="format 2"):
        saved.load(object())  # type: ignore[arg-type]


def publish(saved: Checkpoints, step: int, **fields: Any) -> None:
    """A checkpoint without tensors, by the real publisher."""
    final = saved.folder / f"step-{step:08d}"
    work = final.with_name(final.name + ".tmp")
    work.mkdir(parents=True)
    head: dict[str, Any] = {"format": 1, "run_id": RUN, "step": step, "extra": {}, **fields}
    checkpoint._publish(work, final, head, [])
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
