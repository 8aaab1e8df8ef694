"""Transforms of other libraries as hooks: pure functions of (seed, sample, view), in any thread."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cnn2gnn_dist import compat
from cnn2gnn_dist.data.images import hooks
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render_batch
from cnn2gnn_dist.errors import UserError
from tests.support.shards import random_images

TIMM = "timm:rand-m9-mstd0.5-inc1"
FILL = (120, 110, 100)
BARE = ViewSpec("crop_flip", 24, seed=5, fill=FILL)


def drawn(image: Image.Image) -> Image.Image:
    """The image with its first pixel set from a draw of each of the three global generators."""
    pixels = np.array(image)
    given = random.random(), np.random.rand(), torch.rand(()).item()
    pixels[0, 0] = [int(255 * one) for one in given]
    return Image.fromarray(pixels)


def inverted(image: Image.Image) -> Image.Image:
    return ImageOps.invert(image)


def smaller(image: Image.Image) -> Image.Image:
    return image.resize((8, 8))


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def broken(image: Image.Image) -> Image.Image:
    raise ZeroDivisionError("no such luck")


def own(function: object) -> str:
    return f"{__name__}:{function.__name__}"  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return random_images(40, 24, 24)


def views_of(images, view: int = 0, **changes) -> np.ndarray:
    return render_batch(replace(BARE, **changes), images, np.arange(len(images)), view)


def test_a_hook_sees_the_finished_view_before_cutout(images):
    np.testing.assert_array_equal(views_of(images, hook=own(inverted)), 255 - views_of(images))
    square = views_of(images, hook=own(inverted), cutout=6)
    cut = (views_of(images, cutout=6) != views_of(images)).any(-1)
    assert (square[cut] == FILL).all()
    assert cut.any()


@pytest.mark.parametrize("hook", [TIMM, own(drawn)])
def test_views_are_the_same_in_any_thread_and_any_batch(images, hook):
    spec = replace(BARE, hook=hook)
    jobs = [(row, view) for view in (0, 3) for row in range(len(images))]
    alone = [render_batch(spec, [images[row]], np.array([row]), view)[0] for row, view in jobs]
    random.seed(99)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(
            lambda job: render_batch(spec, [images[job[0]]], np.array([job[0]]), job[1])[0], jobs
        )
    for one, other in zip(alone, found, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(views_of(images, 3, hook=hook), alone[len(images) :])


def test_all_three_generators_differ_between_samples_views_and_seeds(images):
    seen = {
        tuple(pixel)
        for changes in ({"seed": 5}, {"seed": 6})
        for view in range(3)
        for pixel in views_of(images, view, hook=own(drawn), **changes)[:, 0, 0].tolist()
    }
    # 240 views; that two of them agree in all three channels (one of 16.7 million colors) happens once in 600 tests.
    assert len(seen) >= 239
    for channel in range(3):
        assert len({pixel[channel] for pixel in seen}) > 100


def test_the_clean_view_is_left_alone(images):
    np.testing.assert_array_equal(views_of(images, CLEAN, hook=own(inverted)), np.stack(images))


def test_the_generators_are_left_as_they_were(images):
    def state() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(()).item()

    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(1)
    expected = state()
    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(1)
    views_of(images, hook=own(drawn))
    assert state() == expected


def test_timm_by_name_is_the_transform_of_its_own_factory(images):
    compat.import_timm()
    from timm.data import create_transform
    from timm.data.auto_augment import RandAugment

    mean = tuple(one / 255 for one in FILL)
    factory = create_transform(
        24, is_training=True, auto_augment=TIMM.removeprefix("timm:"), mean=mean, interpolation="bilinear"
    )  # fmt: skip
    (reference,) = [one for one in factory.transforms if isinstance(one, RandAugment)]
    for operation in reference.ops:  # the factory sets an interpolation, ours leaves it to timm
        hooks.keep_a_bit(operation)
        operation.kwargs["resample"] = hooks.hook_of(TIMM, 24, FILL).ops[0].kwargs["resample"]
    changed = 0
    for seed, image in enumerate(images):
        random.seed(seed)
        np.random.seed(seed)
        expected = np.asarray(reference(Image.fromarray(image)))
        found = hooks.apply(hooks.hook_of(TIMM, 24, FILL), image, seed)
        np.testing.assert_array_equal(found, expected)
        changed += bool((found != image).any())
    assert changed > 25


@pytest.mark.parametrize(
    "name", ["timm:rand-m10-mstd5-inc1", "timm:augmix-m10-w3", "timm:original", TIMM]
)
def test_no_draw_of_timms_makes_training_fail(images, name):
    for view in range(20):
        views_of(images, view, hook=name)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("rand-m9", "neither timm:CONFIG nor MODULE:FUNCTION"),
        ("timm:", "neither timm:CONFIG nor MODULE:FUNCTION"),
        ("timm:rand-q9", "can't be used"),
        ("timm:nothing-like-it", "can't be used"),
        ("no_such_module_at_all:f", "No module named 'no_such_module_at_all'"),
        ("random:no_such_function", "no_such_function"),
    ],
)
def test_a_hook_that_does_not_exist_is_refused_with_the_config(name, part):
    with pytest.raises(UserError, match=r"views\.hook") as refusal:
        replace(BARE, hook=name)
    assert part in str(refusal.value)


@pytest.mark.parametrize(
    ("function", "part"),
    [
        (smaller, "returned RGB (8, 8) for an RGB image (24, 24)"),
        (array, "returned ndarray"),
        (broken, "ZeroDivisionError: no such luck"),
    ],
)
def test_what_a_hook_may_not_do_is_named(images, function, part):
    with pytest.raises(UserError) as refusal:
        views_of(images, hook=own(function))
    assert part in str(refusal.value)
