"""Keys change exactly when results do: data, DeepSpeed configs, weights, paths that moved."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.data.index import fingerprint
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.pipeline.registry import stages_of
from cnn2gnn_dist.stages.shared.context import load_manifest
from tests.support.shards import encode_image, random_images


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes of eight images, half of them in a sub-folder."""
    for label, name in enumerate("ab"):
        for number, image in enumerate(random_images(8, 16, 16, seed=label)):
            path = tmp_path / "d" / name / ("sub" if number > 3 else "") / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode_image(image))
    return tmp_path / "d"


class Run:
    """A run of the light stages, in this process."""

    def __init__(self, root: Path, source: str, **data: object) -> None:
        self.root = root
        self.overrides = [f"run.dir={root}", f"data.source={source}", "data.holdout=0.25"]
        self.set(**data)

    def set(self, **data: object) -> None:
        """Set fields of the section data."""
        named = {f"data.{name}=": value for name, value in data.items()}
        kept = [o for o in self.overrides if not o.startswith(tuple(named))] if named else []
        self.overrides = [*(kept or self.overrides), *(f"{n}{v}" for n, v in named.items())]

    def __call__(self, *more: str) -> int:
        """Pack and index; return the exit code."""
        stages = [s.name for s in stages_of(self.config) if s.name in ("pack", "index")]
        codes = [cli.main([name, "--config", "demo", *self.overrides, *more]) for name in stages]
        return max(codes)

    @property
    def config(self):
        return settings.load("demo", self.overrides)

    @property
    def digest(self) -> str:
        """The digest that the teacher's key is built on."""
        return json.loads((self.root / "manifest" / "done.json").read_text())["digest"]

    def status(self, stage: str) -> tuple[Status, str]:
        step = next(s for s in runner.plan(self.config) if s.stage.name == stage)
        return step.status, step.why


def rewrite(path: Path, data: bytes) -> None:
    """Write other bytes of the same length, keeping the old modification time."""
    stat = path.stat()
    assert len(data) == stat.st_size
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))


def flipped(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


def correct(folder: Path) -> None:
    path = folder / "a" / "sub" / "5.png"
    path.write_bytes(flipped(path))  # of equal length


def add(folder: Path) -> None:
    shutil.copy(folder / "a" / "0.png", folder / "a" / "sub" / "new.png")


def drop(folder: Path) -> None:
    (folder / "b" / "sub" / "7.png").unlink()


def swap(folder: Path) -> None:
    (folder / "a" / "1.png").rename(folder / "x.png")
    (folder / "b" / "1.png").rename(folder / "a" / "1.png")
    (folder / "x.png").rename(folder / "b" / "1.png")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (correct, "data.train: 1 with different contents (a/sub/5.png)"),
        (add, "data.train: 1 added (a/sub/new.png)"),
        (drop, "data.train: 1 removed (b/sub/7.png)"),
        (swap, "data.train: 2 with different contents (a/1.png, …)"),
    ],
)
def test_a_changed_file_of_a_folder_is_named_and_update_reaches_the_teacher(
    folder, tmp_path, capsys, change, words
):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    before, times = run.digest, (folder / "a").stat().st_mtime_ns
    change(folder)
    os.utime(folder / "a", ns=(times, times))  # not even the folder's time may show it
    assert run.status("pack") == (
        Status.STALE,
        f"made from a different config or inputs: {words}",
    )
    for _ in range(2):  # a refusal changes nothing: the next run gives the same message
        assert run() == 2
        assert words in capsys.readouterr().err
    assert run("--update") == 0
    assert run.digest != before
    assert run() == 0


def test_checksums_that_are_recorded_later_index_again_and_keep_the_teacher(folder, tmp_path):
    """Student and graph depend on the field, the teacher on the digest."""
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    before = run.digest
    run.set(checksums="true")
    assert run.status("pack")[0] is Status.COMPLETE
    status, why = run.status("index")
    assert status is Status.STALE
    assert why.endswith("data.checksums: False -> True")
    assert run("--update") == 0
    assert run.digest == before
    assert load_manifest(tmp_path / "run" / "manifest" / "train.arrow").crc_N is not None


