"""Mixup and cutmix: two images in one, and the labels of both.

The images at positions 2i and 2i+1 of a global batch are mixed with each other: they are shuffled, so this
pairing is as good as any, and a micro-batch of even size holds both. The result is therefore identical for any
number of ranks and micro-batches, and no image is read twice. How a pair is mixed is a hash of (seed, epoch, the
pair's first image).

For the teacher only. The student's loss could be mixed as well, but a mixed seed would find its partner in the
bank, with its label; and soft targets belong to single images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.data.mixing import blend, draw
from cnn2gnn_dist.errors import UserError


@dataclass(frozen=True)
class Mixed:
    """A batch of mixed images.

    Attributes:
        images_BHWC: uint8 if nothing is blended, else float32 in 0..255.
        partner_B: int64, the position of each image's partner.
        share_B: float32, weight of an image's own label; the partner's label has the rest.
    """

    images_BHWC: Tensor
    partner_B: Tensor
    share_B: Tensor

    def loss(self, own_B: Tensor, partner_B: Tensor) -> Tensor:
        """Loss of each mixed image, from the losses with its own labels and with its partner's."""
        return self.share_B * own_B + (1 - self.share_B) * partner_B


def mix(
    images_BHWC: Tensor,
    ids_B: np.ndarray,
    valid_B: Tensor,
    *,
    seed: int,
    epoch: int,
    mixup: float,
    cutmix: float,
) -> Mixed:
    """Mix a micro-batch; pairs with an image that is not valid stay as they are.

    Args:
        images_BHWC: uint8.
        ids_B: the samples.
        valid_B: 1 for images that could be read.
        seed: of the run.
        epoch: of the batch.
        mixup: α of Beta(α, α), from which the share is drawn (Zhang et al., ICLR 2018); 0: off.
        cutmix: the same for a rectangle of the partner (Yun et al., ICCV 2019). With both, each pair is
            mixed by either with a probability of one half.

    Raises:
        UserError: an odd number of images.
    """
    check_even(len(ids_B))
    high, wide = images_BHWC.shape[1:3]
    first_P = np.asarray(ids_B)[::2]
    pairs = draw(first_P, seed=seed, view=epoch, mixup=mixup, cutmix=cutmix, high=high, wide=wide)
    partner_B = torch.arange(len(ids_B), device=images_BHWC.device) ^ 1
    both_B = (valid_B > 0) & (valid_B[partner_B] > 0)
    images, share_B = blend(images_BHWC, images_BHWC[partner_B], pairs.repeated(2), both_B)
    return Mixed(images, partner_B, share_B)


def check_even(images: int) -> None:
    """Check that a micro-batch has pairs.

    Raises:
        UserError: it has an odd number of images.
    """
    if images % 2:
        raise UserError(
            f"a micro-batch of {images} images can't be mixed in pairs",
            where="teacher.mixup, teacher.cutmix",
            remedy="set teacher.global_batch to give an even number of images per rank and micro-batch",
        )
