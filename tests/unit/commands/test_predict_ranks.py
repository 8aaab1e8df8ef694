"""Which GPU each rank of ``cnn2gnn predict --out FOLDER/`` answers on, and what is said of an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cnn2gnn_dist import cli
from cnn2gnn_dist.commands.answers import predict, predict_shards
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.network import device_of_rank
from tests.support.models import write_model


@pytest.mark.parametrize(
    ("ranks", "gpus", "devices"),
    [
        (1, 4, ["auto"]),
        (2, 0, ["auto", "auto"]),
        (4, 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]),
        (4, 1, ["cuda:0"] * 4),  # the only one, or a different one for each that it numbers 0
        (4, 2, ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]),
        (16, 8, [f"cuda:{local}" for local in range(8)]),  # two hosts
    ],
)
def test_each_rank_has_the_gpu_of_its_number_on_its_host(ranks: int, gpus: int, devices: list[str]):
    assert [device_of_rank(local, ranks, gpus) for local in range(len(devices))] == devices


def test_the_model_is_opened_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def opened(model: Path, device: str = "auto") -> object:
        raise UserError(f"{model.name} on {device}")

    monkeypatch.setattr(predict_shards, "opened", opened)
    monkeypatch.setattr(predict_shards, "set_rank", lambda _: None)  # lasts longer than this test
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in (("RANK", "7"), ("LOCAL_RANK", "3"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    asked = ["predict", "--model", str(tmp_path / "m"), "a.tar", "--out", f"{tmp_path}/answers/"]
    assert cli.main(asked) == 2
    assert "m on cuda:3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "said"),
    [("answers/", "interrupted; the same command resumes\n"), ("answers.csv", "interrupted\n")],
)
def test_it_is_said_to_resume_only_where_it_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    said: str,
):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for module in (predict_shards, predict):
        monkeypatch.setattr(module, "command", interrupted)
    asked = ["predict", "--model", str(write_model(tmp_path / "m")), "a.tar"]
    assert cli.main([*asked, "--out", f"{tmp_path}/{out}"]) == 130
    assert capsys.readouterr().err == f"cnn2gnn: {said}"
