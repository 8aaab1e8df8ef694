"""Decoding: any image becomes RGB, and anything else is reported as corrupt."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from cnn2gnn_dist.data.images import decode as decoding
from cnn2gnn_dist.data.images.decode import CorruptSample, decode, image_size
from cnn2gnn_dist.data.tar.samples import samples
from tests.support.bombs import png
from tests.support.shards import data_dir, encode_image, random_images

IMAGE = random_images(1, 40, 56, seed=3)[0]


def bytes_of(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"subsampling": 2, "quality": 30},
        {"quality": 100},
    ],
    ids=str,
)
def test_jpeg_equals_pillow(options):
    data = encode_image(IMAGE, "jpg", **options)
    found = decode(data)
    assert found.dtype == np.uint8
    # Both use libjpeg-turbo, but different releases of it.
    np.testing.assert_array_equal(found, by_pillow(data))


def test_grey_jpeg_becomes_rgb():
    data = bytes_of(Image.fromarray(IMAGE).convert("L"), "JPEG")
    found = decode(data)
    assert found.shape == (40, 56, 3)
    np.testing.assert_array_equal(found, by_pillow(data))
    np.testing.assert_array_equal(found[..., 0], found[..., 2])


def test_cmyk_jpeg_becomes_rgb():
    data = bytes_of(Image.fromarray(IMAGE).convert("CMYK"), "JPEG", quality=95)
    found = decode(data)
    np.testing.assert_array_equal(found, by_pillow(data))
    assert np.abs(found.astype(int) - IMAGE).mean() < 12  # not inverted


def test_ycck_jpeg_becomes_rgb():
    data = bytes_of(Image.fromarray(IMAGE).convert("CMYK"), "JPEG", quality=95)
    flag = data.index(b"Adobe") + 11  # color transform: 2 is YCCK
    data = data[:flag] + b"\x02" + data[flag + 1 :]
    assert simplejpeg.decode_jpeg_header(data)[2] == "YCCK"
    np.testing.assert_array_equal(decode(data), by_pillow(data))


@pytest.mark.parametrize(
    ("chroma", "factors"),
    [("444", (0x22, 0x12, 0x21)), ("411", (0x14, 0x11, 0x11))],
    ids=str,
)
def test_rare_chroma_that_simplejpeg_does_not_know(chroma, factors):
    """Equivalent sampling factors: valid images (with shuffled blocks) that Pillow reads."""
    image = random_images(1, 64, 64)[0]
    data = bytearray(simplejpeg.encode_jpeg(image, colorsubsampling=chroma))
    frame = data.index(b"\xff\xc0")
    data[frame + 11 : frame + 20 : 3] = bytes(factors)
    with pytest.raises((KeyError, ValueError)):
        simplejpeg.decode_jpeg_header(bytes(data))
    np.testing.assert_array_equal(decode(bytes(data)), by_pillow(bytes(data)))


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
def test_png_whatever_its_name(mode):
    image = Image.fromarray(IMAGE).convert(mode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(bytes_of(image, "PNG"))
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "GIF", "PPM", "TIFF"])
def test_other_kinds(kind):
    data = bytes_of(Image.fromarray(IMAGE), kind)
    np.testing.assert_array_equal(decode(data), by_pillow(data))


@pytest.mark.parametrize("kind", ["ICO", "PCX", "SGI", "EPS"])
def test_unusual_formats_are_not_tried(kind):
    """Pillow would read them, and start Ghostscript for the last one."""
    with pytest.raises(CorruptSample, match=r"none of JPEG, PNG|which is not supported"):
        decode(bytes_of(Image.fromarray(IMAGE), kind))


def test_exif_orientation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    data = bytes_of(Image.fromarray(IMAGE), "JPEG", exif=exif)
    assert decode(data).shape == (40, 56, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.9])
def test_truncated(suffix, share):
    data = encode_image(random_images(1, 120, 160)[0], suffix)
    with pytest.raises(CorruptSample):
        decode(data[: int(len(data) * share)])


def test_truncated_cmyk():
    data = bytes_of(Image.fromarray(IMAGE).convert("CMYK"), "JPEG")
    with pytest.raises(CorruptSample):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"\xff\xd8", b"\xff\xd8\xff\xe0" + bytes(99), b"not an image", bytes(1000)],
)
def test_garbage(data):
    with pytest.raises(CorruptSample):
        decode(data)


def test_random_damage_is_either_an_image_or_corrupt():
    rng = np.random.default_rng(0)
    for suffix in ("jpg", "png"):
        whole = np.frombuffer(encode_image(IMAGE, suffix), np.uint8)
        for _ in range(100):
            data = whole.copy()
            data[rng.integers(0, len(data), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(CorruptSample):
                assert decode(data.tobytes()).shape[2] == 3


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_too_large_is_refused_by_the_header_alone(suffix, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 56 - 1)
    with pytest.raises(CorruptSample, match="56 x 40 pixels"):
        decode(encode_image(IMAGE, suffix))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 56)
    assert decode(encode_image(IMAGE, suffix)).shape == IMAGE.shape


@pytest.mark.parametrize(
    ("side", "said"), [(10_000, "10000 x 10000 pixels"), (30_000, "900000000 pixels")]
)
@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_pillows_own_limits_do_not_show(kind, side, said):
    """It warns of more pixels than ours, and has an error of its own for more than twice as many."""
    data = png(side, side, b"")
    if kind == "bmp":
        head = (99, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0)
        data = b"BM" + struct.pack("<IIIIiiHHIIiiII", *head) + bytes(99)
    decoding._silence_pillow.cache_clear()
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with pytest.raises(CorruptSample, match=f"^{said}, more than 89478485$"):
            decode(data)
    decoding._silence_pillow.cache_clear()  # its filter is gone
    assert not shown


@pytest.mark.parametrize("how", ["lossy", "lossless", "extended"])
def test_a_large_webp_is_refused_before_it_is_opened(how, monkeypatch):
    """Opening it allocates memory for its whole canvas."""
    image = Image.fromarray(random_images(1, 40, 57)[0])
    more = {"extended": {"exif": b"Exif\0\0" + bytes(9)}, "lossless": {"lossless": True}}
    data = bytes_of(image, "WEBP", **more.get(how, {}))
    assert data[12:16] == {"lossy": b"VP8 ", "lossless": b"VP8L", "extended": b"VP8X"}[how]
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 57)
    np.testing.assert_array_equal(decode(data), by_pillow(data))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 40 * 57 - 1)
    opened = []
    monkeypatch.setattr(Image, "open", lambda *_, **__: opened.append(1))
    with pytest.raises(CorruptSample, match="57 x 40 pixels"):
        decode(data)
    assert not opened


def test_large_progressive_images_of_usual_scans_are_decoded(monkeypatch):
    image = random_images(1, 300, 400)[0]
    data = encode_image(image, "jpg", progressive=True)
    scans = data.count(b"\xff\xda")
    assert scans > 4
    monkeypatch.setattr(decoding, "MAX_WORK", 300 * 400 * scans)
    assert decode(data).shape == image.shape
    monkeypatch.setattr(decoding, "MAX_WORK", 300 * 400 * scans - 1)
    with pytest.raises(CorruptSample, match=f"400 x 300 pixels in {scans} scans"):
        decode(data)
    plain = encode_image(
        image, "jpg", icc_profile=b"\xff\xda" * 999
    )  # the bytes of a scan marker, but no scans
    assert decode(plain).shape == image.shape


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_the_size_from_the_header(kind: str):
    data = bytes_of(Image.fromarray(IMAGE), kind)
    assert image_size(data) == IMAGE.shape[:2]
    with pytest.raises(CorruptSample):
        image_size(data[:4])


@pytest.mark.parametrize("order", [1, -1])
def test_of_a_png_with_two_headers_the_size_is_the_decoders(order: int):
    """Pillow believes the last; a limit of pixels that looked at the first would let the other pass."""
    small, large = (bytes_of(Image.new("RGB", (side, 7)), "PNG") for side in (5, 300))
    first, second = (small, large)[::order]
    data = first[:33] + second[8:]  # signature and header, then a whole image without its signature
    with Image.open(io.BytesIO(data)) as image:
        assert image_size(data) == (image.height, image.width)


def test_a_png_with_more_pixels_than_the_limit_is_refused_by_its_header(monkeypatch):
    data = bytes_of(Image.fromarray(IMAGE), "PNG")
    high, wide = IMAGE.shape[:2]
    monkeypatch.setattr(decoding, "MAX_PIXELS", high * wide - 1)
    with pytest.raises(CorruptSample, match=f"{wide} x {high} pixels, more than"):
        image_size(data)


def test_real_photographs():
    shards = sorted(data_dir("imagenet-sample").rglob("*.tar"))
    if not shards:
        pytest.skip("no shards in imagenet-sample")
    with open(shards[0], "rb") as file:
        for sample, _ in zip(samples(shards[0]), range(24), strict=False):
            member = next(m for s, m in sample.fields.items() if s in ("jpg", "jpeg", "png"))
            file.seek(member.offset)
            data = file.read(member.size)
            np.testing.assert_array_equal(decode(data), by_pillow(data))
