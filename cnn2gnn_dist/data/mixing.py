"""Mixup and cutmix of two images, as a pure function of (seed, sample, view).

:func:`partners` and :func:`mix_pairs` are for :class:`~cnn2gnn_dist.data.Stream` with ``pairs=True``: a
sample's partner, and how the two are mixed, depends only on (seed, sample, view), so that a mixed view is the same in
any batch, rank or epoch, and targets can be computed for it in advance. :func:`draw` and :func:`blend` are its parts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.data.images.views import uniform
from cnn2gnn_dist.data.reading.reader import Batch, on_device
from cnn2gnn_dist.errors import UserError

MOST_ALPHA = 2.0
"""Largest α: beyond it Jöhnk's method rejects nearly all draws."""
_ATTEMPTS = 64
_WHICH, _ROW, _COLUMN, _PARTNER, _BETA = 200, 201, 202, 203, 210  # draws


class Draws(NamedTuple):
    """How each of N images is mixed.

    Attributes:
        cuts_N: bool; True: by a rectangle of the partner, False: by blending.
        inside_NHW: bool; the rectangle.
        share_N: float64, the weight of the image's own label.
        blends: whether any image may be blended.
    """

    cuts_N: np.ndarray
    inside_NHW: np.ndarray
    share_N: np.ndarray
    blends: bool

    def repeated(self, times: int) -> Draws:
        """Return each image's draws several times in a row."""
        cuts, inside, share = (np.repeat(drawn, times, axis=0) for drawn in self[:3])
        return Draws(cuts, inside, share, self.blends)


class MixedBatch(NamedTuple):
    """A batch of mixed images on its device.

    Attributes:
        images: uint8 [n, H, W, 3] if nothing is blended, else float32 in 0..255.
        labels, partner_labels: int64 [n].
        share: float32 [n], weight of an image's own label; the partner's label has the rest.
        valid: bool [n]; False where the image itself is corrupt. An image with a corrupt partner is unchanged.
    """

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    share: Tensor
    valid: Tensor


def partners(seed: int, ids_N: np.ndarray, view: int, num_samples: int) -> np.ndarray:
    """Return [N] int64, the partner of each sample's view: any of all samples, by a hash of (seed, id, view)."""
    drawn_N = (uniform(seed, ids_N, view, _PARTNER) * num_samples).astype(np.int64)
    return np.minimum(drawn_N, num_samples - 1)


def mix_pairs(
    batch: Batch,
    *,
    seed: int,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    device: str | torch.device = "cpu",
) -> MixedBatch:
    """Mix a batch of ``Stream(pairs=True)`` with its partners, on the device.

    Args:
        batch: with ``partners``.
        seed: that of the stream's views.
        mixup: as in :func:`draw`; 0: off.
        cutmix: as in :func:`draw`; 0: off. At least one of the two must be on.
        device: where the images are mixed.

    Raises:
        UserError: the batch has no partners, nothing is to be mixed, or an α is out of range.
    """
    if not (0 <= mixup <= MOST_ALPHA and 0 <= cutmix <= MOST_ALPHA):
        raise UserError(
            f"mixup {mixup:g}, cutmix {cutmix:g}: α is from 0 (off) to {MOST_ALPHA:g}",
            where="mix_pairs",
            remedy=f"use at most {MOST_ALPHA:g}, whose shares are around one half already",
        )
    others = batch.partners
    if others is None or not (mixup or cutmix):
        raise UserError(
            "nothing to mix: "
            + ("the batch has no partners" if others is None else "mixup and cutmix are 0"),
            where="mix_pairs",
            remedy="use batches of Stream(..., pairs=True) in training, and mixup or cutmix above 0",
        )
    high, wide = batch.images.shape[1:3]
    draws = draw(
        batch.ids, seed=seed, view=batch.view, mixup=mixup, cutmix=cutmix, high=high, wide=wide
    )
    both = on_device(batch.valid & others.valid, device)
    images, share = blend(
        on_device(batch.images, device), on_device(others.images, device), draws, both
    )
    labels, valid = on_device(batch.labels, device), on_device(batch.valid, device)
    return MixedBatch(images, labels, on_device(others.labels, device), share, valid)


def draw(
    ids_N: np.ndarray, *, seed: int, view: int, mixup: float, cutmix: float, high: int, wide: int
) -> Draws:
    """Draw how images are mixed, by a hash of (seed, id, view).

    Args:
        ids_N: the samples.
        seed: of the draws.
        view: the view number.
        mixup: α of Beta(α, α), from which the share is drawn (Zhang et al., ICLR 2018); 0: off.
        cutmix: the same for a rectangle of the partner (Yun et al., ICCV 2019). With both, each image is
            mixed by either with a probability of one half.
        high: height of the images, in pixels.
        wide: their width.
    """
    ids_N = np.asarray(ids_N)
    cuts_N = uniform(seed, ids_N, view, _WHICH) < (0.5 if mixup and cutmix else float(cutmix > 0))
    drawn_N = np.where(
        cuts_N,
        beta(cutmix or 1.0, seed, ids_N, view),
        beta(mixup or 1.0, seed, ids_N, view),
    )
    inside_NHW, kept_N = _boxes(drawn_N, seed, ids_N, view, high, wide)
    return Draws(cuts_N, inside_NHW, np.where(cuts_N, kept_N, drawn_N), mixup > 0)


def blend(
    images_NHWC: Tensor, others_NHWC: Tensor, draws: Draws, both_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix images uint8 with others; an image is unchanged where ``both_N`` is False.

    Returns:
        The images, uint8 where nothing is blended, else float32; and the shares, float32 [N].
    """
    device = images_NHWC.device
    share_N = torch.from_numpy(draws.share_N.astype(np.float32)).to(device)
    share_N = torch.where(both_N, share_N, 1.0)
    cut_N = torch.from_numpy(draws.cuts_N).to(device) & (share_N < 1)
    made = images_NHWC
    if cut_N.any():
        inside = torch.from_numpy(draws.inside_NHW).to(device)
        made = torch.where((inside & cut_N[:, None, None])[..., None], others_NHWC, made)
    if draws.blends:
        weight = torch.where(cut_N, 1.0, share_N)[:, None, None, None]
        made = made.float() * weight + others_NHWC.float() * (1 - weight)
    return made, share_N


def beta(alpha: float, seed: int, ids_N: np.ndarray, epoch: int) -> np.ndarray:
    """[N] float64 of Beta(α, α), α up to 2, by a hash of (seed, id, epoch): Jöhnk's method (1964)."""
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


def _boxes(
    share_P: np.ndarray, seed: int, first_P: np.ndarray, epoch: int, high: int, wide: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles [P, H, W] bool of about the area 1 - share, and the actual remaining share."""
    inside = []
    for draw, length in ((_ROW, high), (_COLUMN, wide)):
        center_P = (uniform(seed, first_P, epoch, draw) * length).astype(np.int64)
        side_P = (length * np.sqrt(1 - share_P)).astype(np.int64)
        begin_P, pixels = center_P - side_P // 2, np.arange(length)
        inside.append((pixels >= begin_P[:, None]) & (pixels < (begin_P + side_P)[:, None]))
    inside_PHW = inside[0][:, :, None] & inside[1][:, None, :]
    return inside_PHW, 1 - inside_PHW.mean(axis=(1, 2))
