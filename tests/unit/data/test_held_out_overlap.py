"""Held-out images that are also training images are found by length and checksum, in a bounded sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.data.index import held_out_overlap
from cnn2gnn_dist.data.index.held_out_overlap import overlap_note
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.storage import urls
from tests.support.shards import make_shards, random_images, write_tar


def manifest(path: Path, payloads: list[bytes], checksums: bool = False) -> Manifest:
    members = [
        member
        for n, data in enumerate(payloads)
        for member in ((f"{n}.cls", b"0"), (f"{n}.jpg", data))
    ]
    return index([write_tar(path, members)], checksums=checksums)


def payloads(count: int, seed: int, size: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(size or int(rng.integers(100, 2000))) for _ in range(count)]


@pytest.mark.parametrize("checksums", [(False, False), (True, False), (False, True), (True, True)])
def test_twins_are_counted_whatever_checksums_there_are(tmp_path: Path, checksums) -> None:
    train, others = payloads(40, 0), payloads(12, 1)
    a = manifest(tmp_path / "a.tar", train, checksums[0])
    b = manifest(tmp_path / "b.tar", [*others, *train[:7], train[3]], checksums[1])
    assert overlap_note(a, b) == (
        "8 of 20 checked held-out images are byte-identical to training images: the results are too optimistic"
    )
    assert overlap_note(a, manifest(tmp_path / "c.tar", others)) is None


def test_an_equal_length_is_not_enough_and_without_one_nothing_is_read(
    tmp_path: Path, monkeypatch
) -> None:
    a = manifest(tmp_path / "a.tar", payloads(9, 0, size=300))
    assert overlap_note(a, manifest(tmp_path / "b.tar", payloads(9, 1, size=300))) is None
    c = manifest(tmp_path / "c.tar", payloads(9, 1, size=301))
    monkeypatch.setattr(urls, "read_range", lambda *_: pytest.fail("read"))
    assert overlap_note(a, c) is None


def test_what_is_read_is_bounded(tmp_path: Path, monkeypatch) -> None:
    train = payloads(30, 0, size=300) + payloads(30, 1, size=400)
    a, b = manifest(tmp_path / "a.tar", train), manifest(tmp_path / "b.tar", train)
    assert str(overlap_note(a, b)).startswith("60 of 60 ")
    monkeypatch.setattr(
        held_out_overlap, "MOST", 59
    )  # stop at the first image of the second length
    read: list[int] = []
    real = urls.read_range
    monkeypatch.setattr(
        urls,
        "read_range",
        lambda path, *at: read.append(path == a.shards[0].path) or real(path, *at),
    )
    looked = int(str(overlap_note(a, b)).split(" of ")[1].split()[0])
    assert 0 < looked < 60
    assert sum(read) == 30
    monkeypatch.setattr(held_out_overlap, "MOST_BYTES", 299)
    assert overlap_note(a, b) is None
    monkeypatch.undo()
    monkeypatch.setattr(held_out_overlap, "SAMPLE", 5)
    assert str(overlap_note(a, b)).startswith("5 of 5 ")


def test_index_reports_it(tmp_path: Path, console: None, capsys) -> None:
    images = random_images(12, 16, 16)
    make_shards(tmp_path / "a", images, np.arange(12) % 2, shard_size=12)
    make_shards(tmp_path / "b", images[:4], np.arange(4) % 2, keys=list("wxyz"))
    run = [f"run.dir={tmp_path}/run", "data.source=shards", f"data.train={tmp_path}/a"]
    assert cli.main(["index", "--config", "demo", *run, f"data.test={tmp_path}/b"]) == 0
    said = capsys.readouterr().err
    assert "note: 4 of 4 checked held-out images are byte-identical to training images" in said
