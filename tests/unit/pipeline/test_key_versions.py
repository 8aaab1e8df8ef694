"""Versions of code in keys: only runs whose results they concern are stale."""

from __future__ import annotations

import pytest

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.pipeline import keys, registry
from cnn2gnn_dist.pipeline.registry import STAGES


def key_of(config: Config, stage: str) -> str:
    return keys.key_of(STAGES[stage], keys.parts(config, STAGES[stage], {}), {"index": "x"})


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
    config = settings.load("demo", options)
    now = key_of(config, stage)
    monkeypatch.setitem(registry.VERSIONS, "version.frozen", 1)
    assert (key_of(config, stage) != now) == counts


@pytest.mark.parametrize(
    ("stage", "options", "counts"),
    [
        ("student", [], False),
        ("student", ["precision=bfloat16"], True),
        ("student", ["graph.sampling.second_hop=cached"], True),
        ("student", ["graph.scope=batch"], True),
        ("control", ["graph.scope=batch"], False),
        ("graph", ["graph.sampling.second_hop=cached"], False),
    ],
)
def test_the_version_of_neighbours_counts_where_they_were_rounded(
    monkeypatch, stage, options, counts
):
    config = settings.load("demo", options)
    now = key_of(config, stage)
    monkeypatch.setitem(registry.VERSIONS, "version.neighbours", 1)
    assert (key_of(config, stage) != now) == counts
