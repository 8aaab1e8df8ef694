"""Fields that contradict each other are refused; those that are hardly meant are noted, and the run begins."""

from __future__ import annotations

import shlex

import pytest

from cnn2gnn_dist import cli, consistency, settings
from cnn2gnn_dist.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_scopes_and_hops_that_need_no_fanouts_do_not_ask_for_them():
    assert settings.load(
        "demo", ["graph.sampling.second_hop=cached", "graph.sampling.fanouts=[9, 0]"]
    )
    assert settings.load("demo", ["graph.scope=batch", "graph.sampling.fanouts=[1, 1]"])
    assert settings.load("demo", ["graph.scope=batch", "graph.start_epoch=12"])
    with pytest.raises(UserError, match="too few"):
        settings.load("demo", ["graph.scope=batch", "student.max_micro_batch=9"])
    assert settings.load("demo", ["graph.scope=batch", "student.max_micro_batch=10"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["graph.sampling.fanouts=[8,6]"], ["only 7 neighbors"]),
        (["graph.start_epoch=12"], ["never trains with the graph"]),
        (
            ["student.early_size=12", "graph.refresh_epochs=4", "graph.start_epoch=1"],
            ["ends after 7 epochs, between two builds of the graph: from there until epoch 9"],
        ),
        (["student.early_size=12", "graph.refresh_epochs=3", "graph.start_epoch=1"], []),
        (["student.early_size=12", "graph.refresh_epochs=20"], ["from there to the end"]),
        (["student.epochs=2", "student.warmup_epochs=2"], ["capped at half", "never trains with"]),
        (
            ["student.early_size=12", "student.early_share=1"],
            ["of 12 epochs leaves none at views.size=32"],
        ),
        (
            ["teacher.early_size=16", "teacher.early_share=0.96"],
            ["teacher.early_share=0.96 of 10 epochs"],
        ),
        (["teacher.early_size=16", "teacher.early_share=0.94"], []),
        (["teacher.epochs=1"], ["teacher.warmup_epochs=1 is capped"]),
        (["graph.scope=batch", "graph.start_epoch=12"], ["graph.start_epoch=12"]),
        ([], []),
    ],
)
def test_what_is_hardly_meant_is_noted_and_runs(overrides, said, capsys):
    config = settings.load("demo", overrides)
    notes = consistency.notes(config)
    assert len(notes) == len(said)
    for note, words in zip(notes, said, strict=True):
        assert words in note
        _, remedy, text = note.rpartition(": ")
        if remedy and text.startswith("graph."):  # applying the remedy as written removes the note
            [cured] = shlex.split(text)
            assert note not in consistency.notes(settings.load("demo", [*overrides, cured]))
    assert cli.main(["run", "--config", "demo", "--dry-run", *overrides]) == 0
    assert capsys.readouterr().out.count("note: ") == len(said)


def test_a_student_that_ignores_images_without_a_label_is_noted():
    shards = ["data.source=shards", "data.train=a.tar", "data.test=b.tar", "data.unlabelled=true"]
    for weight, noted in ((0, True), (0.1, False)):
        config = settings.load("demo", [*shards, f"student.distill_weight={weight}"])
        said = [note for note in consistency.notes(config) if "gradients of 0" in note]
        assert bool(said) == noted
