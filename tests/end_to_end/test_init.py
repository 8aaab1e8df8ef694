"""From a folder of images to a config that the pipeline accepts."""

from __future__ import annotations

from cnn2gnn_dist import cli, settings
from tests.unit.commands.test_first_images import folder_of


def test_init_writes_a_config_that_run_accepts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "my photos", {"cat": 30, "dog": 24, "owl": 20}, side=(90, 100))
    assert cli.main(["init", "my photos", "--minutes", "3"]) == 0
    said = capsys.readouterr().out
    assert "cnn2gnn run --config my.yaml" in said
    assert "20 at least" in said
    config = settings.load("my.yaml")
    assert config.name == "my-photos"
    assert config.data.source == "imagefolder"
    assert cli.main(["run", "--config", "my.yaml", "--dry-run"]) == 0
    planned = capsys.readouterr().out
    assert "teacher    to run" in planned
    assert "note:" not in planned

    assert cli.main(["init", "my photos", "--minutes", "3"]) == 2  # the file exists
    assert "--force" in capsys.readouterr().err
    assert cli.main(["init", "my photos", "--minutes", "3", "--idle", "--dry-run", "-q"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "other.yaml").write_text(printed)
    assert settings.load("other.yaml").data == config.data
