"""Sizes of a run: traces compared with sums by hand, ZeRO's arithmetic, the plan as a user reads it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.plan import constants
from cnn2gnn_dist.commands.plan.activations import trace
from cnn2gnn_dist.commands.plan.states import ring_seconds, sent_in_a_step, states
from cnn2gnn_dist.config import Config


def test_a_trace_counts_what_the_backward_pass_needs():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))

    def loss_of(batch: int) -> torch.Tensor:
        return F.cross_entropy(model(torch.randn(batch, 10)), torch.zeros(batch, dtype=torch.long))

    found = trace(model.train(), loss_of)
    assert found.parameters == 10 * 20 + 20 + 20 * 5 + 5
    # Per image: the input, the ReLU's output and the log-softmax, in float32, and the label, in int64.
    assert found.kept == 4 * (10 + 20 + 5) + 8
    assert found.largest == 4 * 20
    assert found.flops == 2 * (10 * 20 + 20 * 5)
    assert found.fixed < 16  # the divisor of the mean


def test_a_trace_takes_no_weights_for_activations():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
    found = trace(model.train(), lambda batch: model(torch.randn(batch, 3, 8, 8)).mean())
    maps = 4 * 64 * 8 * 8
    assert found.kept == 4 * 3 * 8 * 8 + 2 * maps  # the input; the convolution's output; the ReLU's
    assert found.buffers == 2 * 4 * 64 + 8
    assert found.fixed == 2 * 4 * 64  # BatchNorm's mean and deviation


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 400, 400, 800), (1, 400, 400, 300), (2, 400, 100, 300), (3, 100, 100, 300)],
)
def test_states_of_a_rank(stage, weights, gradients, optimizer):
    found = states(100, stage=stage, ranks=4)
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)
    more = states(100, stage=stage, ranks=4, optimizer="sgd", average=True, bucket=7)
    assert more.optimizer == optimizer  # one moment less, an average more
    assert more.buckets == (28 if stage else 0)
    assert more.total == found.total + more.buckets


def test_what_is_sent():
    assert sent_in_a_step(100, 2, 1) == 0
    assert sent_in_a_step(100, 0, 2) == sent_in_a_step(100, 2, 2) == 400
    assert sent_in_a_step(100, 3, 4) == 3 * 300
    assert ring_seconds(1e9, 1, 1e9, 1.0) == 0
    assert ring_seconds(2e9, 4, 1e9, 0.5) == 2 + 6 * 0.5


SMALL = ("--teacher", "whitened_cnn", "--student", "conv3", "teacher.args={widths: [8, 8, 8]}")


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    command = ["plan", "--config", "demo", "--images", "1440", "--classes", "10", "--json"]
    assert cli.main([*command, *SMALL, *options]) == 0
    found: dict = json.loads(capsys.readouterr().out)
    return found


def test_the_plan_of_a_run(capsys):
    one = planned(capsys, "--ranks", "1")
    two = planned(capsys, "--ranks", "1", "--nodes", "2", "--gbit", "1")
    for kind in ("teacher", "student"):
        alone, shared = one["models"][kind], two["models"][kind]
        assert alone["trace"] == shared["trace"]
        assert alone["sent"] == alone["network_s"] == 0
        assert shared["sent"] == 4 * shared["trace"]["parameters"]
        assert shared["network_s"] == pytest.approx(shared["sent"] / 1.25e8 + 2 * 5e-5)
        whole = alone["micro_batch"] * alone["accumulation"]
        assert whole == 2 * shared["micro_batch"] * shared["accumulation"]
    assert set(one["hours"]) == set(two["hours"])
    assert all(2.001 * two["hours"][stage] > one["hours"][stage] > 0 for stage in one["hours"])
    wide = planned(capsys, "--ranks", "1", "student.dim=256")
    assert wide["models"]["student"]["trace"]["kept"] > one["models"]["student"]["trace"]["kept"]
    assert wide["models"]["teacher"] == one["models"]["teacher"]
    quick = planned(
        capsys, "--ranks", "1", "teacher.global_batch=512", "teacher.max_micro_batch=512"
    )
    assert quick["host"]["prefetched batches"] == 4 * 512 * 3 * 32**2


def test_hours_are_not_guessed(capsys):
    assert planned(capsys, "--gpus", "0", "--ranks", "1")["hours"] is not None
    assert planned(capsys, "--gpus", "2")["hours"] is None
    assert planned(capsys, "--nodes", "2", "--ranks", "1")["hours"] is None
    assert planned(capsys, "--gpus", "2", "--gflops", "5000")["hours"]["teacher"] > 0


def test_hours_follow_precision_and_the_size_of_early_epochs(capsys):
    """At 1 MFLOP/s nothing else counts: with half of the epochs at half the side, 5/8 of the work is left."""
    slow = ("--ranks", "1", "--gflops", "0.001", "--decode-ms", "0", "teacher.epochs=8")
    whole, early = (
        planned(capsys, *slow, *more)["hours"]
        for more in ((), ("teacher.early_size=16", "teacher.early_share=0.5"))
    )
    assert early["teacher"] == pytest.approx(0.625 * whole["teacher"], rel=1e-3)
    assert early["student"] == whole["student"]
    rates = [
        planned(capsys, "--ranks", "1", f"precision={one}")["cluster"]["flops"]
        for one in ("float32", "bfloat16")
    ]
    assert rates == [1e9 * constants.CPU_GFLOPS[one] for one in ("float32", "bfloat16")]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--gpus", "2"], "--gpus is only for a complete run"),
        (["--nodes", "4"], "--nodes is only for a complete run"),
        (["--cores", "4"], "--cores is only for a complete run"),
        (
            ["--classes", "10", "teacher.global_batch=1024"],
            "1000 training images are fewer than one global batch of 1024",
        ),
        (["--classes", "10", "graph.candidates=1000"], "1000 candidates for each of 1000"),
        (["teacher.epochs=3"], "overrides is only for a complete run"),
        (["--classes", "10", "--dim", "64"], "--dim is only for the graph alone"),
        (["--classes", "1"], "classes = 1"),
        (["--classes", "10", "--nodes", "0"], "nodes = 0"),
        (["--classes", "10", "--gpus", "-1"], "gpus = -1"),
        (["--classes", "10", "--gpus", "2", "--ranks", "2"], "each of a host's 2 GPUs is a rank"),
        (["--graph-dim", "0"], "--graph-dim"),
        (["--classes", "10", "--gbit", "0"], "gbit = 0"),
        (["--classes", "10", "--ranks", "7"], "does not divide evenly over 7 ranks"),
        (["--classes", "10", "teacher.arch=resnet19"], "resnet19"),
    ],
)
def test_what_does_not_fit_is_named(capsys, options, told):
    assert cli.main(["plan", "--images", "1000", *options]) == 2
    assert told in capsys.readouterr().err


def test_a_plan_has_what_the_run_has_and_no_more(capsys):
    whole = planned(capsys, "--ranks", "1", "student.control=true")
    assert "graph versions (3)" in whole["disk"]  # with that of the stage graph
    assert "the model, with its memory" in whole["disk"]
    assert whole["disk"]["soft targets as arrays"] > 0
    alone = planned(capsys, "--ranks", "1", "student.control=false")
    assert set(whole["hours"]) - set(alone["hours"]) == {"control"}
    assert alone["models"] == whole["models"]
    (of_both,) = (size for name, size in whole["disk"].items() if "student and control" in name)
    (of_one,) = (size for name, size in alone["disk"].items() if "the student (" in name)
    assert of_both == 2 * of_one


def test_a_plan_without_a_teacher_or_without_a_graph(capsys):
    ready = planned(capsys, "--ranks", "1", "targets.logits=l.parquet", "targets.views=0")
    assert set(ready["models"]) == {"student"}
    assert not {"teacher", "targets"} & set(ready["hours"])
    assert not any("teacher" in name for name in ready["disk"])
    plain = planned(capsys, "--ranks", "1", "graph.scope=batch")
    assert plain["refresh"] == {}
    for place in ("disk", "host", "hours"):
        assert not any("graph" in name or "memory" in name for name in plain[place]), place


def test_what_a_run_refuses_a_plan_refuses(capsys, tmp_path):
    for stage in (5, "two"):
        file = tmp_path / "ds.json"
        file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        command = ["plan", "--images", "1440", "--classes", "10", "--ranks", "1", *SMALL]
        assert cli.main([*command, f"student.ds_config={file}"]) == 2
        told = capsys.readouterr().err
        assert f"ZeRO has no stage {stage!r}" in told
        assert str(file) in told


def test_efficiencies_fall_with_nodes_and_rise_with_the_network(capsys):
    command = ["plan", "--images", "1440", "--classes", "10", "--gpus", "4", "--gflops", "5000"]
    assert cli.main([*command, "--scaling", *SMALL]) == 0
    text = capsys.readouterr().out
    rows = text.split("efficiency of a step of")[1].splitlines()[2:9]
    table = np.array([[float(cell) for cell in row.split()] for row in rows])
    assert table[:, 0].tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert (table[0, 1:] == 1).all()
    assert (np.diff(table[:, 1:], axis=0) <= 0).all()
    assert (np.diff(table[:, 1:], axis=1) >= 0).all()
    assert 0 < table[-1, 1] < table[1, 1] < 1


def test_a_plan_is_readable(capsys):
    command = ["plan", "--images", "1440", "--classes", "10", "--nodes", "2", "--gpus", "4"]
    assert cli.main([*command, *SMALL]) == 0
    told = capsys.readouterr().out
    assert "default config: 2 nodes x 4 GPUs, 8 ranks" in told
    assert told.count("<- this config") == 2
    assert "with --gbit, also how long that takes" in told
    assert "hours: unknown without --gflops" in told


def test_without_a_config_a_plan_is_of_the_defaults_and_says_so(capsys):
    command = ["plan", "--images", "1440", "--classes", "10", "--ranks", "1", *SMALL]
    assert cli.main(command) == 0
    told = capsys.readouterr().out
    steps = 1440 // Config().teacher.global_batch * Config().teacher.epochs
    assert f" {steps:,} steps of " in told.split("teacher: ")[1].splitlines()[0]
    assert "1,440 images of 10 classes, default config: " in told
    assert cli.main([*command, "--config", "demo"]) == 0
    assert "1,440 images of 10 classes, config demo: " in capsys.readouterr().out


@pytest.mark.parametrize(("parts", "refused"), [(2, True), (4, False), (8, False)])
def test_a_plan_says_that_its_ranks_have_too_few_partitions(console, capsys, parts, refused):
    command = ["plan", "--config", "demo", "--images", "1000", "--classes", "10", "--ranks", "4"]
    assert cli.main([*command, f"graph.partition.parts={parts}", *SMALL]) == 0
    said = (
        "2 partitions can't be shared by 4 ranks: every rank needs one; set graph.partition.parts=4"
    )
    assert (said in capsys.readouterr().err) == refused
