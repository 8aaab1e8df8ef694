"""Versions of code in keys: only runs whose results they concern are stale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cnn2gnn_dist import ledger, settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.ledger import Entry
from cnn2gnn_dist.pipeline import keys, registry
from cnn2gnn_dist.pipeline.registry import STAGES
from cnn2gnn_dist.training.checkpoint import folder as disk


def key_of(
    config: Config,
    stage: str,
    deepspeed: keys.DeepSpeed | None = None,
    entry: Entry | None = None,
) -> str:
    parts = keys.parts(config, STAGES[stage], deepspeed or {}, entry)
    return keys.key_of(STAGES[stage], parts, {"index": "x"})


def is_in_the_key(version: str, stage: str, options: list[str], patch: pytest.MonkeyPatch) -> bool:
    """Whether a key would be another one at the first version."""
    config = settings.load("demo", options)
    now = key_of(config, stage)
    patch.setitem(registry.VERSIONS, f"version.{version}", 1)
    return key_of(config, stage) != now


@pytest.mark.parametrize(
    ("stage", "option"),
    [
        ("student", "student.logit_adjust=1"),
        ("teacher", "data.unlabelled=true"),
        ("model", "data.calibration=0.1"),
    ],
)
def test_only_runs_with_the_option_have_its_version_in_their_keys(monkeypatch, stage, option):
    version = f"version.{option.partition('=')[0].partition('.')[2]}"
    for options in ([], [option]):
        config = settings.load("demo", ["data.calibration=0", *options])
        now = key_of(config, stage)
        with monkeypatch.context() as earlier:
            earlier.setitem(registry.VERSIONS, version, 1)
            assert (key_of(config, stage) == now) == (not options)


@pytest.mark.parametrize(
    ("stage", "options", "counts"),
    [
        ("teacher", ["teacher.head_lr=0"], True),
        ("teacher", ["student.stem_lr=0"], False),
        ("student", ["student.stem_lr=0"], True),
        ("student", ["student.stem_lr=0", "student.clip=0"], False),
        ("student", ["student.stem_lr=0.1"], False),
        ("student", ["graph.gate_lr=0"], True),
        ("control", ["graph.gate_lr=0"], False),
        ("control", ["student.bias_lr=0"], True),
    ],
)
def test_the_version_of_frozen_parameters_counts_where_gradients_are_clipped(
    monkeypatch, stage, options, counts
):
    assert is_in_the_key("frozen", stage, options, monkeypatch) == counts


@pytest.mark.parametrize(
    ("stage", "options", "counts"),
    [
        ("student", [], False),
        ("student", ["precision=bfloat16"], True),
        ("student", ["graph.sampling.second_hop=cached"], True),
        ("student", ["graph.scope=batch"], True),
        ("student", ["graph.scope=batch", "precision=float32"], False),
        ("control", ["graph.scope=batch"], False),
        ("graph", ["graph.sampling.second_hop=cached"], False),
    ],
)
def test_the_version_of_neighbours_counts_where_they_were_rounded(
    monkeypatch, stage, options, counts
):
    assert is_in_the_key("neighbours", stage, options, monkeypatch) == counts


@pytest.mark.parametrize(
    ("stage", "options", "counts"),
    [
        ("student", [], False),
        ("student", ["data.unlabelled=true"], True),
        ("student", ["data.unlabelled=true", "graph.partition.parts=1"], False),
        ("student", ["data.unlabelled=true", "graph.scope=batch"], False),
        ("student", ["data.unlabelled=true", "graph.sampling.query=table"], False),
        ("teacher", ["data.unlabelled=true"], False),
        ("control", ["data.unlabelled=true"], False),
    ],
)
def test_the_version_of_unlabelled_images_counts_where_they_have_partitions(
    monkeypatch, stage, options, counts
):
    assert is_in_the_key("unlabelled_parts", stage, options, monkeypatch) == counts


ADAM = {"type": "Adam", "params": {"adam_w_mode": False}}


@pytest.mark.parametrize(
    ("optimizer", "options", "counts"),
    [
        (ADAM, [], True),
        (ADAM, ["graph.start_epoch=0"], False),
        (ADAM, ["graph.scope=batch"], False),
        (ADAM, ["student.weight_decay=0"], False),
        (ADAM, ["student.optimizer=sgd"], False),
        ({"type": "Adam", "params": {"adam_w_mode": False, "weight_decay": 0.0}}, [], False),
        ({"type": "Adam", "params": {}}, [], False),
        ({"type": "AdamW", "params": {"adam_w_mode": False}}, [], False),  # is AdamW all the same
    ],
)
def test_the_version_of_late_decay_counts_under_plain_adam(monkeypatch, optimizer, options, counts):
    config, read = settings.load("demo", options), {"student": {"optimizer": optimizer}}
    now = {stage: key_of(config, stage, read) for stage in ("student", "control")}
    monkeypatch.setitem(registry.VERSIONS, "version.late_decay", 1)
    assert (key_of(config, "student", read) != now["student"]) == counts
    assert key_of(config, "control", read) == now["control"]


def teacher_of(root: Path, **state: Any) -> None:
    """A finished teacher whose last checkpoint says so."""
    folder = root / "teacher"
    work = folder / "checkpoints" / "step-00000003.tmp"
    work.mkdir(parents=True)
    about = {"format": disk.FORMAT, "step": 3, "extra": {"norms": [[0, 8]]}, **state}
    final = disk.path_of(folder / "checkpoints", 3)
    disk.publish(work, final, about, [])
    outputs = ledger.outputs(folder, list(final.iterdir()))
    ledger.finish(folder, Entry("key", {}, outputs=outputs))


@pytest.mark.parametrize(
    ("state", "options", "counts"),
    [
        ({"zero_stage": 3, "world_size": 2}, [], True),
        ({"zero_stage": 3, "world_size": 2}, ["teacher.zero_stage=0", "run.ranks=1"], True),
        ({"zero_stage": 3, "world_size": 1}, ["teacher.zero_stage=3"], False),
        ({"zero_stage": 2, "world_size": 2}, ["teacher.zero_stage=3"], False),
        ({"zero_stage": 3, "world_size": 2}, ["teacher.average=ema"], False),
        ({"zero_stage": 3, "world_size": 2, "extra": {"norms": []}}, [], False),
        ({"zero_stage": 3, "world_size": 2, "extra": {}}, [], True),  # an earlier one does not say
    ],
)
def test_targets_of_a_teacher_of_several_ranks_under_zero_3_have_a_version(
    tmp_path, monkeypatch, state, options, counts
):
    config = settings.load("demo", [f"run.dir={tmp_path}", *options])
    plain = key_of(config, "targets")
    teacher_of(tmp_path, **state)
    now = key_of(config, "targets")
    assert (now != plain) == counts
    monkeypatch.setitem(registry.VERSIONS, "version.rank_norms", 1)
    assert key_of(config, "targets") == plain


def test_such_targets_stay_complete_when_the_teachers_checkpoint_is_elsewhere(tmp_path):
    config = settings.load("demo", [f"run.dir={tmp_path}"])
    teacher_of(tmp_path, zero_stage=3, world_size=2)
    made = Entry("", keys.parts(config, STAGES["targets"], {}))
    now = key_of(config, "targets", entry=made)
    disk.path_of(tmp_path / "teacher" / "checkpoints", 3).rename(tmp_path / "elsewhere")
    assert key_of(config, "targets", entry=made) == now
