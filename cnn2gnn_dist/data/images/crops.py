"""Several views of a sample in one request: their kinds, sizes and view numbers.

View number v of a request stands for as many plain views as the request has crops: with J crops in total,
crop j is the plain view v·J + j of its group's :class:`~.views.ViewSpec`. So every crop is a pure function of (seed,
sample, view), no two crops share their random draws, and a request of one crop is the plain view v itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.errors import UserError


@dataclass(frozen=True)
class Crops:
    """A group of views of one size.

    Attributes:
        views: their specification.
        count: how many of each sample.

    Raises:
        UserError: count below 1.
    """

    views: ViewSpec
    count: int = 1

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UserError(
                f"a group of {self.count} views", where="Crops.count", remedy="use 1 or more"
            )


Views = ViewSpec | tuple[Crops, ...]
"""The views of a request: one view of each sample, or groups of several."""


def multi_crop(
    *,
    size: int = 224,
    count: int = 2,
    scale: tuple[float, float] = (0.4, 1.0),
    local_size: int = 96,
    local_count: int = 8,
    local_scale: tuple[float, float] = (0.05, 0.4),
    seed: int = 0,
) -> tuple[Crops, ...]:
    """Return DINO's multi-crop: large crops of most of the image, small ones of a small part of it.

    Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", ICCV 2021; defaults are its
    values for a ViT-S/16. Crops and flips only: resizing is bilinear and antialiased (DINO's is bicubic), and
    colors, blur and solarization are left to the device.
    """
    groups = [Crops(ViewSpec("random_resized_crop", size, seed=seed, scale=scale), count)]
    if local_count:
        local = ViewSpec("random_resized_crop", local_size, seed=seed, scale=local_scale)
        groups.append(Crops(local, local_count))
    return tuple(groups)


def crops_of(views: ViewSpec | Sequence[Crops]) -> tuple[Crops, ...]:
    """Return the groups of a request; a plain specification is one group of one view.

    Raises:
        UserError: no group.
    """
    if isinstance(views, ViewSpec):
        return (Crops(views),)
    if not views:
        raise UserError("no views", where="views", remedy="give a ViewSpec, or at least one Crops")
    return tuple(views)


def view_numbers(crops: Sequence[Crops], view: int) -> list[tuple[int, ...]]:
    """Return the plain view numbers of each group; for the clean view one clean view of each group."""
    if view == CLEAN:
        return [(CLEAN,) for _ in crops]
    first, numbers = view * sum(group.count for group in crops), []
    for group in crops:
        numbers.append(tuple(range(first, first + group.count)))
        first += group.count
    return numbers


def pixel_bytes(views: Views) -> int:
    """Return the bytes of all views of one sample."""
    return sum(3 * group.views.size**2 * group.count for group in crops_of(views))


def identity(views: Views) -> Any:
    """Return plain data (JSON) that distinguishes these views from all others."""
    if isinstance(views, ViewSpec):
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(views).items()
        }
    return [{"count": group.count, **identity(group.views)} for group in views]


def identity_today(recorded: Any) -> Any:
    """Return what :func:`identity` now returns for views recorded earlier: fields added since are at their defaults."""
    if isinstance(recorded, list):
        return [identity_today(group) for group in recorded]
    return {**_LATER, **recorded} if isinstance(recorded, dict) else recorded


_LATER = {
    name: value
    for name, value in identity(ViewSpec("none", 1)).items()
    if name not in ("kind", "size")
}
"""A new field must have a default that leaves views unchanged."""
