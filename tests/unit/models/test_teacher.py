"""Teachers: the small-image variant, weights from files, and errors that a user can fix."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.teacher import build_teacher, check_classifier, fit_small_images

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


def small_teacher(num_classes: int = 5, image_size: int = 32) -> nn.Module:
    return build_teacher("resnet18", num_classes, image_size, args=SMALL)


@pytest.mark.parametrize(
    "arch", ["resnet18", "resnet50", "mobilenetv3_small_100", "convnext_atto", "resnet18d"]
)
def test_builds_and_classifies(arch: str) -> None:
    network = build_teacher(arch, 7, 32).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("arch", "size", "side"),
    [("resnet18", 32, 4), ("resnet18", 64, 8), ("resnet18", 96, 3), ("resnet18d", 32, 4)],
)
def test_small_images_keep_their_resolution(arch: str, size: int, side: int) -> None:
    network = build_teacher(arch, 3, size, args=SMALL).eval()
    with torch.no_grad():
        features = network.forward_features(torch.randn(1, 3, size, size))
    assert features.shape[2:] == (side, side)


def test_large_images_keep_timms_network() -> None:
    network = build_teacher("resnet18", 3, 96)
    assert network.conv1.kernel_size == (7, 7)
    assert isinstance(network.maxpool, nn.MaxPool2d)


def test_other_families_are_left_alone() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 7, stride=2))
    before = str(network)
    assert not fit_small_images(network)
    assert str(network) == before


def test_arguments_make_a_smaller_network() -> None:
    small = sum(p.numel() for p in small_teacher().parameters())
    large = sum(p.numel() for p in build_teacher("resnet18", 5, 32).parameters())
    assert small < large / 100


def test_transformer_takes_the_image_size() -> None:
    network = build_teacher("vit_tiny_patch16_224", 4, 64, args={"depth": 1})
    assert network(torch.randn(1, 3, 64, 64)).shape == (1, 4)


def test_unknown_network_names_the_nearest() -> None:
    with pytest.raises(UserError, match="resnt50") as raised:
        build_teacher("resnt50", 10, 32)
    assert "resnet50" in raised.value.remedy


def test_unknown_argument_is_named() -> None:
    with pytest.raises(UserError, match="layerz") as raised:
        build_teacher("resnet18", 10, 32, args={"layerz": 3})
    assert "teacher.args" in raised.value.where


def test_unknown_pretrained_tag_is_the_users_error() -> None:
    with pytest.raises(UserError, match="nonsense") as raised:
        build_teacher("resnet18.nonsense", 10, 32)
    assert "resnet18.a1_in1k" in raised.value.remedy
    assert build_teacher("resnet18.a1_in1k", 10, 32, args=SMALL) is not None


def test_pretrained_out_of_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="resnet18") as raised:
        build_teacher("resnet18", 10, 32, pretrained=True, args={"cache_dir": str(tmp_path)})
    assert "teacher.weights" in raised.value.remedy
    assert "HF_HUB_OFFLINE" in raised.value.remedy


def test_two_sources_of_weights_are_refused() -> None:
    with pytest.raises(UserError, match="both set"):
        build_teacher("resnet18", 10, 32, pretrained=True, weights="x.pth")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped", "ddp"])
def test_weights_from_a_file(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = small_teacher()
    state = source.state_dict()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        save_file(state, str(path))
    elif kind == "wrapped":
        torch.save({"state_dict": state}, path)
    else:
        torch.save({f"module.{n}" if kind == "ddp" else n: t for n, t in state.items()}, path)
    loaded = build_teacher("resnet18", 5, 32, weights=str(path), args=SMALL)
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in state.items())


def test_another_classifier_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = small_teacher(num_classes=9)
    path = tmp_path / "w.pth"
    torch.save(source.state_dict(), path)
    with caplog.at_level(logging.WARNING):
        loaded = build_teacher("resnet18", 5, 32, weights=str(path), args=SMALL)
    assert "fc.weight" in caplog.text
    assert loaded.fc.weight.shape[0] == 5
    assert torch.equal(loaded.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    headless = build_teacher("resnet18", 0, 32, weights=str(path), args=SMALL)
    assert torch.equal(headless.conv1.weight, source.conv1.weight)


def test_another_first_layer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save(small_teacher(image_size=96).state_dict(), path)
    with pytest.raises(UserError, match=r"conv1\.weight") as raised:
        build_teacher("resnet18", 5, 32, weights=str(path), args=SMALL)
    assert "3×3" in raised.value.remedy


def test_missing_layers_are_named(tmp_path: Path) -> None:
    state = small_teacher().state_dict()
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"missing: layer2\.0\.conv1\.weight"):
        build_teacher("resnet18", 5, 32, weights=str(tmp_path / "w.pth"), args=SMALL)


class NotATensor:
    pass


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_unreadable_weights_are_the_users_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    with pytest.raises(UserError, match="does not exist"):
        build_teacher("resnet18", 5, 32, weights=str(path), args=SMALL)
    path.write_bytes(b"not weights at all")
    with pytest.raises(UserError, match="can't be read"):
        build_teacher("resnet18", 5, 32, weights=str(path), args=SMALL)


def test_files_that_run_code_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": NotATensor()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="can't be read"):
        build_teacher("resnet18", 5, 32, weights=str(tmp_path / "w.pth"), args=SMALL)
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(UserError, match="does not contain a dict of named tensors"):
        build_teacher("resnet18", 5, 32, weights=str(tmp_path / "list.pth"), args=SMALL)


def test_a_network_that_is_not_trained_needs_its_classifier(tmp_path: Path) -> None:
    path = str(tmp_path / "w.safetensors")
    save_file(small_teacher(5).state_dict(), path)
    check_classifier(small_teacher(5), path)
    with pytest.raises(UserError, match=r"fc\.weight \(5, 16\), expected \(7, 16\)"):
        check_classifier(small_teacher(7), path)
