"""Views: bit-identical to torchvision's transforms v2, drawn only from (seed, sample, view)."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch

from cnn2gnn_dist import compat
from cnn2gnn_dist.data.images import views as viewing
from cnn2gnn_dist.data.images.decode import CorruptSample
from cnn2gnn_dist.data.images.views import (
    CLEAN,
    KINDS,
    ViewSpec,
    boxes,
    render,
    render_batch,
    uniform,
)
from cnn2gnn_dist.errors import UserError
from tests.support.shards import random_images

SHAPES = [(32, 32), (40, 61), (61, 40), (100, 33), (224, 300), (17, 23), (33, 32)]


@pytest.fixture(scope="module")
def v2():
    compat.import_torchvision()
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("without AVX2 torchvision resizes in float; our bytes stay as they are")
    from torchvision.transforms.v2 import functional

    return functional


def to_chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()


def to_hwc(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def clean_by_torchvision(v2, spec: ViewSpec, image: np.ndarray) -> torch.Tensor:
    resized = v2.resize(to_chw(image), [round(spec.size * spec.resize)], antialias=True)
    return v2.center_crop(resized, [spec.size, spec.size])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("size", "resize"), [(32, 1.0), (24, 1.14), (64, 1.25)])
def test_clean_view_is_torchvisions(v2, shape, size, resize):
    image = random_images(1, *shape)[0]
    spec = ViewSpec("random_resized_crop", size, resize=resize)
    wanted = to_hwc(clean_by_torchvision(v2, spec, image))
    np.testing.assert_array_equal(render(spec, image, 5, CLEAN), wanted)
    none = ViewSpec("none", size, resize=resize)
    np.testing.assert_array_equal(render(none, image, 5, 3), wanted)


def test_an_image_of_the_size_stays_as_it_is():
    image = random_images(1)[0]
    np.testing.assert_array_equal(render(ViewSpec("crop_flip", 32), image, 0, CLEAN), image)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [32, 64])
def test_random_resized_crop_is_torchvisions(v2, shape, size):
    spec = ViewSpec("random_resized_crop", size, seed=1)
    for sample, image in enumerate(random_images(6, *shape)):
        for view in (0, 1):
            ids = np.array([sample])
            box = boxes(spec, ids, np.array([shape[0]]), np.array([shape[1]]), view)
            top, left, high, wide, flip = (int(column[0]) for column in box)
            wanted = v2.resized_crop(
                to_chw(image), top, left, high, wide, [size, size], antialias=True
            )
            wanted = v2.horizontal_flip(wanted) if flip else wanted
            np.testing.assert_array_equal(render(spec, image, sample, view), to_hwc(wanted))


@pytest.mark.parametrize("kind", ["shift", "crop_flip"])
@pytest.mark.parametrize("pad", [0, 1, 4, 40])
@pytest.mark.parametrize("shape", [(32, 32), (50, 41)], ids=str)
def test_pad_and_crop_is_torchvisions(v2, kind, pad, shape):
    spec = ViewSpec(kind, 32, seed=2, pad=pad)
    flips = 0
    for sample, image in enumerate(random_images(12, *shape)):
        box = boxes(spec, np.array([sample]), *np.array([shape]).T, 3)
        top, left, high, wide, flip = (int(column[0]) for column in box)
        padded = v2.pad(clean_by_torchvision(v2, spec, image), [pad] * 4, fill=0)
        wanted = v2.crop(padded, top + pad, left + pad, high, wide)
        wanted = v2.horizontal_flip(wanted) if flip else wanted
        np.testing.assert_array_equal(render(spec, image, sample, 3), to_hwc(wanted))
        flips += flip
    assert (0 < flips < 12) == (kind == "crop_flip")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", [CLEAN, 0, 5])
def test_a_view_does_not_depend_on_its_company(kind, view):
    images = [random_images(1, *shape, seed=i)[0] for i, shape in enumerate(SHAPES * 2)]
    ids = np.random.default_rng(0).permutation(10**6)[: len(images)]
    spec = ViewSpec(kind, 32, seed=9)
    together = render_batch(spec, images, ids, view)
    assert together.shape == (len(images), 32, 32, 3)
    for row, image in enumerate(images):
        np.testing.assert_array_equal(together[row], render(spec, image, int(ids[row]), view))
        again = render(spec, image.copy(), int(ids[row]), view)
        np.testing.assert_array_equal(together[row], again)
    other = np.random.default_rng(1).permutation(len(images))
    turned = render_batch(spec, [images[i] for i in other], ids[other], view)
    np.testing.assert_array_equal(turned, together[other])


def test_equal_images_in_one_array():
    images = random_images(20)
    spec = ViewSpec("crop_flip", 32)
    found = render_batch(spec, images, np.arange(20), 1)
    np.testing.assert_array_equal(found, render_batch(spec, list(images), np.arange(20), 1))
    assert render_batch(spec, [], np.empty(0, np.int64), 1).shape == (0, 32, 32, 3)


def test_seed_sample_and_view_all_count():
    image = random_images(1, 48, 48)[0]
    spec = ViewSpec("random_resized_crop", 32)
    views = [render(spec, image, 3, v) for v in range(6)]
    views += [render(spec, image, s, 0) for s in range(4, 8)]
    views += [render(ViewSpec("random_resized_crop", 32, seed=s), image, 3, 0) for s in (1, 2)]
    assert len({view.tobytes() for view in views}) == len(views)


def test_draws_are_pinned():
    """A change here would change every run: the values were recorded in 2026."""
    found = uniform(7, np.arange(3), 2, 1)
    np.testing.assert_array_equal(found, [_uniform(7, i, 2, 1) for i in range(3)])


@pytest.mark.parametrize(
    ("kind", "view", "digest"),
    [
        ("random_resized_crop", 0, "1ac24ebe4c75"),
        ("random_resized_crop", CLEAN, "56e6b2052c73"),
        ("crop_flip", 1, "1bfbbfcac45d"),
    ],
)
def test_views_are_pinned(kind, view, digest):
    """Bit-identical on every machine, whatever its vector instructions."""
    images = np.random.default_rng(0).integers(0, 256, (6, 90, 121, 3), dtype=np.uint8)
    found = render_batch(ViewSpec(kind, 64, seed=3), images, np.arange(6), view)
    assert hashlib.sha256(found.tobytes()).hexdigest()[:12] == digest


def _uniform(seed: int, sample: int, view: int, draw: int) -> float:
    """The hash in plain Python integers."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    state = mix((seed + 0x9E3779B97F4A7C15) % 2**64)
    for word in (sample, view % 2**32, draw):
        state = mix(state ^ word)
    return (state >> 11) * 2.0**-53


