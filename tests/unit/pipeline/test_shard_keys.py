"""Keys follow the contents of shards that were moved, corrected or replaced remotely, and of their class lists."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.data.index import fingerprint
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.ledger import Status
from tests.support import servers
from tests.support.shards import make_shards, random_images, write_tar
from tests.unit.pipeline.test_keys import Run, flipped, folder, rewrite  # noqa: F401


@pytest.fixture
def shards(tmp_path) -> Path:
    make_shards(tmp_path / "s", random_images(16, 16, 16), np.arange(16) % 2, shard_size=8)
    return tmp_path / "s"


def test_manifests_follow_shards_that_have_moved(shards, tmp_path, capsys):
    run = Run(tmp_path / "run", "shards", train=f"{shards}/*.tar")
    assert run() == 0
    before = run.digest
    shards.rename(tmp_path / "moved")
    run.set(train=f"{tmp_path}/moved/*.tar")
    assert run() == 0
    assert "the shards have moved" in capsys.readouterr().err
    for name in ("train", "test"):
        manifest = Manifest.load(tmp_path / "run" / "manifest" / f"{name}.arrow")
        assert {Path(s.path).parent for s in manifest.shards} == {tmp_path / "moved"}
        manifest.check_shards()
    assert run.status("index")[0] is Status.COMPLETE
    assert run.digest == before
    assert run() == 0
    assert "moved" not in capsys.readouterr().out.replace(str(tmp_path), "")


def test_manifests_follow_a_run_that_has_moved_with_its_shards(folder, tmp_path):
    run = Run(tmp_path / "run", "imagefolder", train=folder)
    assert run() == 0
    (tmp_path / "run").rename(tmp_path / "other")
    again = Run(tmp_path / "other", "imagefolder", train=folder)
    assert again() == 0
    manifest = Manifest.load(tmp_path / "other" / "manifest" / "train.arrow")
    assert {Path(s.path).parent for s in manifest.shards} == {tmp_path / "other" / "shards"}


@pytest.mark.parametrize("what", ["labels", "images"])
def test_shards_corrected_in_place_at_equal_length(shards, tmp_path, what):
    run = Run(tmp_path / "run", "shards", train=f"{shards}/*.tar")
    assert run() == 0
    before = run.digest
    path = sorted(shards.glob("*.tar"))[0]
    size = path.stat().st_size
    images, labels = random_images(16, 16, 16), np.arange(16) % 2
    if what == "labels":
        make_shards(shards, images, 1 - labels, shard_size=8)
    else:
        path.write_bytes(path.read_bytes().replace(b"IEND", b"IENd"))
    assert path.stat().st_size == size
    status, why = run.status("index")
    assert status is Status.STALE
    assert "data.train: " in why
    assert "shard-000000.tar" in why
    assert run() == 2
    assert run("--update") == 0
    assert run.digest != before


def test_a_remote_shard_that_was_replaced_is_noticed_without_reading_it(tmp_path):
    images = random_images(8, 16, 16)
    make_shards(tmp_path / "s", images, np.arange(8) % 2, shard_size=4)
    with servers.http_server(tmp_path / "s") as served:
        served.tagged = True
        run = Run(tmp_path / "run", "shards", train=f"{served.url}/shard-{{000000..000001}}.tar")
        assert run() == 0
        before, sent = run.digest, served.sent
        assert run() == 0
        path = tmp_path / "s" / "shard-000001.tar"
        path.write_bytes(path.read_bytes().replace(b"IEND", b"IENd"))
        status, why = run.status("index")
        assert status is Status.STALE
        assert "1 with different contents (shard-000001.tar)" in why
        assert served.sent == sent
        assert run() == 2
        assert run("--update") == 0
        assert run.digest != before


def test_of_a_store_without_tags_update_reads_again(tmp_path):
    make_shards(tmp_path / "s", random_images(8, 16, 16), np.arange(8) % 2, shard_size=8)
    with servers.http_server(tmp_path / "s") as served:
        run = Run(tmp_path / "run", "shards", train=f"{served.url}/shard-000000.tar")
        assert run() == 0
        before = run.digest
        assert run("--update") == 0
        assert run.digest == before  # read and found the same: nothing is retrained
        path = tmp_path / "s" / "shard-000000.tar"
        path.write_bytes(path.read_bytes().replace(b"IEND", b"IENd"))
        assert run("--update") == 0
        assert run.digest != before
    assert run() == 0  # the server is gone: reported, and treated as unchanged


def test_names_count_from_what_files_have_in_common(tmp_path):
    for place in ("x/1", "x/2"):
        write_tar(tmp_path / place / "t.tar", [("a.cls", b"0")])
    seen = fingerprint.list_files(
        [f"{tmp_path}/x/1/t.tar", f"{tmp_path}/x/2/t.tar"], "shards", ask=False, brief=False
    )
    assert [s.name for s in seen] == ["1/t.tar", "2/t.tar"]
    assert fingerprint._remote_names(["http://h/d/1/t.tar?sig=a", "s3://b/d/2/t.tar"]) == [
        "1/t.tar",
        "2/t.tar",
    ]


def test_shards_of_one_name_in_two_stores_both_count(tmp_path):
    near = tmp_path / "0.tar"
    near.write_bytes(b"0" * 10)
    places = ["s3://one/d/0.tar?signed=1", "s3://two/d/0.tar", str(near)]

    def found(*tags: str, before: fingerprint.Fingerprint | None = None) -> fingerprint.Fingerprint:
        seen = [
            fingerprint.FileStat("0.tar", place, 10, 0, tag)
            for place, tag in zip(places, [*tags, ""], strict=True)
        ]
        return fingerprint.fingerprint(places, seen, before)

    first = found("a", "b")
    assert found("a", "b", before=first) == first
    for tags, changed in ((("c", "b"), "s3://one/d/0.tar"), (("a", "c"), "s3://two/d/0.tar")):
        after = found(*tags, before=first)
        assert fingerprint.difference(first, after) == f"1 with different contents ({changed})"
    near.write_bytes(b"1" * 10)
    assert fingerprint.difference(first, found("a", "b")) == "1 with different contents (0.tar)"


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (["a", "b"], ["b", "a"], "data.train: 1 with different contents (shard-classes.json)"),
        (None, ["a", "b"], "data.train: 1 added (shard-classes.json)"),
        (["a", "b"], None, "data.train: 1 removed (shard-classes.json)"),
    ],
)
def test_lists_of_class_names_beside_shards_count(shards, tmp_path, before, after, words):
    def write(names: list[str] | None) -> None:
        path = shards / "shard-classes.json"
        path.unlink(missing_ok=True)
        if names:
            path.write_text(json.dumps(names))

    write(before)
    run = Run(tmp_path / "run", "shards", train=f"{shards}/*.tar")
    assert run() == 0
    assert run.status("index")[0] is Status.COMPLETE
    write(after)
    status, why = run.status("index")
    assert status is Status.STALE
    assert words in why
    assert run() == 2
    assert run("--update") == 0
    manifest = Manifest.load(tmp_path / "run" / "manifest" / "train.arrow")
    assert manifest.classes == tuple(after or "01")
    assert run() == 0
