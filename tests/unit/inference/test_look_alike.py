"""The same picture shifted, mirrored, recolored or framed is recognized; other pictures are not."""

from __future__ import annotations

import numpy as np
import pytest

from cnn2gnn_dist.inference.audit import look_alike
from tests.support.shards import random_images


def textured(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    fine = rng.integers(-40, 40, (count, 16, 16, 1)).repeat(2, axis=1).repeat(2, axis=2)
    return (random_images(count, seed=seed).astype(int) + fine).clip(0, 255).astype(np.uint8)


def slow(a: np.ndarray, b: np.ndarray) -> float:
    """The likeness by loops, in float64."""

    def details(image):
        grey = image.astype(np.float64).mean(2)
        padded = np.pad(grey, 2, mode="edge")
        return grey - np.mean(
            [padded[y : y + 32, x : x + 32] for y in range(5) for x in range(5)], 0
        )

    middle = details(a)[4:28, 4:28]
    middle = middle - middle.mean()
    best = -1.0
    for other in (details(b), details(b)[:, ::-1]):
        for y in range(9):
            for x in range(9):
                window = other[y : y + 24, x : x + 24]
                window = window - window.mean()
                scale = np.sqrt((middle**2).sum() * (window**2).sum())
                best = max(best, (middle * window).sum() / max(scale, 576))
    return best


def test_likeness_equals_loops():
    a, b = textured(6), textured(6, seed=1)
    found = look_alike.likeness(np.concatenate([a, a]), np.concatenate([b, a]))
    want = [
        slow(*pair) for pair in zip(np.concatenate([a, a]), np.concatenate([b, a]), strict=True)
    ]
    np.testing.assert_allclose(found, want, atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: np.roll(image, (3, -4), (0, 1)),
        lambda image: image[:, ::-1],
        lambda image: (image * 0.6 + 30).astype(np.uint8),
        lambda image: image[:, :, ::-1],
        lambda image: np.pad(image[3:-3, 3:-3], ((3, 3), (3, 3), (0, 0))),
    ],
)
def test_the_same_picture_is_recognised(change):
    images = textured(40)
    changed = np.stack([change(image) for image in images])
    same = look_alike.likeness(images, changed)
    others = look_alike.likeness(images, np.roll(changed, 1, axis=0))
    assert same.min() > 0.85
    assert others.max() < 0.5


def test_pictures_without_details_resemble_nothing():
    grey = np.full((3, 32, 32, 3), 90, np.uint8)
    assert abs(look_alike.likeness(grey, grey)).max() == 0
    assert abs(look_alike.likeness(grey, textured(3))).max() < 0.1
    assert look_alike.likeness(grey[:0], grey[:0]).shape == (0,)


def test_the_threshold_bounds_the_share_of_chance():
    rng = np.random.default_rng(0)
    chance, noise = rng.normal(0, 0.1, 5000), rng.normal(0, 0.1, 10_000)
    pairs = np.concatenate([noise, rng.normal(0.8, 0.05, 300)])
    limit = look_alike.threshold(pairs, chance)
    assert (pairs[10_000:] >= limit).mean() > 0.99
    assert (noise >= limit).sum() <= 0.2 * 300
    assert look_alike.threshold(noise, chance) > 0.3
    assert look_alike.threshold(np.empty(0), chance) == np.inf
