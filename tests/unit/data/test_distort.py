"""Distortions of views: torchvision's operations, and pure functions of (seed, sample, view)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cnn2gnn_dist import compat
from cnn2gnn_dist.data.images import distort
from cnn2gnn_dist.data.images.batch_views import fill_views
from cnn2gnn_dist.data.images.distort import LEVELS, OPERATIONS, operate
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, boxes, render, render_batch, uniform
from cnn2gnn_dist.data.packing.shard_writer import encode_png
from tests.support.shards import random_images

FILL = (124, 116, 104)


def by_torchvision(image: Image.Image, name: str, magnitude: int, sign: float) -> Image.Image:
    """The operation as ``torchvision.transforms.v2.RandAugment`` calls it."""
    compat.import_torchvision()
    from torchvision.transforms.v2 import InterpolationMode, RandAugment

    policy = RandAugment(fill=list(FILL))
    named = {one.replace("_", ""): one for one in OPERATIONS}
    found = {named[tv.lower()]: (tv, rule) for tv, rule in policy._AUGMENTATION_SPACE.items()}
    transform, (magnitudes_of, signed) = found[name]
    magnitudes = magnitudes_of(LEVELS + 1, image.height, image.width)
    amount = 0.0 if magnitudes is None else float(magnitudes[magnitude])
    fill: Any = policy._fill
    return policy._apply_image_or_video_transform(
        image, transform, amount * (sign if signed else 1), InterpolationMode.NEAREST, fill
    )


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 7, 9, 30])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_operations_are_torchvisions(name: str, magnitude: int, sign: float) -> None:
    image = Image.fromarray(random_images(1, 32, 32)[0])
    found = operate(image, name, magnitude, sign, FILL)
    wanted = by_torchvision(image, name, magnitude, sign)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_each_operation_is_drawn() -> None:
    draws = np.array([[(n + 0.5) / len(OPERATIONS), 0.7] for n in range(len(OPERATIONS))])
    image = random_images(1)[0]
    for draw, name in zip(draws, OPERATIONS, strict=True):
        wanted = operate(Image.fromarray(image), name, 9, 1.0, FILL)
        found = distort.randaugment(image, draw[None], 9, FILL)
        np.testing.assert_array_equal(found, np.asarray(wanted))


def test_cutout_by_hand() -> None:
    images = np.full((3, 8, 8, 3), 7, np.uint8)
    draws = np.array([[0.0, 0.5, 0.999], [0.0, 0.25, 0.5]])
    distort.cutout(images, draws, 4, (1, 2, 3))
    wanted = np.full((3, 8, 8, 3), 7, np.uint8)
    wanted[0, :2, :2] = wanted[1, 2:6, 0:4] = wanted[2, 5:, 2:6] = (1, 2, 3)
    np.testing.assert_array_equal(images, wanted)


SPEC = ViewSpec(
    "crop_flip", 32, seed=3, reflect=True, alternating=True, cutout=12, randaugment=2, fill=FILL
)


@pytest.mark.parametrize("kind", ["shift", "crop_flip", "random_resized_crop"])
def test_a_view_is_a_pure_function_of_seed_sample_and_view(kind: str) -> None:
    """Whatever the batch, and whether read from files or given as pixels."""
    spec, images = replace(SPEC, kind=kind), random_images(6, 40, 36)
    ids = np.array([5, 2, 9, 1_000_003, 0, 7])
    for view in (0, 1):
        whole = render_batch(spec, images, ids, view)
        for row, image in enumerate(images):
            np.testing.assert_array_equal(render(spec, image, int(ids[row]), view), whole[row])
        found = np.zeros_like(whole)
        blobs = [encode_png(image) for image in images[:-1]]
        assert list(fill_views(spec, [*blobs, b"broken"], ids, view, found)) == [5]
        np.testing.assert_array_equal(found[:-1], whole[:-1])
        assert not found[-1].any()
        other = render_batch(replace(spec, seed=4), images, ids, view)
        assert (other != whole).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("kind", ["none", "shift", "crop_flip", "random_resized_crop"])
def test_the_clean_view_is_not_distorted(kind: str) -> None:
    image = random_images(1)[0]
    spec = replace(SPEC, kind=kind)
    np.testing.assert_array_equal(render(spec, image, 4, CLEAN), image)
    if kind == "none":
        np.testing.assert_array_equal(render(spec, image, 4, 1), image)


@pytest.mark.parametrize("kind", ["crop_flip", "random_resized_crop"])
def test_alternating_mirrors_every_second_view_and_half_of_the_samples(kind: str) -> None:
    spec = ViewSpec(kind, 32, alternating=True)
    ids, sizes = np.arange(4000), np.full(4000, 32)
    flips = [boxes(spec, ids, sizes, sizes, view).flip_N for view in range(4)]
    np.testing.assert_array_equal(flips[0], ~flips[1])
    np.testing.assert_array_equal(flips[0], flips[2])
    np.testing.assert_array_equal(flips[1], flips[3])
    assert abs(flips[0].mean() - 0.5) < 0.03
    assert not boxes(replace(spec, flip=False), ids, sizes, sizes, 0).flip_N.any()


def test_padding_reflects_as_torchs() -> None:
    import torch
    import torch.nn.functional as F

    spec = ViewSpec("shift", 32, pad=4, reflect=True)
    images = np.stack(random_images(20))
    ids = np.arange(20)
    box = boxes(spec, ids, ids, ids, 1)
    chw = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    padded = F.pad(chw, (4, 4, 4, 4), mode="reflect").permute(0, 2, 3, 1).byte().numpy()
    for row, found in enumerate(render_batch(spec, list(images), ids, 1)):
        top, left = int(box.top_N[row]) + 4, int(box.left_N[row]) + 4
        np.testing.assert_array_equal(found, padded[row, top : top + 32, left : left + 32])


def test_draws_of_distortions_are_no_others() -> None:
    """The position of a cutout does not follow that of the crop."""
    ids = np.arange(5000)
    for one in (0, 1, 2):
        for other in (60, 61, 100, 101):
            a, b = uniform(0, ids, 0, one), uniform(0, ids, 0, other)
            assert abs(float(np.corrcoef(a, b)[0, 1])) < 4 / math.sqrt(len(ids))
