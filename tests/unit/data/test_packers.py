"""Packers: pixels and bytes survive, the same input gives the same shards, bad input is reported."""

from __future__ import annotations

import io
import json
import types
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnn2gnn_dist.data.images.formats import image_suffix
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.packing.packers import (
    pack_digits,
    pack_torchvision,
)
from cnn2gnn_dist.data.packing.shard_writer import NewSample, write_shards
from cnn2gnn_dist.data.tar import samples
from cnn2gnn_dist.errors import UserError
from tests.support.shards import random_images

IMAGES = random_images(6, 8, 8)


def contents(paths: list[Path]) -> list[tuple[str, dict[str, bytes]]]:
    found = []
    for path in paths:
        data = path.read_bytes()
        for sample in samples.samples(path):
            fields = {s: data[m.offset : m.offset + m.size] for s, m in sample.fields.items()}
            found.append((sample.key, fields))
    return found


def test_digits(tmp_path: Path) -> None:
    paths = pack_digits(tmp_path / "a", shard_size=1000)
    manifest = index(paths)
    assert [p.name for p in paths] == ["digits-000000.tar", "digits-000001.tar"]
    assert manifest.shard_sizes.tolist() == [1000, 797]
    assert manifest.classes == tuple("0123456789")
    assert json.loads((tmp_path / "a" / "digits-classes.json").read_text()) == list("0123456789")

    from sklearn.datasets import load_digits

    digits = load_digits()
    assert manifest.label_N.tolist() == digits.target.tolist()
    for row in (0, 999):
        sample = contents(paths[:1])[row][1]
        image = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert image.shape == (32, 32, 3)
        assert np.array_equal(image[..., 0], image[..., 2])
        # Smooth upsampling: downsampled again, it is close to the original.
        back = image[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(back.ravel(), digits.images[row].ravel())[0, 1] > 0.98


def test_same_input_same_bytes_and_rerun_replaces(tmp_path: Path) -> None:
    first = pack_digits(tmp_path / "a", shard_size=16, limit=40)
    second = pack_digits(tmp_path / "b", shard_size=16, limit=40)
    bytes_of = [p.read_bytes() for p in first]
    assert bytes_of == [p.read_bytes() for p in second]
    assert bytes_of == [
        p.read_bytes() for p in pack_digits(tmp_path / "a", shard_size=16, limit=40)
    ]
    assert len(list((tmp_path / "a").iterdir())) == 4  # three shards and the class names
    with pytest.raises(UserError, match="1 shards of an earlier, larger run") as caught:
        pack_digits(tmp_path / "a", shard_size=16, limit=32)
    assert caught.value.where.endswith("digits-000002.tar")
    pack_digits(tmp_path / "a", shard_size=16, limit=32, prefix="other")


def test_interrupted_pack_leaves_whole_shards_only(tmp_path: Path) -> None:
    def sources() -> Any:
        for i in range(3):
            yield NewSample(f"k{i}", b"x", "jpg", 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(
            sources(), 6, tmp_path, prefix="p", shard_size=2, classes=["a"], progress=False
        )
    assert [p.name for p in tmp_path.iterdir()] == ["p-000000.tar"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "a.b"}, "prefix 'a.b'"),
        ({"prefix": ""}, "prefix ''"),
        ({"shard_size": 0}, "shard size is 0"),
        ({"limit": 0}, "no images to pack"),
    ],
)
def test_arguments(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack_digits(tmp_path, **options)


def stub_torchvision(monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> None:
    class CIFAR10:
        url = "https://example.invalid/cifar-10.tar.gz"

        def __init__(self, root: str, train: bool, download: bool) -> None:
            if failure is not None:
                raise failure
            self.data = IMAGES if train else IMAGES[::-1]
            self.targets = [0, 1, 2, 0, 1, 2]
            self.classes = ["ant", "owl", "yak"]

    module = types.SimpleNamespace(datasets=types.SimpleNamespace(CIFAR10=CIFAR10))
    monkeypatch.setattr("cnn2gnn_dist.compat.import_torchvision", lambda: module)


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_torchvision(monkeypatch, None)
    train = pack_torchvision("cifar10", tmp_path, True, tmp_path / "out", shard_size=4)
    test = pack_torchvision("cifar10", tmp_path, False, tmp_path / "out", limit=3)
    assert [p.name for p in train + test] == [
        *["train-000000.tar", "train-000001.tar", "test-000000.tar"]
    ]
    assert index(train).classes == ("ant", "owl", "yak")
    pixels = [np.asarray(Image.open(io.BytesIO(f["png"]))) for _, f in contents(train)]
    assert np.array_equal(pixels, IMAGES)
    with pytest.raises(UserError, match="'mnist' cannot be packed"):
        pack_torchvision("mnist", tmp_path, True, tmp_path / "out")


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("unreachable"), RuntimeError("File not found or corrupted.")]
)
def test_torchvision_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    stub_torchvision(monkeypatch, failure)
    with pytest.raises(UserError, match="CIFAR10 is missing and cannot be downloaded") as caught:
        pack_torchvision("cifar10", tmp_path / "cifar", True, tmp_path / "out")
    assert caught.value.where == str(tmp_path / "cifar")
    assert "https://example.invalid" in caught.value.remedy


def test_torchvision_names_what_we_use() -> None:
    from cnn2gnn_dist.compat import import_torchvision

    for name in ("CIFAR10", "CIFAR100"):
        kind = getattr(import_torchvision().datasets, name)
        assert kind.url.startswith("https://")


def test_magic_bytes() -> None:
    for suffix, form in [
        *[("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("gif", "GIF"), ("bmp", "BMP")],
        *[("tif", "TIFF"), ("ppm", "PPM")],
    ]:
        file = io.BytesIO()
        Image.fromarray(IMAGES[0]).save(file, form)
        assert image_suffix(file.getvalue()) == suffix
    assert image_suffix(b"") is None
    assert image_suffix(b"<html>") is None
