"""Mixup and cutmix: two images in one, and the labels of both.

The images at places 2i and 2i+1 of a global batch are mixed with each other: the order has shuffled them, so
that this pairing is as good as any, and a micro-batch of even size holds both. So the result is exactly the same
for any number of ranks and micro-batches, and no image is read twice. What is mixed how is a hash of (seed,
epoch, the pair's first image).

For the teacher only. The student's loss would mix as well, but a mixed seed would find the partner itself in the
bank, and its label; and the soft targets are of single images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.data.images.views import uniform
from cnn2gnn_dist.errors import UserError

_ATTEMPTS = 64
_WHICH, _ROW, _COLUMN, _BETA = 200, 201, 202, 210  # draws


@dataclass(frozen=True)
class Mixed:
    """A batch of mixed images.

    Attributes:
        images_BHWC: uint8 where nothing is blended, else float32 in 0..255.
        partner_B: int64, each image's place to its partner's.
        share_B: float32, weight of an image's own label; the partner's label has the rest.
    """

    images_BHWC: Tensor
    partner_B: Tensor
    share_B: Tensor

    def loss(self, own_B: Tensor, partner_B: Tensor) -> Tensor:
        """Loss of each mixed image, of the losses with its own labels and with its partner's."""
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
    device, (high, wide) = images_BHWC.device, images_BHWC.shape[1:3]
    partner_B = torch.arange(len(ids_B), device=device) ^ 1
    first_P = np.asarray(ids_B)[::2]
    cuts_P = uniform(seed, first_P, epoch, _WHICH) < (
        0.5 if mixup and cutmix else float(cutmix > 0)
    )
    drawn_P = np.where(
        cuts_P,
        beta(cutmix or 1.0, seed, first_P, epoch),
        beta(mixup or 1.0, seed, first_P, epoch),
    )
    inside_PHW, kept_P = _boxes(drawn_P, seed, first_P, epoch, high, wide)
    share_P = np.where(cuts_P, kept_P, drawn_P)
    share_B = torch.from_numpy(np.repeat(share_P, 2).astype(np.float32)).to(device)
    share_B = torch.where((valid_B > 0) & (valid_B[partner_B] > 0), share_B, 1.0)
    others = images_BHWC[partner_B]
    cut_B = torch.from_numpy(np.repeat(cuts_P, 2)).to(device) & (share_B < 1)
    made = images_BHWC
    if cut_B.any():
        inside = torch.from_numpy(np.repeat(inside_PHW, 2, axis=0)).to(device)
        made = torch.where((inside & cut_B[:, None, None])[..., None], others, made)
    if mixup:
        blend = torch.where(cut_B, 1.0, share_B)[:, None, None, None]
        made = made.float() * blend + others.float() * (1 - blend)
    return Mixed(made, partner_B, share_B)


def beta(alpha: float, seed: int, ids_N: np.ndarray, epoch: int) -> np.ndarray:
    """[N] float64 of Beta(α, α), α up to 2, a hash of (seed, id, epoch): Jöhnk's method (1964)."""
    found_N = np.full(len(ids_N), 0.5)
    left_N = np.ones(len(ids_N), bool)
    for attempt in range(_ATTEMPTS):
        draws = [uniform(seed, ids_N, epoch, _BETA + 2 * attempt + one) for one in (0, 1)]
        x_N, y_N = (np.log(np.maximum(draw, 2.0**-53)) / alpha for draw in draws)
        good_N = left_N & (np.exp(x_N) + np.exp(y_N) <= 1)
        found_N[good_N] = 1 / (1 + np.exp(np.minimum(y_N - x_N, 700)[good_N]))
        left_N &= ~good_N
        if not left_N.any():
            break
    return found_N


def check_even(images: int) -> None:
    """Check that a micro-batch has pairs.

    Raises:
        UserError: it has an odd number of images.
    """
    if images % 2:
        raise UserError(
            f"a micro-batch of {images} images can't be mixed in pairs",
            where="teacher.mixup, teacher.cutmix",
            remedy="a teacher.global_batch of an even number of images per rank and micro-batch",
        )


def _boxes(
    share_P: np.ndarray, seed: int, first_P: np.ndarray, epoch: int, high: int, wide: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles [P, H, W] bool of about the area 1 - share, and the share that is really left."""
    inside = []
    for draw, length in ((_ROW, high), (_COLUMN, wide)):
        center_P = (uniform(seed, first_P, epoch, draw) * length).astype(np.int64)
        side_P = (length * np.sqrt(1 - share_P)).astype(np.int64)
        begin_P, pixels = center_P - side_P // 2, np.arange(length)
        inside.append((pixels >= begin_P[:, None]) & (pixels < (begin_P + side_P)[:, None]))
    inside_PHW = inside[0][:, :, None] & inside[1][:, None, :]
    return inside_PHW, 1 - inside_PHW.mean(axis=(1, 2))
