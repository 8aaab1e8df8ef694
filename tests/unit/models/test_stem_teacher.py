"""Stems and teachers as the presets name them: resolution, weights from files, no network access."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

import cnn2gnn_dist
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.models.teacher import build_teacher

PACKAGE = Path(cnn2gnn_dist.__file__).parent
SMALL = {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}


def side_after_first_layers(network: nn.Module, size: int) -> list[int]:
    """Side lengths after conv1 and before layer1, measured by running them."""
    sides: list[int] = []
    first = network.conv1.register_forward_hook(lambda m, i, out: sides.append(out.shape[-1]))
    last = network.layer1.register_forward_pre_hook(lambda m, i: sides.append(i[0].shape[-1]))
    with torch.no_grad():
        network.eval()(torch.zeros(1, 3, size, size))
    first.remove()
    last.remove()
    return sides


@pytest.mark.parametrize(
    ("arch", "size", "sides"),
    [
        ("resnet18", 32, [32, 32]),
        ("resnet18", 64, [64, 64]),
        ("resnet18d", 32, [32, 32]),
        ("resnet18", 65, [33, 17]),
        ("resnet18", 224, [112, 56]),
    ],
)
def test_small_images_keep_their_pixels(arch: str, size: int, sides: list[int]) -> None:
    assert side_after_first_layers(build_teacher(arch, 4, size, args=SMALL), size) == sides


def test_small_resnet18_has_the_asked_widths() -> None:
    network = build_teacher("resnet18", 10, 32, args=SMALL)
    for number, width in enumerate(SMALL["channels"], start=1):
        layer = getattr(network, f"layer{number}")
        assert len(layer) == 1
        assert layer[0].conv2.out_channels == width
    assert network.fc.weight.shape == (10, 128)
    assert network.conv1.kernel_size == (3, 3)
    logits = network(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 10)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_stems_and_teachers_of_every_preset_are_built() -> None:
    presets = sorted((PACKAGE / "presets").glob("*.yaml"))
    assert presets
    for preset in presets:
        told = yaml.safe_load(preset.read_text(encoding="utf-8"))
        size = told["views"]["size"]
        student, teacher = told["student"], told["teacher"]
        images = torch.zeros(1, 3, size, size)
        stem = build_stem(student["stem"], 16, size, **student.get("stem_args", {})).eval()
        network = build_teacher(teacher["arch"], 3, size, args=teacher.get("args", {})).eval()
        with torch.no_grad():
            assert stem(images).shape == (1, 16), preset.name
            assert network(images).shape == (1, 3), preset.name


@pytest.mark.parametrize("name", ["conv3", "resnet_tiny", "resnet18"])
@pytest.mark.parametrize("size", [16, 33, 100])
def test_any_image_size_gives_the_asked_features(name: str, size: int) -> None:
    args = SMALL if name == "resnet18" else {}
    stem = build_stem(name, 12, size, **args).eval()
    with torch.no_grad():
        x_BD = stem(torch.randn(2, 3, size, size))
    assert x_BD.shape == (2, 12)
    assert (x_BD >= 0).all()


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_a_stem_takes_the_features_of_a_classifiers_file(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = build_teacher("resnet18", 7, 32, args=SMALL).eval()
    path = tmp_path / f"teacher.{suffix}"
    if suffix == "pth":
        torch.save(source.state_dict(), path)
    else:
        save_file(source.state_dict(), str(path))
    loaded = build_teacher("resnet18", 7, 32, weights=str(path), args=SMALL).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), source(images))
        stem = build_stem("resnet18", 12, 32, weights=str(path), **SMALL).eval()
        features = source.forward_head(source.forward_features(images), pre_logits=True)
        torch.testing.assert_close(stem.network(images), features)


@pytest.mark.parametrize(
    ("asked", "near"),
    [("resnet81", "resnet18"), ("conv_next_tiny", "convnext_tiny"), ("con3", "conv3")],
)
def test_similar_names_are_suggested(asked: str, near: str) -> None:
    with pytest.raises(UserError, match=asked) as raised:
        build_stem(asked, 8, 32)
    assert near in raised.value.remedy
    if near != "conv3":
        with pytest.raises(UserError, match=asked) as raised:
            build_teacher(asked, 8, 32)
        assert near in raised.value.remedy


@pytest.mark.parametrize("asked", ["", "???", "a/b", "hf_hub:someone/something"])
def test_names_without_a_similar_one_are_the_users_error(asked: str) -> None:
    with pytest.raises(UserError, match="no network named"):
        build_teacher(asked, 8, 32)


def test_the_seed_decides_the_first_values() -> None:
    """Resumed and repeated runs start from the same weights, those of the replaced first layer included."""
    for name, args in (("resnet18", SMALL), ("resnet_tiny", {}), ("conv3", {})):
        made = []
        for _ in range(2):
            torch.manual_seed(3)
            made.append(build_stem(name, 8, 32, **args).state_dict())
        assert all(torch.equal(tensor, made[1][key]) for key, tensor in made[0].items())
