"""From bytes to views: a chunk of mixed images gives what decoding and cropping each image alone gives."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from cnn2gnn_dist.data.images import batch_views
from cnn2gnn_dist.data.images import views as viewing
from cnn2gnn_dist.data.images.batch_views import fill_views
from cnn2gnn_dist.data.images.decode import CorruptSample, decode
from cnn2gnn_dist.data.images.views import CLEAN, KINDS, ViewSpec, render
from tests.support.shards import encode_image, random_images

SIZES = [(32, 32), (31, 32), (32, 40), (60, 45), (5, 90), (1, 1), (200, 300)]


def chunk() -> list[bytes]:
    """JPEGs of all sizes, mixed with other formats and with bytes that are not an image."""
    blobs = []
    for number, (high, wide) in enumerate(SIZES * 2):
        image = random_images(1, high, wide, seed=number)[0]
        blobs.append(encode_image(image, "jpg", progressive=number % 3 == 2))
        if number % 4 == 0:
            blobs.append(encode_image(image, "png"))
        if number % 5 == 0:
            blobs.append(encode_image(image[..., 0], "jpg"))
    file = io.BytesIO()
    Image.fromarray(random_images(1)[0]).convert("CMYK").save(file, "JPEG")
    blobs += [file.getvalue(), b"", b"no image", blobs[0][: len(blobs[0]) // 2]]
    return [blobs[i] for i in np.random.default_rng(1).permutation(len(blobs))]


def by_hand(spec: ViewSpec, data: bytes, sample: int, view: int) -> np.ndarray | str:
    try:
        return render(spec, decode(data), sample, view)
    except CorruptSample as error:
        return str(error)


@pytest.mark.parametrize("held", [1, 3000, 4_000_000], ids=str)
@pytest.mark.parametrize("view", [CLEAN, 0, 7])
@pytest.mark.parametrize("resize", [1.0, 1.14])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_is_what_its_images_are_alone(kind, resize, view, held, monkeypatch):
    monkeypatch.setattr(batch_views, "MOST_HELD", held)
    spec = ViewSpec(kind, 32, seed=8, resize=resize)
    blobs = chunk()
    ids = np.random.default_rng(0).permutation(10**6)[: len(blobs)]
    images = np.full((len(blobs), 32, 32, 3), 99, np.uint8)
    wrong = fill_views(spec, blobs, ids, view, images)
    assert len(wrong) == 3
    for row, data in enumerate(blobs):
        wanted = by_hand(spec, data, int(ids[row]), view)
        if isinstance(wanted, str):
            assert str(wrong[row]) == wanted
            assert (images[row] == 99).all()
        else:
            np.testing.assert_array_equal(images[row], wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", [CLEAN, 2])
def test_a_damaged_image_leaves_its_row_as_it_was(kind, view):
    """Even if some pixels were decoded before the corruption was found."""
    whole = encode_image(random_images(1)[0], "jpg", quality=100)
    blobs = [whole, whole[: len(whole) - 200] + b"\xff\xd9", whole]
    images = np.full((3, 32, 32, 3), 99, np.uint8)
    wrong = fill_views(ViewSpec(kind, 32, scale=(0.9, 1.0)), blobs, np.arange(3), view, images)
    assert list(wrong) == [1]
    assert (images[1] == 99).all()
    assert not (images[::2] == 99).all()


def test_a_part_of_a_larger_batch_is_filled():
    blobs = [encode_image(image, "jpg") for image in random_images(6)]
    spec = ViewSpec("crop_flip", 32)
    whole = np.zeros((20, 32, 32, 3), np.uint8)
    assert fill_views(spec, blobs, np.arange(6), 1, whole[7:13]) == {}
    for row, data in enumerate(blobs):
        np.testing.assert_array_equal(whole[7 + row], render(spec, decode(data), row, 1))
    assert not whole[:7].any()
    assert not whole[13:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_to_fill(kind):
    images = np.empty((0, 32, 32, 3), np.uint8)
    for view in (CLEAN, 0):
        assert fill_views(ViewSpec(kind, 32), [], np.empty(0, np.int64), view, images) == {}


def test_too_narrow_images_are_corrupt_where_they_must_be_resized(monkeypatch):
    monkeypatch.setattr(viewing, "MAX_PIXELS", 32 * 32 * 50)
    narrow = encode_image(random_images(1, 2, 300)[0], "jpg")
    sound = encode_image(random_images(1)[0], "jpg")
    for kind, view in ((kind, view) for kind in KINDS for view in (CLEAN, 0)):
        images = np.full((3, 32, 32, 3), 99, np.uint8)
        wrong = fill_views(ViewSpec(kind, 32), [sound, narrow, sound], np.arange(3), view, images)
        if kind == "random_resized_crop" and view != CLEAN:  # its crops are never so narrow
            assert not wrong
        else:
            assert list(wrong) == [1]
            assert "300 x 2 pixels, too narrow" in str(wrong[1])
            assert (images[1] == 99).all()


@pytest.mark.parametrize("pad", [3, 31, 32, 33, 100_000])
def test_any_padding_takes_no_more_room_than_the_image(pad):
    """A crop far outside the image is black, and no array of the padded size is allocated."""
    images = random_images(40)
    blobs = [encode_image(image, "png") for image in images]
    spec = ViewSpec("crop_flip", 32, pad=pad)
    found = np.empty((40, 32, 32, 3), np.uint8)
    assert not fill_views(spec, blobs, np.arange(40), 0, found)
    side = np.full(40, 32)
    box = viewing.boxes(spec, np.arange(40), side, side, 0)
    for row, image in enumerate(images):
        wanted = np.zeros((32, 32, 3), np.uint8)
        top, left = int(box.top_N[row]), int(box.left_N[row])
        for y in range(32):
            for x in range(32):
                if 0 <= y + top < 32 and 0 <= x + left < 32:
                    wanted[y, x] = image[y + top, x + left]
        np.testing.assert_array_equal(found[row], wanted[:, ::-1] if box.flip_N[row] else wanted)
