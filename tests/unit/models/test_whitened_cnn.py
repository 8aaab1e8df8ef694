"""The CNN with a whitening first layer: its filters, its initial state, how it is built."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.models.teacher import build_teacher
from cnn2gnn_dist.models.whitened_cnn import WhitenedCNN, whitening


def images(count: int = 64, side: int = 12) -> torch.Tensor:
    """Smooth images: neighboring pixels and channels are correlated."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, side // 3, side // 3, generator=generator)
    fine = torch.randn(count, 3, side, side, generator=generator)
    mixed = F.interpolate(coarse, size=side, mode="bilinear") + 0.3 * fine
    return mixed + 0.5 * mixed.mean(1, keepdim=True)


def test_patches_have_unit_covariance_up_to_epsilon() -> None:
    x = images().double()
    filters = whitening(x)
    assert filters.shape == (24, 3, 2, 2)
    assert torch.equal(filters[12:], -filters[:12])
    rows = F.conv2d(x, filters[:12]).permute(0, 2, 3, 1).reshape(-1, 12)
    found = torch.cov(rows.T, correction=0)
    patches = F.unfold(x, 2).permute(0, 2, 1).reshape(-1, 12)  # patches as torch extracts them
    values = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0)).flip(0)
    torch.testing.assert_close(found, torch.diag(values / (values + 1e-2)))


def test_the_first_layer_is_a_buffer_that_no_optimizer_sees() -> None:
    network = WhitenedCNN(10, widths=(32, 32))
    assert "first.weight" not in dict(network.named_parameters())
    assert "first.weight" in network.state_dict()
    network.whiten(images())
    torch.testing.assert_close(network.first.weight, whitening(images()).float())
    network(images(4)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_blocks_start_as_identities() -> None:
    """The first channels of every convolution pass their input on."""
    block = WhitenedCNN(10, widths=(40, 40)).blocks[0]
    x = images(2).abs()[:, :1].repeat(1, 24, 1, 1) * torch.rand(24, 1, 1)
    torch.testing.assert_close(block.conv1(x)[:, :24], x)
    y = torch.rand(2, 40, 5, 5)
    torch.testing.assert_close(block.conv2(y), y)


@pytest.mark.parametrize("size", [16, 31, 64])
def test_it_is_built_by_name_as_teacher_and_as_stem(size: int) -> None:
    args = {"widths": [16, 24, 32]}
    teacher = build_teacher("whitened_cnn", 7, size, args=args)
    assert teacher(torch.randn(3, 3, size, size)).shape == (3, 7)
    stem = build_stem("whitened_cnn", 20, size, **args)
    assert stem(torch.randn(3, 3, size, size)).shape == (3, 20)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(UserError, match="doesn't take layers"):
        build_teacher("whitened_cnn", 7, 32, args={"layers": 3})
    with pytest.raises(UserError, match="no pretrained weights"):
        build_teacher("whitened_cnn", 7, 32, pretrained=True)
    with pytest.raises(UserError, match="too small for 3 blocks"):
        build_teacher("whitened_cnn", 7, 8)
    with pytest.raises(UserError, match="whitened_cnn"):
        build_teacher("whitened_cn", 7, 32)


def test_weights_of_another_training_are_loaded(tmp_path) -> None:
    made = build_teacher("whitened_cnn", 5, 32, args={"widths": [8, 8, 8]})
    assert isinstance(made, nn.Module)
    torch.save(made.state_dict(), tmp_path / "w.pth")
    again = build_teacher(
        "whitened_cnn", 5, 32, weights=str(tmp_path / "w.pth"), args={"widths": [8, 8, 8]}
    )
    for name, tensor in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
