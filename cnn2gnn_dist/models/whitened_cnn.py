"""A CNN for small images that trains in few epochs: whitened patches, then three blocks of convolutions.

After K. Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (2024): the first convolution is
fixed and decorrelates 2×2 patches of the training images, the others start as identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.errors import UserError

NAME = "whitened_cnn"
WHITENED = 24
"""Channels after the first layer: the 12 principal directions of 2×2 patches of 3 channels, and their negatives."""
_EPS = 1e-2  # of the variance of normalized pixels: weak directions are noise
_SCALE = 1 / 9  # of the logits: without norms after it the last layer would start overconfident


class WhitenedCNN(nn.Module):
    """Normalized images [B, 3, S, S] → logits [B, num_classes], or features [B, widths[-1]].

    Args:
        num_classes: 0: no classifier.
        widths: channels of the three blocks, each of which halves the resolution. Multiples of 32 are
            fastest.

    The first layer is random until ``whiten`` has seen training images.
    """

    def __init__(self, num_classes: int, widths: Sequence[int] = (64, 256, 256)) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WHITENED, 2, bias=False)
        fixed = self.first.weight.detach().clone()
        del self.first.weight
        self.first.register_buffer(
            "weight", fixed
        )  # excluded from the optimizer, included in checkpoints
        channels = (WHITENED, *widths)
        self.blocks = nn.Sequential(
            *(_Block(before, after) for before, after in pairwise(channels))
        )
        self.fc = nn.Linear(widths[-1], num_classes, bias=False) if num_classes else None

    def forward(self, images: Tensor) -> Tensor:
        """Classify images, or return their features."""
        x = self.blocks(F.relu(self.first(images))).amax((2, 3))
        return x if self.fc is None else self.fc(x) * _SCALE

    def check_size(self, image_size: int) -> None:
        """Check that an image has pixels left after all blocks.

        Raises:
            UserError: its side is too small.
        """
        least = 2 ** len(self.blocks) + 1
        if image_size < least:
            raise UserError(
                f"images of {image_size} pixels are too small for {len(self.blocks)} blocks",
                where="views.size, widths of the network",
                remedy=f"at least {least} pixels, or fewer widths",
            )

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the first layer from some thousand normalized training images [N, 3, S, S]."""
        self.first.weight.copy_(whitening(images).to(self.first.weight))


def whitening(images: Tensor) -> Tensor:
    """Filters [24, 3, 2, 2] after which patches of the images have unit covariance, up to ε.

    The eigenvectors of the patches' covariance over √(eigenvalue + ε), in descending order, and their negatives.
    """
    patches = images.double().unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5)
    rows = patches.reshape(-1, 12)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    vectors = vectors * vectors.sum(0).sign().where(
        vectors.sum(0) != 0, 1.0
    )  # LAPACK's sign is arbitrary
    filters = (vectors / (values + _EPS).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
    return torch.cat([filters, -filters])


class _Block(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim_in, dim_out, 3, padding=1, bias=False)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = nn.BatchNorm2d(dim_out, momentum=0.4)
        self.conv2 = nn.Conv2d(dim_out, dim_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim_out, momentum=0.4)
        for conv in (self.conv1, self.conv2):
            same = min(conv.in_channels, conv.out_channels)
            nn.init.dirac_(conv.weight.data[:same])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.pool(self.conv1(x))))
        return F.relu(self.norm2(self.conv2(x)))
