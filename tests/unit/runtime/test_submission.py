"""Submitting a run as a Ray job: exit codes, paths that are checked first, and what is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from cnn2gnn_dist import cli, submit, upload_checks
from cnn2gnn_dist.errors import UserError
from tests.support import REPOSITORY


def test_a_job_whose_log_ends_before_it_has_not_failed(capsys):
    """The exit code of a run that goes on would be read as that of one that failed."""
    from ray.job_submission import JobDetails, JobStatus, JobType

    def code(status, exit_code=None):
        job = JobDetails(
            type=JobType.SUBMISSION, status=status, entrypoint="x", driver_exit_code=exit_code
        )
        return submit.exit_code("job-1", job, "--address x", "`ray job logs job-1 --follow`")

    found = [code(JobStatus.SUCCEEDED, 0), code(JobStatus.FAILED, 75), code(JobStatus.STOPPED)]
    assert found == [0, 75, 1]
    assert capsys.readouterr().out == "job-1: SUCCEEDED\njob-1: FAILED\njob-1: STOPPED\n"
    with pytest.raises(UserError, match="the log of job-1 ended, but it is RUNNING") as caught:
        code(JobStatus.RUNNING)
    assert "--follow" in caught.value.remedy


# --- files sent with a job ---------------------------------------------------------------------


def test_a_working_directory_that_ray_would_not_take(tmp_path):
    mib = 1 << 20
    files = {"a.png": 300 * mib, "b.png": 150 * mib, "c.png": 49 * mib, "d.png": 1}
    upload_checks.check_size(files | {"d.png": mib - 1}, tmp_path)
    with pytest.raises(UserError, match="501 MiB would be sent") as caught:
        upload_checks.check_size(files | {"d.png": 2 * mib}, tmp_path)
    assert "a.png (300 MiB), b.png (150 MiB), c.png (49 MiB)" in caught.value.what
    assert "d.png" not in caught.value.what
    assert ".rayignore" in caught.value.remedy


@pytest.fixture
def checkout(tmp_path) -> tuple[Path, dict[str, int]]:
    """A folder with files, and which of them are sent."""
    for name in ("images/a/1.png", "shards/1.tar", "shards/2.tar", "part.parquet", "w.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "my.yaml").write_text('data: {source: shards, train: "shards/{1..2}.tar"}\n')
    return tmp_path, dict.fromkeys(("images/a/1.png", "part.parquet", "my.yaml"), 1)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--config", "demo"], None),
        (["--config", "demo", "data.source=imagefolder", "data.train=images"], None),
        (["--config", "demo", "data.source=parquet", "data.train=part.parquet"], None),
        (["data.source=shards", "data.train=/data/{0..9}.tar", "--dry-run"], None),
        (["data.source=shards", "data.train=http://host/a.tar"], None),
        (["--config", "my.yaml"], "data.train"),
        (["--config=other.yaml"], "--config"),
        (["data.source=shards", "data.train=shards"], "data.train"),
        (["data.source=shards", "data.train=shards/*.tar"], "data.train"),
        (["data.source=shards", "data.train=../elsewhere/*.tar"], "data.train"),
        (["data.test=no-such-folder"], "data.test"),
        (["teacher.weights=w.safetensors"], "teacher.weights"),
        (["student.weights=w.safetensors"], "student.weights"),
        (["data.relabel=relabel.csv"], "data.relabel"),
        (["targets.logits=logits.parquet", "targets.views=0"], "targets.logits"),
        (["teacher.ds_config=ds.json"], "teacher.ds_config"),
        (["student.ds_config=ds.json"], "student.ds_config"),
        (["run.dir=runs/new", "stream.cache_dir=cache"], None),
    ],
)
def test_relative_paths_of_a_job(checkout, arguments, field):
    folder, files = checkout
    if field is None:
        upload_checks.check_paths(files, folder, arguments)
        return
    with pytest.raises(UserError, match="not among the files that are sent") as caught:
        upload_checks.check_paths(files, folder, arguments)
    assert caught.value.where == field
    assert "absolute path" in caught.value.remedy


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "other.yaml"], "other.yaml is not among the files that are sent"),
        (["data.train=no-such-folder"], "no-such-folder is not among the files that are sent"),
        (["data.train=../elsewhere"], "../elsewhere is not among the files that are sent"),
        (["no.field=1"], "no field with this name"),
        (["--config", "my.yaml"], "no job server answers"),  # what is excluded is known only to Ray
    ],
)
def test_a_wrong_path_is_named_before_the_job_server_is_asked(
    checkout, capsys, monkeypatch, arguments, words
):
    """Nothing answers at that address."""
    for name in ("no_proxy", "NO_PROXY"):  # submit changes them
        monkeypatch.setenv(name, "")
    folder, _ = checkout
    how = ["--address", "http://127.0.0.1:9", "--working-dir", str(folder)]
    assert cli.main(["submit", *how, "--", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_is_sent_is_what_ray_sends(tmp_path, monkeypatch):
    from cnn2gnn_dist import submit

    for name in ("run.py", "images/1.png", "data/2.png", "old/3.png", "a/b.tar", "runs/x/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    with open(tmp_path / "images" / "large.bin", "wb") as file:
        file.truncate(620 << 20)
    (tmp_path / ".gitignore").write_text("/data/\n")
    sent = submit._files_to_send(tmp_path)
    assert sent.keys() == {".gitignore", "run.py", "images/1.png", "images/large.bin", "old/3.png"}
    assert sent["run.py"] == 5
    with pytest.raises(UserError, match=r"images/large.bin \(620 MiB\)") as caught:
        upload_checks.check_size(sent, tmp_path)
    assert ".rayignore" in caught.value.remedy
    (tmp_path / ".rayignore").write_text("images\n")
    assert submit._files_to_send(tmp_path).keys() == {
        ".gitignore",
        ".rayignore",
        "run.py",
        "old/3.png",
    }


def test_the_package_is_sent_as_a_wheel_would_install_it(tmp_path):
    package = submit._package(tmp_path)
    assert package.name == "cnn2gnn_dist"
    assert (package / "ds_config.json").is_file()  # in a checkout it is next to the package
    assert (package / "submit.py").is_file()
    assert not list(package.rglob("__pycache__"))


def test_a_checkout_is_sent_with_every_module_of_the_package():
    """A name that is left out (runs) is left out at any depth, so no module may have such a name."""
    package = REPOSITORY / "cnn2gnn_dist"
    modules = {str(path.relative_to(REPOSITORY)) for path in package.rglob("*.py")}
    assert modules - submit._files_to_send(REPOSITORY).keys() == set()
