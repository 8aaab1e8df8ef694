"""Training reads nothing from the device between log lines, and no diverged step is saved.

On a GPU a read waits until all queued work is done. There is no GPU here, so reads are counted:
Python's (``item``, ``float``, ``tolist`` …) and those inside torch's own operators.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cnn2gnn_dist.durable import read_lines
from cnn2gnn_dist.stages.shared.tally import Tally, means_of
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support import REPOSITORY, watched_training
from tests.support.forks import Fork
from tests.support.runs import environment, finish, launch_ranks

NO_LINES = ["run.log_steps=1000"]  # except at the end of an epoch
STEPS = 9  # per epoch
END_OF_EPOCH = ("stages/graph", "training/checkpoint", "training/random_state", "runtime/")


def watched(folder: Path, what: str, *overrides: str) -> tuple[int, str]:
    """Exit code and output of two ranks of ``tests/support/watched_training.py``."""
    folder.mkdir()
    job = (watched_training.main, folder, what, [*NO_LINES, *overrides])
    return finish(Fork(launch_ranks, (2, *job), environment(), REPOSITORY))


def of_steps(found: dict[str, int]) -> dict[str, int]:
    """Leave out the reads at the end of an epoch: checkpoint, graph, agreement of the ranks."""
    return {
        site: count
        for site, count in found.items()
        if not site.startswith(END_OF_EPOCH) and site != "training/engine.full_weight"
    }


@pytest.mark.slow
def test_nothing_is_read_between_log_lines(tmp_path: Path) -> None:
    """With two micro-batches per step, a step reads only the outcome of the previous step, which is done by then."""
    code, output = watched(
        tmp_path / "reads",
        "reads",
        *("teacher.max_micro_batch=8", "student.max_micro_batch=8", "graph.query=table"),
        "checkpoint.every_steps=1000",
    )
    assert code == 0, output[-4000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / "reads" / f"rank-{rank}.json").read_text())
        lines = {"stages/shared/training_loop._log": 2, "stages/shared/tally.state": 2}
        assert of_steps(found["teacher"]) == {"training/outcome.read": 2 * STEPS, **lines}
        lines = {name: 3 for name in lines}
        assert of_steps(found["student"]) == {"training/outcome.read": 3 * STEPS, **lines}


@pytest.mark.slow
@pytest.mark.parametrize(("query", "save_every"), [("table", 13), ("live", 1000)])
def test_a_diverged_step_is_named_and_never_saved(
    tmp_path: Path, query: str, save_every: int
) -> None:
    """Only rank 1 has a loss that is not finite: at a step before a save, and one step later."""
    folder = tmp_path / "nan"
    how = [f"graph.query={query}", f"checkpoint.every_steps={save_every}"]
    code, output = watched(folder, "12", *how)
    assert code != 0
    for rank in (0, 1):
        assert f"rank {rank} is told: the loss is not finite at step 12" in output, output[-4000:]
    saved = disk.all_of(folder / "run" / "student" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000009"]
    assert [line["step"] for line in read_lines(folder / "run" / "student" / "metrics.jsonl")] == [
        9
    ]


def test_a_tally_adds_up_as_pythons_floats_do() -> None:
    torch.manual_seed(0)
    tally, expected = Tally(torch.device("cpu")), [0.0, 0.0, 0.0]
    scale, rows, images = 0.0, 0.0, 0.0
    for _ in range(50):
        values = torch.rand(3) * 7
        tally.add(*values)
        tally.note("median_scale", values[0])
        tally.note("labelled_accuracy", values[1].long(), values[2].long())
        scale, rows = scale + float(values[0]), rows + int(values[1])
        images += int(values[2])
        expected = [total + float(value) for total, value in zip(expected, values, strict=True)]
    state: dict[str, Any] = json.loads(json.dumps(tally.state()))
    assert [state[name] for name in ("loss", "right", "samples")] == expected
    assert state["noted"]["median_scale"] == [scale, 50]
    assert state["noted"]["labelled_accuracy"] == [rows, images]
    assert means_of(tally.noted.view(-1).tolist()) == {
        "labelled_accuracy": rows / images,
        "median_scale": scale / 50,
    }
    again = json.loads(json.dumps(Tally.of([state], torch.device("cpu")).state()))
    clocks = {"began": 0, "worked": 0}
    assert {**again, **clocks} == {**state, **clocks}
    both = Tally.of([state, state], torch.device("cpu"))
    assert both.sums.tolist() == [2 * value for value in expected]
    assert both.state()["noted"]["labelled_accuracy"] == (2 * rows, 2 * images)


def test_micro_batches_without_a_labelled_image_do_not_lower_the_accuracy() -> None:
    """Of four labelled images, in two of ten micro-batches, three are right."""
    tally = Tally(torch.device("cpu"))
    for right, labelled in [(1, 1), (2, 3), *[(0, 0)] * 8]:
        tally.note("labelled_accuracy", torch.tensor(right), torch.tensor(labelled))
    assert means_of(tally.noted.view(-1).tolist()) == {"labelled_accuracy": 0.75}
