"""What `cnn2gnn run` requests from a Ray cluster."""

from __future__ import annotations

import pytest

from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.commands.run.run_cli import _fewer, _on_gpu, _print_summary
from cnn2gnn_dist.errors import UserError

FOUR = [
    "run.ranks=4",
    "graph.partition.parts=4",
    "teacher.global_batch=32",
    "student.global_batch=32",
]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], []),
        (["cluster.min_ranks=1"], [2, 1]),  # 3 ranks can't share batches of 32
        (["cluster.min_ranks=2"], [2]),
        (["cluster.min_ranks=3"], []),
        (["cluster.min_ranks=4"], []),
        (["cluster.min_ranks=9"], []),
        (["cluster.min_ranks=1", "cluster.ranks_per_node=2"], [2]),
        (["cluster.min_ranks=1", "teacher.global_batch=36", "student.global_batch=36"], [3, 2, 1]),
        (
            ["cluster.min_ranks=1", "graph.sampling.sampler=distdgl", "graph.sampling.query=table"],
            [],
        ),
    ],
)
def test_numbers_of_ranks_with_which_a_run_can_go_on(options, expected):
    assert _fewer(settings.load("demo", [*FOUR, *options]), None) == expected


def test_a_stage_alone_is_bound_by_its_own_batches_only():
    config = settings.load("demo", [*FOUR, "cluster.min_ranks=1", "teacher.global_batch=36"])
    assert _fewer(config, ["teacher"]) == [3, 2, 1]
    assert _fewer(config, None) == [2, 1]


def test_gpus_that_are_too_few_are_not_passed_over_in_silence(capsys, console):
    auto, cpu, cuda = (settings.load("demo", [*FOUR, f"device={d}"]) for d in ("auto", "cpu", "cuda"))  # fmt: skip
    assert [_on_gpu(auto, gpus) for gpus in (0, 4, 5)] == [False, True, True]
    assert not _on_gpu(cpu, 3)
    assert capsys.readouterr().err == ""
    assert not _on_gpu(auto, 3)
    assert "4 ranks train on CPUs, because the cluster has only 3 GPUs" in capsys.readouterr().err
    with pytest.raises(UserError, match="asks for 4 GPUs, but Ray has 3"):
        _on_gpu(cuda, 3)


@pytest.mark.parametrize(
    ("source", "suggested"),
    [("digits", "cnn2gnn init"), ("imagefolder", "cnn2gnn evaluate --model")],
)
def test_what_comes_next_suits_the_images(source, suggested, tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    options = [f"run.dir={tmp_path}", f"data.source={source}"]
    _print_summary(
        settings.load("demo", [*options, *([] if source == "digits" else ["data.train=x"])])
    )
    assert suggested in capsys.readouterr().out.splitlines()[-1]


def test_results_that_were_deleted_are_asked_back(tmp_path):
    config = settings.load("demo", [f"run.dir={tmp_path}"])
    with pytest.raises(UserError, match=r"results\.json") as raised:
        _print_summary(config)
    assert str(tmp_path / "evaluation") in raised.value.remedy


@pytest.mark.parametrize(
    "line",
    [
        ["audit", "runs/demo", "--to", "elsewhere"],  # not --top
        ["memory", "add", "MODEL", "images", "--class", "owl", "--old", "1"],
        ["run", "--conf", "demo"],
    ],
)
def test_options_are_not_abbreviated(line, capsys):
    """The name of another command's option must not be taken for the beginning of one of this command's."""
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 2
    assert "unrecognized arguments: --" in capsys.readouterr().err
