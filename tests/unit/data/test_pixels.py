"""The pixels of each kind of file (docs/images.md) against values computed by hand."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from cnn2gnn_dist.data.images import pixels
from cnn2gnn_dist.data.images.batch_views import fill_views
from cnn2gnn_dist.data.images.decode import CorruptSample, decode
from cnn2gnn_dist.data.images.formats import image_suffix, what_it_is
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render
from tests.support.bombs import chunk, tiff

HIGH, WIDE = 24, 40
y, x = np.mgrid[:HIGH, :WIDE]
GREY = (x * 5 + y * 2).astype(np.uint8)  # 0 to 241
ALPHA = (255 - y * 11).astype(np.uint8)  # 2 to 255
RGB = np.stack([GREY, 255 - GREY, np.full_like(GREY, 128)], -1)
DEEP = (x * 1600 + y * 131).astype(np.uint16)  # 0 to 65413


def saved(image: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    whole = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    whole.save(file, kind, **options)
    return file.getvalue()


def png(depth: int, colour: int, rows: np.ndarray, *before: bytes) -> bytes:
    """A PNG written by the letter of the specification; ``rows`` [H, bytes]."""
    wide = rows.shape[1] * 8 // (depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour])
    head = struct.pack(">IIBBBBB", wide, len(rows), depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    parts = [chunk(b"IHDR", head), *before, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def as_bytes(values: np.ndarray, kind: str) -> np.ndarray:
    """The values as bytes, row by row."""
    return np.ascontiguousarray(values.astype(kind)).view(np.uint8).reshape(len(values), -1)


def packed(levels_HW: np.ndarray, bits: int) -> np.ndarray:
    """Gray levels of ``bits`` bits, several per byte, the first one in the upper bits."""
    single = (levels_HW[..., None] >> np.arange(bits)[::-1] & 1).astype(np.uint8)
    return np.packbits(single.reshape(len(levels_HW), -1), axis=1)


def transparent(*values: int) -> bytes:
    return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))


def on_white(colours_HWC: np.ndarray, alpha_HW: np.ndarray) -> np.ndarray:
    """Blending with white, as the formula says, in floating point."""
    share = alpha_HW[..., None] / 255
    return colours_HWC * share + 255 * (1 - share)


def plain_tiff(
    pixels_: np.ndarray, bits: int, photometric: int, signed: int = 1, **more: int
) -> bytes:
    """An uncompressed TIFF with one strip, and one sample per pixel unless ``samples`` is given."""
    body, samples = pixels_.tobytes(), more.get("samples", 1)
    size = [(256, 4, 1, WIDE), (257, 4, 1, HIGH), (278, 4, 1, HIGH), (279, 4, 1, len(body))]
    kind = [(258, 3, 1, bits), (259, 3, 1, 1), (262, 3, 1, photometric), (277, 3, 1, samples)]
    return tiff([*size, *kind, (273, 4, 1, 8), (339, 3, 1, signed)], body)


def planes_tiff(planes: list[np.ndarray], photometric: int, order: str, bits: int = 16) -> bytes:
    """An uncompressed TIFF with one strip per color (PlanarConfiguration 2)."""
    kind, count = f"{order}u{bits // 8}", len(planes)
    body = b"".join(plane.astype(kind).tobytes() for plane in planes)
    each, at = len(body) // count, 8 + len(body)
    lists = struct.pack(f"{order}{count}H", *[bits] * count)
    lists += struct.pack(f"{order}{count}I", *[8 + i * each for i in range(count)])
    lists += struct.pack(f"{order}{count}I", *[each] * count)
    tags = [
        (256, 4, 1, WIDE),
        (257, 4, 1, HIGH),
        (258, 3, count, at),
        (273, 4, count, at + 2 * count),
    ]
    tags += [(278, 4, 1, HIGH), (279, 4, count, at + 6 * count)]
    short = [(259, 1), (262, photometric), (277, count), (284, 2)]
    short += [(338, 2)] * (photometric == 2 and count == 4)
    entries = [(tag, struct.pack(order + "HHII", tag, *more)) for tag, *more in tags]
    entries += [(tag, struct.pack(order + "HHIHxx", tag, 3, 1, value)) for tag, value in short]
    directory = struct.pack(order + "H", len(entries)) + b"".join(e for _, e in sorted(entries))
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", at + len(lists))
    return head + body + lists + directory + bytes(4)


def bmp(header: int, alpha: np.ndarray) -> bytes:
    """A 32-bit BMP whose masks declare an alpha channel; a header of 108 bytes is V4, of 124 bytes V5."""
    body = np.dstack([RGB[..., ::-1], alpha.astype(np.uint8)])[::-1].tobytes()
    about = struct.pack("<IiiHHIIiiII", header, WIDE, HIGH, 1, 32, 3, len(body), 0, 0, 0, 0)
    about += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    place = 14 + header
    start = b"BM" + struct.pack("<IHHI", place + len(body), 0, 0, place)
    return start + about.ljust(header, b"\0") + body


FLOATS = (GREY / 255).astype(np.float32)
LEVELS_2, LEVELS_4 = (x + y) % 4, (x + y) % 16
BITS = (x + y) % 3 == 0
TWELVE = ((x * 100 + y) % 4096).astype(np.uint16)

GREYS = {
    "png, 1 bit": (png(1, 0, packed(BITS, 1)), BITS * 255),
    "png, 2 bits": (png(2, 0, packed(LEVELS_2, 2)), LEVELS_2 * 85),
    "png, 4 bits": (png(4, 0, packed(LEVELS_4, 4)), LEVELS_4 * 17),
    "png, 8 bits": (png(8, 0, GREY), GREY),
    "png, 16 bits": (png(16, 0, as_bytes(DEEP, ">u2")), DEEP // 256),
    "tiff, 16 bits": (saved(DEEP, "TIFF"), DEEP // 256),
    "tiff, 16 bits, packed": (saved(DEEP, "TIFF", compression="tiff_lzw"), DEEP // 256),
    "tiff, 16 bits, other order": (
        saved(Image.frombytes("I;16B", (WIDE, HIGH), as_bytes(DEEP, ">u2").tobytes()), "TIFF"),
        DEEP // 256,
    ),
    "tiff, 16 bits, white is zero": (plain_tiff(DEEP, 16, 0), 255 - DEEP // 256),
    "tiff, 12 bits": (plain_tiff(packed(TWELVE, 12), 12, 1), TWELVE // 16),
    "tiff, 8 bits, white is zero": (plain_tiff(GREY, 8, 0), 255 - GREY),
    "tiff, floats to 1": (saved(FLOATS, "TIFF"), GREY),
    "tiff, floats to 1, white is zero": (plain_tiff(FLOATS, 32, 0, 3), 255 - GREY),
    "tiff, floats to 255": (saved(GREY.astype(np.float32) + 0.4, "TIFF"), GREY),
    "pgm, 8 bits": (b"P5 40 24 255\n" + GREY.tobytes(), GREY),
    "pgm, 16 bits": (b"P5 40 24 65535\n" + as_bytes(DEEP, ">u2").tobytes(), DEEP // 256),
    "pgm, 12 bits": (
        b"P5 40 24 4095\n" + as_bytes(TWELVE, ">u2").tobytes(),
        np.rint(TWELVE / 4095 * 65535).astype(int) // 256,
    ),
    "pgm in words": (b"P2 40 24 255\n" + " ".join(map(str, GREY.ravel())).encode(), GREY),
    "pbm": (b"P4 40 24\n" + packed(~BITS, 1).tobytes(), BITS * 255),
    "pfm": (b"Pf 40 24 -1.0\n" + FLOATS[::-1].tobytes(), GREY),
}

PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)
CLEAR = np.arange(256)[::-1].astype(np.uint8)
COLOURS = {
    "png, 16 bits a colour": (png(16, 2, as_bytes(RGB.astype(int) * 257, ">u2")), RGB, 0),
    "ppm, 16 bits a colour": (
        b"P6 40 24 65535\n" + as_bytes(RGB.astype(int) * 257, ">u2").tobytes(),
        RGB,
        0,
    ),
    "bmp": (saved(RGB, "BMP"), RGB, 0),
    "bmp, V4, an alpha that is all 0": (bmp(108, 0 * ALPHA), RGB, 0),
    "bmp, V5, an alpha that is all 0": (bmp(124, 0 * ALPHA), RGB, 0),
    "tiff, 8 bits, plane by plane": (planes_tiff(list(RGB.transpose(2, 0, 1)), 2, ">", 8), RGB, 0),
    "palette": (png(8, 3, GREY, chunk(b"PLTE", PALETTE.tobytes())), PALETTE[GREY], 0),
    "tiff, YCbCr": (saved(Image.fromarray(RGB).convert("YCbCr"), "TIFF"), RGB, 3),
    "tiff, CMYK": (
        saved(
            Image.frombytes(
                "CMYK", (WIDE, HIGH), np.dstack([255 - RGB, RGB[..., :1] * 0]).tobytes()
            ),
            "TIFF",
        ),
        RGB,
        0,
    ),
    "jpeg, CMYK": (
        saved(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=100, subsampling=0),
        RGB,
        4,
    ),
    "webp, animated": (
        saved(
            RGB, "WEBP", lossless=True, save_all=True, append_images=[Image.fromarray(255 - RGB)]
        ),
        RGB,
        0,
    ),
    "tiff, several pages": (
        saved(RGB, "TIFF", save_all=True, append_images=[Image.fromarray(255 - RGB)]),
        RGB,
        0,
    ),
}

INK = np.zeros((HIGH, WIDE, 3), np.uint8)
TRANSPARENT = {
    "png, RGBA": (saved(np.dstack([RGB, ALPHA]), "PNG"), on_white(RGB, ALPHA)),
    "png, a drawing in alpha": (saved(np.dstack([INK, ALPHA]), "PNG"), on_white(INK, ALPHA)),
    "png, grey and alpha": (
        saved(np.dstack([GREY, ALPHA]), "PNG"),
        on_white(GREY[..., None], ALPHA),
    ),
    "png, RGBA of 16 bits": (
        png(16, 6, as_bytes(np.dstack([RGB, ALPHA]).astype(int) * 257, ">u2")),
        on_white(RGB, ALPHA),
    ),
    "png, grey and alpha of 16 bits": (
        png(16, 4, as_bytes(np.dstack([GREY, ALPHA]).astype(int) * 257, ">u2")),
        on_white(GREY[..., None], ALPHA),
    ),
    "png, a grey is transparent": (
        png(8, 0, GREY, transparent(100)),
        np.where(GREY == 100, 255, GREY)[..., None],
    ),
    "png, a grey of 2 bits is transparent": (
        png(2, 0, packed(LEVELS_2, 2), transparent(1)),
        np.where(LEVELS_2 == 1, 255, LEVELS_2 * 85)[..., None],
    ),
    "png, a grey of 4 bits is transparent": (
        png(4, 0, packed(LEVELS_4, 4), transparent(9)),
        np.where(LEVELS_4 == 9, 255, LEVELS_4 * 17)[..., None],
    ),
    "png, black of 1 bit is transparent": (png(1, 0, packed(BITS, 1), transparent(0)), INK + 255),
    "png, a grey of 16 bits is transparent": (
        png(16, 0, as_bytes(DEEP, ">u2"), transparent(int(DEEP[3, 5]))),
        np.where(DEEP[3, 5] == DEEP, 255, DEEP // 256)[..., None],
    ),
    "png, a colour is transparent": (
        png(8, 2, RGB.reshape(HIGH, -1), transparent(100, 155, 128)),
        np.where((GREY == 100)[..., None], 255, RGB),
    ),
    "png, a palette with alpha": (
        png(8, 3, GREY, chunk(b"PLTE", PALETTE.tobytes()), chunk(b"tRNS", CLEAR.tobytes())),
        on_white(PALETTE[GREY], CLEAR[GREY]),
    ),
    "png, one of a palette is transparent": (
        png(8, 3, GREY, chunk(b"PLTE", PALETTE.tobytes()), chunk(b"tRNS", b"\xff" * 7 + b"\0")),
        on_white(PALETTE[GREY], np.where(GREY == 7, 0, 255)),
    ),
    "bmp, V4": (bmp(108, ALPHA), on_white(RGB, ALPHA)),
    "bmp, V5, clear but for one pixel": (
        bmp(124, np.where(y * WIDE + x == 7, 255, 0)),
        np.where((y * WIDE + x == 7)[..., None], RGB, 255.0),
    ),
    "webp": (
        saved(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True),
        on_white(RGB, ALPHA),
    ),
    "tiff": (saved(np.dstack([RGB, ALPHA]), "TIFF"), on_white(RGB, ALPHA)),
    "tiff, grey and alpha": (
        saved(np.dstack([GREY, ALPHA]), "TIFF"),
        on_white(GREY[..., None], ALPHA),
    ),
}


@pytest.mark.parametrize("name", GREYS)
def test_grey(name):
    data, wanted_HW = GREYS[name]
    np.testing.assert_array_equal(decode(data), np.repeat(wanted_HW[..., None], 3, axis=2))


@pytest.mark.parametrize("name", COLOURS)
def test_colours(name):
    data, wanted, near = COLOURS[name]
    found = decode(data).astype(int)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= near


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_lies_on_white(name):
    data, wanted = TRANSPARENT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = decode(data)
    assert np.abs(found - np.broadcast_to(wanted, found.shape)).max() <= 1


def test_lab_becomes_the_colours_that_it_was_made_from():
    smooth = np.stack([100 + y, 120 + x, 110 + x], -1).astype(np.uint8)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    made = ImageCms.profileToProfile(Image.fromarray(smooth), srgb, lab, outputMode="LAB")
    assert np.abs(decode(saved(made, "TIFF")).astype(int) - smooth).max() <= 3


def gif(clear: int | None, left: int = 0, top: int = 0) -> bytes:
    """A GIF of four grays whose frame begins at (left, top) of its canvas."""
    levels = ((x + y) % 4).astype(np.uint8)
    image = Image.fromarray(levels).convert("P")
    image.putpalette([0, 0, 0, 85, 85, 85, 170, 170, 170, 254, 254, 254])
    data = bytearray(saved(image, "GIF", **({} if clear is None else {"transparency": clear})))
    frame = data.rindex(b"," + bytes(4) + struct.pack("<HH", WIDE, HIGH)) + 1
    data[frame : frame + 4] = struct.pack("<HH", left, top)
    data[6:10] = struct.pack("<HH", WIDE + 2 * left, HIGH + 2 * top)
    return bytes(data)


def test_gif_lies_on_white_also_around_a_small_first_frame():
    levels = np.array([0, 85, 170, 254])[(x + y) % 4]
    np.testing.assert_array_equal(decode(gif(None))[..., 1], levels)
    np.testing.assert_array_equal(decode(gif(2))[..., 1], np.where(levels == 170, 255, levels))
    for clear in (None, 3):
        found = decode(gif(clear, left=3, top=5))
        inside = np.where(levels == (None if clear is None else 254), 255, levels)
        np.testing.assert_array_equal(
            found, np.pad(inside, ((5, 5), (3, 3)), constant_values=255)[..., None].repeat(3, 2)
        )


NAN = FLOATS.copy()
NAN[3, 3] = np.nan
REFUSED = {
    "whole numbers of 32 bits": (plain_tiff(DEEP.astype("<u4"), 32, 1), "32-bit integer samples"),
    "signed numbers of 32 bits": (saved(DEEP.astype(np.int32), "TIFF"), "signed samples"),
    "signed numbers of 16 bits": (plain_tiff(DEEP.astype("<i2"), 16, 1, 2), "signed samples"),
    "signed numbers of 8 bits": (plain_tiff(GREY, 8, 1, 2), "signed samples"),
    "floats below 0": (saved(FLOATS - 0.5, "TIFF"), "floats from -0.5 to"),
    "floats to 65535": (saved(DEEP.astype(np.float32), "TIFF"), "neither 0 to 1 nor 0 to 255"),
    "floats that are none": (saved(NAN, "TIFF"), "floats from nan"),
    "a pfm to 1000": (b"Pf 40 24 -1.0\n" + (FLOATS * 1000).tobytes(), "neither 0 to 1"),
    "a colour of 16 bits is transparent": (
        png(16, 2, as_bytes(RGB.astype(int) * 257, ">u2"), transparent(1, 2, 3)),
        "one transparent color",
    ),
    "YCbCr with fewer colours": (
        plain_tiff(RGB[: HIGH // 2], 8, 6, samples=3),
        "subsampled chroma",
    ),
    **{
        f"{name} of 16 bits, plane by plane, {order}": (
            planes_tiff([DEEP] * count, photometric, order),
            "16 bits per channel, stored plane by plane",
        )
        for order in "<>"
        for name, photometric, count in (("RGB", 2, 3), ("RGBA", 2, 4), ("CMYK", 5, 4))
    },
    "floats in colour": (
        plain_tiff(np.repeat(FLOATS, 3), 32, 2, 3, samples=3),
        "TIF of an unsupported variety",
    ),
    "nothing": (b"", "^an empty file$"),
    "a page": (b"<!DOCTYPE html><title>404</title>", "^an HTML page, not an image$"),
    "words": (b"404: Not Found", "^text, not an image$"),
    "a PNG's first bytes": (b"\x89PNG", "^a PNG image$"),
    "a video": (b"\0\0\0\x18ftypmp42" + bytes(99), r"^a video \(MP4 or similar\)$"),
    "avif": (saved(RGB, "AVIF"), "AVIF, which is not supported"),
    "jpeg 2000": (saved(RGB, "JPEG2000"), "JPEG 2000, which is not supported"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(99), "HEIC, which is not supported"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\n",
        "^a Git LFS pointer, not an image$",
    ),
    "numbers": (bytes(range(128, 228)), "none of JPEG, PNG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_with_its_reason(name):
    data, reason = REFUSED[name]
    with pytest.raises(CorruptSample, match=reason):
        decode(data)


SOUND = {**GREYS, **COLOURS, **TRANSPARENT}


@pytest.mark.parametrize("name", SOUND)
def test_training_predict_and_pack_agree(name, monkeypatch):
    """One decoder: a batch of views has the same pixels, and pack accepts the file as an image."""
    data = SOUND[name][0]
    whole = decode(data)
    images = np.zeros((1, HIGH, HIGH, 3), np.uint8)
    assert not fill_views(ViewSpec("none", HIGH), [data], np.zeros(1, int), CLEAN, images)
    np.testing.assert_array_equal(images[0], whole[:, (WIDE - HIGH) // 2 :][:, :HIGH])
    crop, spec = np.zeros((1, 8, 8, 3), np.uint8), ViewSpec("random_resized_crop", 8)
    assert not fill_views(spec, [data], np.zeros(1, int), 0, crop)
    np.testing.assert_array_equal(crop[0], render(spec, whole, 0, 0))
    if name != "pfm":
        assert image_suffix(data[:64]) is not None
    monkeypatch.setattr(pixels, "BLOCK", 3 * WIDE + 1)  # in chunks of three rows: no difference
    np.testing.assert_array_equal(decode(data), whole)


def test_orientation_of_a_tiff_is_applied_and_of_a_jpeg_is_not():
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    assert decode(saved(RGB, "JPEG", exif=exif)).shape == (HIGH, WIDE, 3)
    assert decode(saved(RGB, "PNG", exif=exif)).shape == (HIGH, WIDE, 3)
    assert decode(saved(RGB, "WEBP", exif=exif)).shape == (HIGH, WIDE, 3)
    np.testing.assert_array_equal(decode(saved(RGB, "TIFF", exif=exif)), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    "data", [b"BMI,height", b"P5", b"P6x 3 3", b"GIF", b"RIFF....WAVE", b"\xff\xd8"]
)
def test_what_only_begins_like_an_image_is_none(data):
    assert image_suffix(data) is None
    assert what_it_is(data)
