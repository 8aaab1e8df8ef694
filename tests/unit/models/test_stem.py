"""Stems: shapes, sizes, costs; normalization; the counters of operations themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cnn2gnn_dist import compat, settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.cost import count_flops, count_parameters
from cnn2gnn_dist.models.normalise import Normalise, shrunk
from cnn2gnn_dist.models.stem import build_stem, load_stem
from cnn2gnn_dist.models.teacher import build_teacher
from cnn2gnn_dist.stages.shared.networks import build_student, check_early_size


@pytest.mark.parametrize("name", ["conv3", "resnet_tiny", "mobilenetv3_small_100", "resnet10t"])
@pytest.mark.parametrize("size", [32, 64])
def test_features_have_the_asked_size(name: str, size: int) -> None:
    torch.manual_seed(0)
    stem = build_stem(name, 24, size)
    assert stem.training
    x_BD = stem(torch.randn(3, 3, size, size))
    assert x_BD.shape == (3, 24)
    assert (x_BD >= 0).all()
    assert (x_BD > 0).any()
    x_BD.sum().backward()
    assert all(p.grad is not None for p in stem.parameters())


def test_transformers_are_built_for_the_image_size() -> None:
    stem = build_stem("vit_tiny_patch16_224", 8, 48, depth=1)
    assert stem(torch.randn(2, 3, 48, 48)).shape == (2, 8)


@pytest.mark.parametrize("name", ["conv3", "resnet_tiny"])
def test_large_images_are_reduced_by_the_first_layers(name: str) -> None:
    small = count_flops(build_stem(name, 16, 64), torch.zeros(1, 3, 64, 64))
    assert count_flops(build_stem(name, 16, 128), torch.zeros(1, 3, 128, 128)) < 2 * small
    assert count_flops(build_stem(name, 16, 224), torch.zeros(1, 3, 224, 224)) < 2 * small


def test_resnet_tiny_is_of_the_stated_size() -> None:
    stem = build_stem("resnet_tiny", 128, 32, widths=[12, 24, 48])
    multiply_adds = count_flops(stem, torch.zeros(1, 3, 32, 32)) / 2
    assert 6.5e6 < multiply_adds < 7.5e6
    deeper = build_stem("resnet_tiny", 128, 32, blocks=2)
    assert count_parameters(deeper) > count_parameters(stem)


def test_readout_sees_where_things_are() -> None:
    torch.manual_seed(0)
    stem = build_stem("resnet_tiny", 32, 32).eval()
    images = torch.randn(1, 3, 32, 32)
    mirrored = images.flip(3)
    assert (stem(images) - stem(mirrored)).abs().max() > 1e-4


def test_unknown_names_and_arguments_are_named() -> None:
    with pytest.raises(UserError, match="resnet_tinny") as raised:
        build_stem("resnet_tinny", 8, 32)
    assert "resnet_tiny" in raised.value.remedy
    with pytest.raises(UserError, match="width") as raised:
        build_stem("resnet_tiny", 8, 32, width=[1, 2])
    assert "widths, blocks" in raised.value.remedy


def test_normalise_equals_the_definition() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalise = Normalise(mean, std)
    images = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    out = normalise(images)
    expected = (images.permute(0, 3, 1, 2).float() / 255 - torch.tensor(mean)[:, None, None]) / (
        torch.tensor(std)[:, None, None]
    )
    assert out.shape == (2, 3, 5, 4)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(normalise(images.float()), out)
    assert not list(normalise.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(normalise(images), out)


def test_flops_count_two_a_multiply_add() -> None:
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert count_flops(conv, torch.zeros(1, 3, 10, 10)) == 2 * 3 * 8 * 9 * 100
    linear = nn.Linear(7, 5)
    assert count_flops(linear, torch.zeros(4, 7)) == 2 * 4 * 7 * 5
    assert count_flops(lambda a, b: a @ b, torch.zeros(2, 3), torch.zeros(3, 4)) == 2 * 2 * 3 * 4
    assert count_parameters(linear) == 40
    linear.bias.requires_grad_(False)
    assert count_parameters(linear) == 35


def test_counting_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    model[0].eval()
    count_flops(model, torch.ones(3, 4))
    assert model[1].training
    assert not model[0].training
    assert model[1].num_batches_tracked == 0
    assert all(p.grad is None for p in model.parameters())


SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}


@pytest.mark.parametrize("name", ["conv3", "resnet18"])
@pytest.mark.parametrize("prefix", ["", "stem."])
def test_a_stem_from_a_file(name: str, prefix: str, tmp_path: Path) -> None:
    """Under its own names, or under a student's, whose other parts are ignored."""
    args = SMALL if name == "resnet18" else {}
    torch.manual_seed(1)
    first = build_stem(name, 16, 32, **args)
    state = {f"{prefix}{n}": t for n, t in first.state_dict().items()}
    if prefix:
        state["gnn.self1.weight"] = torch.zeros(2, 2)
    save_file(state, tmp_path / "s.safetensors")
    torch.manual_seed(2)
    other = build_stem(name, 16, 32, **args)
    load_stem(other, str(tmp_path / "s.safetensors"))
    assert all(torch.equal(t, first.state_dict()[n]) for n, t in other.state_dict().items())


