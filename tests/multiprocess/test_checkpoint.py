"""Checkpoints contain the complete state, and any ZeRO stage and world size reads those of any other."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training import random_state
from cnn2gnn_dist.training.checkpoint.folder import load_weights
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from tests.support import rank_group, tiny
from tests.support.saves import END, HALF, RUN, extra, first_run, newest, state

LONG = 50
PAIRS = [(saved, loaded) for saved in tiny.STAGES for loaded in tiny.STAGES]


# --- cases: run on every rank ---------------------------------------------------------------


def resume(root: Path, saved: int, loaded: int) -> dict[str, Any]:
    """With another model and another stage: load, compare, continue."""
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
    """First no checkpoint; then that of a model that has not stepped, read back."""
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
    """New processes read the checkpoints of all pairs of stages, and those of another world size."""
    found: dict[Any, Any] = {pair: resume(root, *pair) for pair in PAIRS}
    found["other run"] = refused(root, "student-xyz", tiny.TinyNet())
    found["other shape"] = refused(root, RUN, tiny.TinyNet(width=5))
    wider = tiny.TinyNet()
    wider.register_buffer("zeal", torch.zeros(2))
    found["other names"] = refused(root, RUN, wider)
    found["fresh"] = fresh(root / f"world-{collectives.world_size()}")
    return found


def single_writes(root: Path) -> dict[Any, Any]:
    """One rank reads what two wrote, then writes its own."""
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
    """Two ranks read what one rank wrote."""
    found = second_run(root)
    for stage in tiny.STAGES:
        engine = tiny.build(3 - stage, seed=99)
        Checkpoints(root / f"single-{stage}", RUN).load(engine)
        found["single", stage] = state(engine)
    return found


def random_numbers(root: Path) -> tuple[list[float], list[float]]:
    """Random draws of a rank after a save, and of a different state after loading it."""
    engine, saved = tiny.build(1), Checkpoints(root, RUN)
    tiny.train(engine, range(1))
    random_state.seed(5, collectives.rank())
    draws()
    saved.save(1, engine, {}, {"random": random_state.capture()})
    expected = draws()
    saved.settle()
    random_state.seed(77)
    loaded = saved.load(tiny.build(1, seed=4))
    assert loaded is not None
    random_state.restore(loaded.owns[collectives.rank()]["random"])
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
    """Six steps with a save after every one, and six steps without any."""
    found = []
    for often in (True, False):
        engine, saved = tiny.build(1), Checkpoints(root / str(often), RUN)
        losses = []
        for step in range(END):
            losses += tiny.train(engine, range(step, step + 1))
            if often:
                saved.save(step + 1, engine, extra(step + 1))  # the next save settles it
        saved.settle()
        own = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
        found.append(f"{losses} {tiny.digest(own)} {state(engine)}")
    return found


def long_run(root: Path) -> dict[int, list[list[float]]]:
    """On two ranks, 3 steps, a save, 50 more steps: the losses of each step's micro-batches."""
    found = {}
    for stage in tiny.STAGES:
        engine, saved = tiny.build(stage), Checkpoints(root / f"wide-{stage}", RUN)
        tiny.train(engine, range(HALF))
        saved.save(HALF, engine, extra(HALF))
        saved.finish()
        mine = tiny.train(engine, range(HALF, HALF + LONG))
        found[stage] = [
            list(step) for step in zip(*collectives.all_gather_object(mine), strict=True)
        ]
    return found


def narrow_run(root: Path) -> dict[str, dict[int, list[list[float]]]]:
    """One rank with two micro-batches resumes from the two ranks' save; then it makes its own."""
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
    """Two ranks resume from the one rank's save."""
    found = {}
    for stage in tiny.STAGES:
        engine = tiny.build(stage, seed=9)
        assert Checkpoints(root / f"narrow-{stage}", RUN).load(engine) is not None
        mine = tiny.train(engine, range(HALF, HALF + LONG))
        found[stage] = [
            list(step) for step in zip(*collectives.all_gather_object(mine), strict=True)
        ]
    return found


def in_pairs(losses: list[float]) -> list[list[float]]:
    return [losses[i : i + 2] for i in range(0, len(losses), 2)]


# --- tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def first(root: Path) -> list[dict[int, dict[str, Any]]]:
    return rank_group.run(first_run, 2, root)


@pytest.fixture(scope="module")
def single(root: Path, first: object) -> dict[Any, Any]:
    return rank_group.run(single_writes, 1, root)[0]


@pytest.fixture(scope="module")
def second(root: Path, single: object) -> list[dict[Any, Any]]:
    return rank_group.run(pair_reads_single, 2, root)


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
        assert "gate: shape (6,) saved, (5,) expected" in found["other shape"]
        assert "zeal: shape absent saved" in found["other names"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_before_the_first_step(single: dict, second: list[dict], world_size: int) -> None:
    for found in [single] if world_size == 1 else second:
        nothing, before, after = found["fresh"]
        assert nothing is None
        assert before == after
        assert before.startswith("0 ")


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    ranks = rank_group.run(random_numbers, 2, tmp_path)
    for expected, drawn in ranks:
        assert drawn == expected
    assert ranks[0][0] != ranks[1][0]


def test_another_world_size_has_the_same_losses_for_fifty_steps(tmp_path: Path) -> None:
    """Two ranks to one and the reverse, every ZeRO stage, the same micro-batches."""
    wide = rank_group.run(long_run, 2, tmp_path)[0]
    narrow = rank_group.run(narrow_run, 1, tmp_path)[0]
    again = rank_group.run(wide_again, 2, tmp_path)[0]
    for stage in tiny.STAGES:
        for found, expected in ((narrow["resumed"], wide), (again, narrow["own"])):
            assert np.shape(found[stage]) == (LONG, 2)
            np.testing.assert_allclose(found[stage], expected[stage], rtol=1e-3, err_msg=str(stage))


def test_saving_changes_nothing(tmp_path: Path) -> None:
    for often, never in rank_group.run(save_changes_nothing, 2, tmp_path):
        assert often == never
