"""`cnn2gnn checkpoint`: its lists, its reports of damage and its exports are correct."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.compat import import_timm
from cnn2gnn_dist.models.teacher import fit_small_images
from cnn2gnn_dist.stages.shared.networks import Teacher, build_student
from cnn2gnn_dist.training.checkpoint import folder as disk


@pytest.fixture
def run(micro_run, tmp_path):
    """A copy of the run to damage."""
    shutil.copytree(micro_run, tmp_path / "run")
    return tmp_path / "run"


def test_ls_shows_the_position_of_each_checkpoint(micro_run, capsys):
    assert cli.main(["checkpoint", "ls", str(micro_run)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["stage", "checkpoint", "epoch", "batch", "ranks", "MB", "age"]
    assert [row.split()[0] for row in rows] == ["teacher"] * 2 + ["student"] * 2 + ["control"] * 2
    last = [row.split() for row in rows if row.split()[0] == "student"][-1]
    assert last[1:5] == ["step-00000027", "3", "0", "2"]
    assert "latest" in last


def test_show_explains_one(micro_run, capsys):
    assert cli.main(["checkpoint", "show", str(micro_run / "teacher")]) == 0
    text = capsys.readouterr().out
    assert "epoch 2, batch 0, step 18" in text
    assert "2 ranks, ZeRO stage 2" in text
    assert "teacher.global_batch = 32" in text
    weights = disk.load_weights(disk.all_of(micro_run / "teacher" / "checkpoints")[-1])
    model = Teacher(config_of(micro_run), 10, initial=False)
    numbers = sum(p.numel() for p in model.parameters())
    assert f"{numbers:,} numbers" in text
    assert weights.keys() == model.state_dict().keys()


def test_show_wants_one_stage(micro_run, capsys):
    assert cli.main(["checkpoint", "show", str(micro_run)]) == 2
    assert "teacher, student, control" in capsys.readouterr().err


def test_verify_names_the_damaged(run, capsys):
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count("complete") == 6
    path = sorted((run / "student" / "checkpoints").glob("step-*/rank-00001-*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert cli.main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert out.count("complete") == 5
    assert f"{path.name} is damaged" in out
    assert cli.main(["checkpoint", "export", str(path.parent), "--out", str(run / "x")]) == 2
    assert "not complete" in capsys.readouterr().err
    assert not (run / "x").exists()


def test_an_exported_teacher_is_a_plain_timm_network(micro_run, tmp_path, capsys):
    out = tmp_path / "teacher.safetensors"
    assert cli.main(["checkpoint", "export", str(micro_run / "teacher"), "--out", str(out)]) == 0
    with safe_open(out, "pt") as file:
        about = file.metadata()
    assert len(json.loads(about["classes"])) == 10
    config = config_of(micro_run)
    model = import_timm().create_model(about["arch"], num_classes=10, **config.teacher.args)
    fit_small_images(model)
    model.load_state_dict(load_file(out))

    own = Teacher(config, 10, initial=False)
    own.load_state_dict(disk.load_weights(disk.all_of(micro_run / "teacher" / "checkpoints")[-1]))
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(json.loads(about[name])) for name in ("mean", "std"))
    pixels = ((images / 255.0 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(pixels), own.eval()(images), atol=1e-4, rtol=1e-4)
    assert cli.main(["checkpoint", "export", str(micro_run / "teacher"), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    lost = str(tmp_path / "none" / "x")
    assert cli.main(["checkpoint", "export", str(micro_run / "teacher"), "--out", lost]) == 2
    assert lost in capsys.readouterr().err


def test_an_exported_student_loads_by_the_runs_config(micro_run, tmp_path):
    out = tmp_path / "student.safetensors"
    assert cli.main(["checkpoint", "export", str(micro_run / "student"), "--out", str(out)]) == 0
    student = build_student(config_of(micro_run), 10, "dataset")
    student.load_state_dict(load_file(out))


def test_a_missing_checkpoint_is_reported(tmp_path, capsys):
    assert cli.main(["checkpoint", "ls", str(tmp_path)]) == 2
    assert "no checkpoint here" in capsys.readouterr().err


def config_of(run):
    return settings.load(str(run / "config.yaml"))