def test_draws_are_even_and_unrelated():
    ids = np.arange(20_000)
    columns = [uniform(s, ids, v, d) for s, v, d in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]]
    for column in columns:
        counts = np.histogram(column, bins=50, range=(0, 1))[0]
        assert ((counts - 400) ** 2 / 400).sum() < 100  # 0.99998 quantile, 49 degrees of freedom
    assert np.abs(np.corrcoef(columns) - np.eye(4)).max() < 0.03
    following = np.corrcoef(columns[0][:-1], columns[0][1:])[0, 1]
    assert abs(following) < 0.03


def test_boxes_of_many_images():
    spec = ViewSpec("random_resized_crop", 32, seed=4, scale=(0.2, 0.9))
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 400, (2, 3000))
    top, left, high, wide, flip = boxes(spec, np.arange(3000), heights, widths, 2)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (high > 0).all()
    assert (wide > 0).all()
    assert (top + high <= heights).all()
    assert (left + wide <= widths).all()
    assert 0.45 < flip.mean() < 0.55
    large = (heights > 100) & (widths > 100)
    square = large & (heights < 1.3 * widths) & (widths < 1.3 * heights)
    share = (high * wide / heights / widths)[square]
    assert share.min() > 0.18
    assert share.max() < 0.92
    shape = (wide / high)[large]
    assert shape.min() > 0.7
    assert shape.max() < 1.4


