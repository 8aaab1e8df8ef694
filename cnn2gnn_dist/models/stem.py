"""The student's stem: images [B, 3, S, S] → features x_BD, non-negative and standardized.

The built-in stems read out their last feature map at 2×2 positions: global average pooling starves
the graph and the head (5 points on CIFAR-10).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.teacher import (
    SMALL_IMAGE,
    build_teacher,
    check_name,
    load_state,
    read_weights,
)

_PLACES = 2  # side of the spatial readout


def build_stem(name: str, dim_out: int, image_size: int, **args: Any) -> nn.Module:
    """Build a stem by name.

    Args:
        name: ``conv3`` (three convolutions; args ``widths``), ``resnet_tiny`` (residual; args
            ``widths``, ``blocks`` per stage), or any timm name (args of ``build_teacher`` and of
            ``timm.create_model``).
        dim_out: D.
        image_size: side of the square images, pixels; large ones are downsampled in the first layer.
        **args: arguments of the named stem.

    Raises:
        UserError: unknown name or argument.
    """
    builders: dict[str, Callable[..., nn.Module]] = {"conv3": _conv3, "resnet_tiny": _resnet_tiny}
    if name not in builders:
        check_name(name, others=builders)
        return _timm_stem(name, dim_out, image_size, **args)
    builder = builders[name]
    known = list(inspect.signature(builder).parameters)[2:]
    if unknown := sorted(set(args) - set(known)):
        raise UserError(
            f"the stem {name} doesn't take {', '.join(unknown)}",
            where="student.stem_args",
            remedy=f"use only {', '.join(known)}",
        )
    return builder(dim_out, image_size, **args)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions around a shortcut (He et al., 2015), the second BatchNorm starting at 0."""

    def __init__(self, dim_in: int, dim_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(dim_out)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim_out)
        nn.init.zeros_(self.norm2.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or dim_in != dim_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(dim_in, dim_out, 1, stride=stride, bias=False), nn.BatchNorm2d(dim_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, dim_in, S, S] → [B, dim_out, S/stride, S/stride]."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def _conv3(dim_out: int, image_size: int, widths: Sequence[int] = (32, 64, 128)) -> nn.Module:
    layers: list[nn.Module] = []
    width_in = 3
    for depth, width in enumerate(widths):
        stride = _first_stride(image_size) if depth == 0 else 1
        layers += _conv_norm(width_in, width, stride)
        layers.append(nn.MaxPool2d(2))
        width_in = width
    return _initialised(nn.Sequential(*layers, *_readout(width_in, dim_out)))


def _resnet_tiny(
    dim_out: int, image_size: int, widths: Sequence[int] = (12, 24, 48), blocks: int = 1
) -> nn.Module:
    layers = _conv_norm(3, widths[0], _first_stride(image_size))
    width_in = widths[0]
    for depth, width in enumerate(widths):
        for block in range(blocks):
            layers.append(BasicBlock(width_in, width, 2 if depth and block == 0 else 1))
            width_in = width
    return _initialised(nn.Sequential(*layers, *_readout(width_in, dim_out)))


class TimmStem(nn.Module):
    """The pooled features of a timm network, projected to D, standardized, rectified."""

    def __init__(self, network: nn.Module, dim_out: int, image_size: int) -> None:
        super().__init__()
        self.network = network
        # Measured, not looked up: timm's families name their feature sizes differently.
        training = network.training
        with torch.no_grad():
            features = network.eval()(torch.zeros(1, 3, image_size, image_size)).shape[1]
        network.train(training)
        self.readout = nn.Sequential(*_to_features(features, dim_out))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] → x_BD."""
        return self.readout(self.network(images))


def load_stem(stem: nn.Module, weights: str) -> None:
    """Load a trained stem: its own names, a student's (``stem.…``), or those of the timm network in it.

    Raises:
        UserError: the file can't be read or doesn't fit.
    """
    state = read_weights(Path(weights), "student.weights")
    inside = {n.removeprefix("stem."): t for n, t in state.items() if n.startswith("stem.")}
    # A student has a classifier next to its stem. Some of timm's networks call their first layers "stem", too.
    if len(inside) == len(state) or any(n.startswith("gnn.") for n in state):
        state = inside
    if isinstance(stem, TimmStem) and not any(name.startswith("network.") for name in state):
        stem = stem.network
    try:
        load_state(stem, state, weights)
    except UserError as error:
        raise UserError(
            error.what,
            where=f"student.weights={weights}",
            remedy="weights of the same student.stem, student.stem_args and student.dim",
        ) from None


def _timm_stem(
    name: str,
    dim_out: int,
    image_size: int,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    **args: Any,
) -> nn.Module:
    network = build_teacher(name, 0, image_size, pretrained=pretrained, weights=weights, args=args)
    return TimmStem(network, dim_out, image_size)


def _first_stride(image_size: int) -> int:
    return 1 if image_size <= SMALL_IMAGE else 2 if image_size <= 2 * SMALL_IMAGE else 4


def _conv_norm(dim_in: int, dim_out: int, stride: int) -> list[nn.Module]:
    size = 3 if stride == 1 else 2 * stride - 1
    conv = nn.Conv2d(dim_in, dim_out, size, stride=stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(dim_out), nn.ReLU(inplace=True)]


def _readout(width: int, dim_out: int) -> list[nn.Module]:
    places = _PLACES * _PLACES * width
    return [nn.AdaptiveAvgPool2d(_PLACES), nn.Flatten(), *_to_features(places, dim_out)]


def _to_features(dim_in: int, dim_out: int) -> list[nn.Module]:
    return [nn.Linear(dim_in, dim_out, bias=False), nn.BatchNorm1d(dim_out), nn.ReLU()]


def _initialised(stem: nn.Module) -> nn.Module:
    for module in stem.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return stem