def test_touched_and_copied_files_are_the_same_files(folder, tmp_path, capsys):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    before = run.digest
    for path in folder.rglob("*"):
        os.utime(path, (1, 1))
    assert run.status("pack")[0] is Status.COMPLETE
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    run.set(train=tmp_path / "copy")
    assert run() == 0
    assert "old results" not in capsys.readouterr().err
    assert run.digest == before


def test_packed_images_are_not_needed_any_more(folder, tmp_path, capsys):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    shutil.rmtree(folder)
    assert run() == 0
    assert "there is no such folder" in capsys.readouterr().err
    run.set(train=tmp_path / "elsewhere")  # a path that the run doesn't know is an error
    assert run() == 2


def test_a_disk_that_is_not_mounted_costs_no_shards(folder, tmp_path, capsys):
    """The mount point exists, but it is empty."""
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    shutil.rmtree(folder)
    folder.mkdir()
    for options in ([], ["--update"]):
        assert run(*options) == 0
        assert "had class folders, but has none now" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.old-*"))


def test_what_a_killed_pack_left_is_removed(folder, tmp_path):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    before = {path.name for path in (tmp_path / "run" / "shards").iterdir()}
    for name in ("shards/.train-000000.tar.7.tmp", "manifest/.train.arrow.7.tmp"):
        (tmp_path / "run" / name).write_bytes(bytes(512))
    (tmp_path / "run" / "shards" / "train-000000.tar").unlink()
    (tmp_path / "run" / "manifest" / "train.arrow").unlink()
    assert run() == 0
    assert {path.name for path in (tmp_path / "run" / "shards").iterdir()} == before
    assert not list((tmp_path / "run" / "manifest").glob(".*.tmp"))


def test_contents_are_read_once(folder, tmp_path, monkeypatch):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    read = []
    real = fingerprint._content
    monkeypatch.setattr(fingerprint, "_content", lambda seen: read.append(seen.name) or real(seen))
    assert run() == 0
    assert sorted(read) == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    read.clear()
    os.utime(folder / "a" / "2.png", (1, 1))
    assert run() == 0
    assert set(read) == {"a/2.png"}
    read.clear()
    assert run() == 0
    assert read == []


def test_an_equal_length_and_time_hides_a_change_until_update_reads_again(folder, tmp_path):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    before = run.digest
    rewrite(folder / "a" / "3.png", flipped(folder / "a" / "3.png"))
    assert run("--update") == 0
    assert run.digest != before


def test_which_files_train_and_which_test_is_in_the_key(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "e")
    correct(tmp_path / "e")
    run = Run(tmp_path / "run", "imagefolder", train=folder, test=tmp_path / "e")
    assert run() == 0
    before = run.digest
    run.set(train=tmp_path / "e", test=folder)
    status, why = run.status("pack")
    assert status is Status.STALE
    assert "data.train: 1 with" in why
    assert "data.test: 1 with" in why
    assert run("--update") == 0
    assert run.digest != before


def test_images_behind_links_count_and_what_is_never_packed_does_not(folder, tmp_path):
    (tmp_path / "d2").mkdir()
    (tmp_path / "d2" / "a").symlink_to(folder / "a")
    (folder / "a" / "sub" / "up").symlink_to(folder / "a")
    (folder / "a" / "broken.png").symlink_to("nowhere")
    (folder / "a" / ".hidden").touch()
    (folder / "a" / "notes.txt").write_text("no image")
    seen = fingerprint.list_files(str(tmp_path / "d2"), "imagefolder", ask=False, brief=False)
    found = {s.name: s.bytes for s in seen}
    assert {n: (folder / n).stat().st_size for n in found} == found
    assert set(found) == {f"a/{'sub/' * (i > 3)}{i}.png" for i in range(8)}


def test_of_very_large_sets_the_times_count(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "READ_BYTES", 1)
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    os.utime(folder / "a" / "2.png", (1, 1))
    assert "data.train: 1 with different times (a/2.png)" in run.status("pack")[1]
    assert run("--update") == 0