def test_a_timm_stem_takes_its_networks_weights_without_classifier(tmp_path: Path) -> None:
    network = build_teacher("resnet18", 7, 32, args=SMALL)
    save_file(network.state_dict(), tmp_path / "n.safetensors")
    stem = build_stem("resnet18", 16, 32, **SMALL)
    load_stem(stem, str(tmp_path / "n.safetensors"))
    assert torch.equal(stem.network.conv1.weight, network.conv1.weight)


def test_a_timm_network_may_have_a_stem_of_its_own(tmp_path: Path) -> None:
    """ConvNeXt's first layers are named "stem", as a student's stem is."""
    args = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    network = build_teacher("convnext_atto", 7, 64, args=args)
    assert "stem.0.weight" in network.state_dict()
    save_file(network.state_dict(), tmp_path / "n.safetensors")
    stem = build_stem("convnext_atto", 16, 64, **args)
    load_stem(stem, str(tmp_path / "n.safetensors"))
    for name, tensor in stem.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


def test_weights_of_another_stem_are_refused(tmp_path: Path) -> None:
    save_file(build_stem("conv3", 16, 32).state_dict(), tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="don't fit") as raised:
        load_stem(build_stem("conv3", 20, 32), str(tmp_path / "s.safetensors"))
    assert "student.dim" in raised.value.remedy
    with pytest.raises(UserError, match="does not exist") as raised:
        load_stem(build_stem("conv3", 20, 32), str(tmp_path / "t.safetensors"))


def test_a_trained_stem_needs_no_initial_weights(tmp_path: Path) -> None:
    """What it started from may be gone, or on another machine."""
    args = f"{{layers: [1, 1, 1, 1], channels: [8, 8, 16, 16], weights: {tmp_path}/gone.pth}}"
    config = settings.load("demo", ["student.stem=resnet18", f"student.stem_args={args}"])
    with pytest.raises(UserError, match="does not exist"):
        build_student(config, 10, "none")
    made = build_student(config, 10, "none", initial=False)
    assert made.stem.network.layer1[0].conv1.out_channels == 8


def test_shrunk_images_are_torchvisions() -> None:
    compat.import_torchvision()
    from torchvision.transforms.v2 import functional

    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    wanted = functional.resize(images.permute(0, 3, 1, 2).float(), [24, 24], antialias=True)
    torch.testing.assert_close(shrunk(images, 24), wanted.permute(0, 2, 3, 1))
    assert shrunk(images, 32) is images


def test_a_network_that_takes_no_smaller_images_is_refused() -> None:
    config = settings.load("demo", ["student.early_size=8", "views.size=32"])
    student = build_student(config, 10, "none")
    check_early_size(student, student.stem, config.student, "student")
    assert student.stem.training
    overrides = [
        "student.stem=vit_tiny_patch16_224",
        "student.stem_args={depth: 1}",
        "views.size=32",
    ]
    config = settings.load("demo", ["student.early_size=16", *overrides])
    student = build_student(config, 10, "none")
    with pytest.raises(UserError, match="can't take images of 16 pixels"):
        check_early_size(student, student.stem, config.student, "student")
    with pytest.raises(UserError, match="early ones must be smaller"):
        settings.load("demo", ["teacher.early_size=32", "views.size=32"])
