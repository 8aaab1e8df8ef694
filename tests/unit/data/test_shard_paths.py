"""Which files a pattern, a folder or a list stands for, and what is refused, with its remedy."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import fsspec
import pytest

from cnn2gnn_dist.data.index.manifest import expand
from cnn2gnn_dist.data.storage.folders import refuse_parts_as_classes
from cnn2gnn_dist.data.storage.shard_paths import files_of
from cnn2gnn_dist.errors import UserError
from tests.support.shards import write_tar


def test_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a-00.tar", "a-01.tar", "a-02.tar", "b.tar", "odd{1}.tar"):
        write_tar(tmp_path / name, [])
    (tmp_path / "notes.txt").touch()
    monkeypatch.chdir(tmp_path)
    assert expand("a-{00..02}.tar") == ["a-00.tar", "a-01.tar", "a-02.tar"]
    assert expand("a-*.tar") == expand("a-{00..02}.tar")
    assert expand(["b.tar", "a-0[01].tar", "a-{01,02}.tar"]) == [
        *["b.tar", "a-00.tar", "a-01.tar", "a-02.tar"]
    ]
    assert len(expand(str(tmp_path))) == 5
    assert expand(tmp_path)[0] == str(tmp_path / "a-00.tar")
    assert expand("odd{1}.tar") == ["odd{1}.tar"]
    (tmp_path / "none").mkdir()
    for pattern, message in [
        ("a-{00..05}.tar", r"no such shard \(2 more are missing\)"),
        ("c-*.tar", "no such shard"),
        ("none", "contains no .tar files"),
        ([], "no shards were given"),
        ("a-{00..01.tar", "braces"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            expand(pattern)
        assert caught.value.remedy
    with pytest.raises(UserError) as caught:
        expand("a-{00..05}.tar")
    assert caught.value.where.startswith("a-03.tar, from")


def test_a_folder_means_its_files_of_the_source(tmp_path: Path) -> None:
    hub = tmp_path / "hub"  # Hugging Face's repository layout
    (hub / "data").mkdir(parents=True)
    for name in ("data/train-1.parquet", "data/train-0.parquet", "data/._train-0.parquet", "a.md"):
        (hub / name).touch()
    expected = [str(hub / "data" / f"train-{n}.parquet") for n in (0, 1)]
    assert files_of("parquet", str(hub)) == files_of("parquet", str(hub / "data")) == expected
    assert files_of("parquet", f"{hub}/data/*.parquet") == expected
    assert files_of("parquet", f"{hub}/*a") == expected  # a glob of folders
    (hub / "data" / "test-0.parquet").touch()
    with pytest.raises(
        UserError, match=r"several splits .*'test-0.parquet', 'train-0.parquet'"
    ) as e:
        files_of("parquet", str(hub))
    named, everything = re.findall(r"'([^']*)'", e.value.remedy)
    assert files_of("parquet", named) == expected  # the remedy works
    assert len(files_of("parquet", everything)) == 3
    for url in ("https://h/train.parquet", "hf://datasets/x/a.parquet", "s3://b/*.parquet"):
        with pytest.raises(UserError, match="only be read from disk"):
            files_of("parquet", url)


@pytest.mark.parametrize(
    ("files", "source", "says"),
    [
        (["a.parquet"], "shards", "data.source=parquet"),
        (["cat/1.jpg", "dog/1.jpg"], "shards", "data.source=imagefolder"),
        (["cat/1.jpg", "dog/1.jpg"], "parquet", "data.source=imagefolder"),
        (["a.tar"], "parquet", "data.source=shards"),
        (["deep/er/a.tar"], "shards", "deep/er"),
        (["default/train/a.parquet"], "parquet", "default/train"),
    ],
)
def test_a_folder_of_another_source_says_which(
    tmp_path: Path, files: list[str], source: str, says: str
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"the folder contains no \.") as caught:
        files_of(source, str(tmp_path))
    assert caught.value.where == str(tmp_path)
    assert says in caught.value.remedy


def test_a_folder_of_training_and_held_out_shards_is_not_mixed(tmp_path: Path) -> None:
    for name in ("x-train-000000.tar", "x-train-000001.tar", "x-validation-000000.tar"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="several splits") as caught:
        expand(str(tmp_path))
    named = re.findall(r"'([^']*)'", caught.value.remedy)[0]
    assert [Path(path).name for path in expand(named)] == [
        *("x-train-000000.tar", "x-train-000001.tar")
    ]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", denied)
    with pytest.raises(UserError, match="can't be read: Permission denied") as caught:
        expand(str(tmp_path))
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize(
    ("names", "mixed"),
    [
        (["images-000.tar", "images-001.tar", "test-000.tar"], True),
        (["holdout-000.tar", "x-000.tar"], True),
        (["trainval-000.tar", "test-000.tar"], True),
        (["trainval-000.tar", "trainval-001.tar"], False),
        (["test-000.tar", "test-001.tar"], False),  # to evaluate on
        (["extra-000.tar", "train-000.tar"], False),
        (["contest-000.tar", "latest.tar", "devices.tar"], False),
    ],
)
def test_held_out_shards_beside_others_are_not_trained_on(tmp_path, names, mixed) -> None:
    for name in names:
        (tmp_path / name).touch()
    remote = f"memory://{tmp_path.name}/"
    fsspec.filesystem("memory").pipe({f"/{tmp_path.name}/{name}": b"" for name in names})
    for place in (str(tmp_path), remote):
        if not mixed:
            assert [Path(path).name for path in expand(place)] == sorted(names)
            continue
        with pytest.raises(UserError, match="several splits") as caught:
            expand(place)
        everything = re.findall(r"'([^']*)'", caught.value.remedy)[-1]
        assert [Path(path).name for path in expand(everything)] == sorted(names)


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (["train", "val"], True),
        (["trainval", "test"], True),
        (["train"], True),
        (["Train", "Test2017", "annotations"], True),
        (["test", "train", "val"], True),
        (["car", "plane", "train"], False),  # the vehicle
        (["trainer", "valley"], False),
        (["cat", "dog"], False),
    ],
)
def test_parts_of_a_set_are_no_classes(tmp_path: Path, names: list[str], refused: bool) -> None:
    if not refused:
        refuse_parts_as_classes(str(tmp_path), names)
        return
    with pytest.raises(UserError, match="splits of a data set") as caught:
        refuse_parts_as_classes(str(tmp_path), names)
    assert f"data.train={tmp_path}/" in caught.value.remedy
