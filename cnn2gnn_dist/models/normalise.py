"""From decoded bytes to the network's input, on the compute device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Normalise(nn.Module):
    """``(image / 255 − mean) / std``; the teacher and the student share it.

    Args:
        mean, std: one value per channel, in units of the 0..1 image (as in timm and torchvision).

    Shapes:
        images_BHWC, uint8 or float in 0..255 → float32 [B, C, H, W] in channels-last memory order.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        scale = 1.0 / (255.0 * torch.tensor(list(std), dtype=torch.float32))
        shift = -torch.tensor(list(mean), dtype=torch.float32) / torch.tensor(
            list(std), dtype=torch.float32
        )
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Return the normalized images, channels first."""
        # addcmul in float: autocast leaves it alone, so pixels are never rounded to an 8-bit mantissa.
        pixels = images_BHWC.to(self.scale.dtype)
        return torch.addcmul(self.shift, pixels, self.scale).permute(0, 3, 1, 2)


def shrunk(images_BHWC: Tensor, size: int) -> Tensor:
    """Square images with sides of ``size`` pixels, float32 in 0..255; images of that size are unchanged.

    Bilinear with antialiasing, on whole views: which part of the image is seen does not change.
    """
    if images_BHWC.shape[1] == size:
        return images_BHWC
    pixels = images_BHWC.permute(0, 3, 1, 2).float()
    made = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return made.permute(0, 2, 3, 1)