def plain_box(spec: ViewSpec, sample: int, high: int, wide: int, view: int) -> tuple[int, ...]:
    """torchvision's RandomResizedCrop.make_params, with its draws replaced by the hash's."""
    for attempt in range(10):
        u = [_uniform(spec.seed, sample, view, 10 + 4 * attempt + d) for d in range(4)]
        area = high * wide * (spec.scale[0] + u[0] * (spec.scale[1] - spec.scale[0]))
        low, up = math.log(spec.ratio[0]), math.log(spec.ratio[1])
        ratio = math.exp(low + u[1] * (up - low))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= wide and 0 < h <= high:
            return int(u[2] * (high - h + 1)), int(u[3] * (wide - w + 1)), h, w
    w, h = wide, high
    if wide / high < spec.ratio[0]:
        h = round(w / spec.ratio[0])
    elif wide / high > spec.ratio[1]:
        w = round(h * spec.ratio[1])
    return (high - h) // 2, (wide - w) // 2, h, w


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.95, 1.0), (1.0, 1.0)], ids=str)
def test_boxes_are_those_of_torchvisions_rule(scale):
    spec = ViewSpec("random_resized_crop", 32, seed=6, scale=scale)
    heights, widths = np.random.default_rng(2).integers(4, 60, (2, 300))
    box = boxes(spec, np.arange(300), heights, widths, 4)
    for i in range(300):
        wanted = plain_box(spec, i, int(heights[i]), int(widths[i]), 4)
        assert tuple(int(column[i]) for column in box[:4]) == wanted
        assert bool(box.flip_N[i]) == (_uniform(6, i, 4, 0) < 0.5)


def test_boxes_when_no_attempt_fits_are_torchvisions_fallback():
    """Far too narrow images: the largest center crop within the ratios."""
    spec = ViewSpec("random_resized_crop", 32, scale=(1.0, 1.0))
    found = boxes(spec, np.arange(2), np.array([300, 10]), np.array([10, 300]), 0)
    assert [column[0] for column in found[:4]] == [143, 0, 13, 10]  # 10 / (3/4) = 13.3
    assert [column[1] for column in found[:4]] == [0, 143, 10, 13]


def test_boxes_of_pad_and_crop_reach_every_corner():
    spec = ViewSpec("crop_flip", 32, pad=2)
    side = np.full(2000, 32)
    box = boxes(spec, np.arange(2000), side, side, 0)
    assert set(zip(box.top_N.tolist(), box.left_N.tolist(), strict=True)) == {
        (y, x) for y in range(-2, 3) for x in range(-2, 3)
    }


@pytest.mark.parametrize(("kind", "view"), [("none", 4), ("crop_flip", CLEAN)])
def test_boxes_of_the_clean_view(kind, view):
    box = boxes(ViewSpec(kind, 24), np.arange(3), np.full(3, 50), np.full(3, 60), view)
    assert [column.tolist() for column in box] == [
        [0] * 3,
        [0] * 3,
        [24] * 3,
        [24] * 3,
        [False] * 3,
    ]


def test_no_flip_when_it_is_off():
    side = np.full(100, 32)
    assert not boxes(
        ViewSpec("crop_flip", 32, flip=False), np.arange(100), side, side, 0
    ).flip_N.any()


def test_too_narrow_to_be_resized(monkeypatch):
    monkeypatch.setattr(viewing, "MAX_PIXELS", 32 * 32 * 50)
    spec = ViewSpec("crop_flip", 32)
    assert render(spec, np.zeros((2, 100, 3), np.uint8), 0, CLEAN).shape == (32, 32, 3)
    with pytest.raises(CorruptSample, match="102 x 2 pixels, too narrow"):
        render(spec, np.zeros((2, 102, 3), np.uint8), 0, 0)


@pytest.mark.parametrize("wrong", [{"kind": "flip"}, {"size": 0}, {"pad": -1}, {"resize": 0.9}])
def test_wrong_specs(wrong):
    with pytest.raises(UserError, match="view"):
        ViewSpec(**{"kind": "none", "size": 32, **wrong})
