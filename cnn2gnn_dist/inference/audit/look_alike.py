"""Whether two pictures are the same picture, by their pixels: shifted, mirrored, recolored, framed or not.

Features propose pairs (:func:`cnn2gnn_dist.inference.audit.scores.proposals`), pixels confirm them: a
student's features mainly encode the class, so its nearest neighbors are similar, but seldom the same picture.

Shapes: P pairs of thumbnails of ``SIDE`` pixels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, SHIFT, BLUR = 32, 4, 5
"""Side of the thumbnails; pixels by which one may be shifted; side of the mean that is subtracted."""
FALSE_SHARE = 0.1
"""Expected share of pairs above the threshold that are not near-duplicates."""
_BLOCK = 512


def likeness(a_PHWC: np.ndarray, b_PHWC: np.ndarray) -> np.ndarray:
    """Highest correlation of details, float32 [P] in −1..1, over shifts and a mirrored copy.

    The middle of ``a`` is searched in ``b``. Details: gray values minus their local mean, so that two
    clear skies are not similar. Both are uint8 [P, SIDE, SIDE, 3].
    """
    found = np.empty(len(a_PHWC), np.float32)
    for start in range(0, len(found), _BLOCK):
        rows = slice(start, start + _BLOCK)
        a, b = _details(a_PHWC[rows]), _details(b_PHWC[rows])
        best = torch.maximum(_best_match(a, b), _best_match(a, b.flip(2)))
        found[rows] = best.numpy()
    return found


def threshold(found_P: np.ndarray, chance_Q: np.ndarray) -> float:
    """The least likeness at which a proposed pair counts.

    Args:
        found_P: of the proposed pairs.
        chance_Q: of pairs that resemble each other without being the same picture, such as an image
            and the last of its neighbors.

    Returns:
        The least value at which chance explains at most ``FALSE_SHARE`` of the pairs; inf if none.
    """
    values = np.sort(found_P)[::-1]
    above = len(chance_Q) - np.searchsorted(np.sort(chance_Q), values, side="left")
    # Half a pair more than was seen: if there are few pairs to compare with, having seen none proves little.
    expected = (above + 0.5) / (len(chance_Q) + 1) * len(found_P)
    good = np.flatnonzero(expected <= FALSE_SHARE * np.arange(1, len(values) + 1))
    return float(values[good[-1]]) if len(good) else float("inf")


def _details(images_PHWC: np.ndarray) -> Tensor:
    grey = torch.from_numpy(np.ascontiguousarray(images_PHWC)).float().mean(3)
    edge = BLUR // 2
    padded = F.pad(grey[:, None], (edge, edge, edge, edge), mode="replicate")
    return grey - F.avg_pool2d(padded, BLUR, stride=1)[:, 0]


def _best_match(a_PHW: Tensor, b_PHW: Tensor) -> Tensor:
    """Normalized cross-correlation of the middle of ``a`` with every window of ``b``; the maximum, [P]."""
    pairs, inner = len(a_PHW), SIDE - 2 * SHIFT
    middle = a_PHW[:, SHIFT : SHIFT + inner, SHIFT : SHIFT + inner]
    middle = middle - middle.mean((1, 2), keepdim=True)
    size = middle.square().sum((1, 2))
    # One group per pair: windows of b against the middle of its own a.
    dot = F.conv2d(b_PHW[None], middle[:, None], groups=pairs)[0]
    count = inner * inner
    total = F.avg_pool2d(b_PHW[:, None], inner, stride=1)[:, 0] * count
    square = F.avg_pool2d(b_PHW[:, None].square(), inner, stride=1)[:, 0] * count
    spread = (square - total.square() / count).clamp(min=0)
    # A picture without details resembles nothing.
    scale = (spread * size[:, None, None]).sqrt().clamp(min=float(count))
    return (dot / scale).amax((1, 2))
