"""Decompression bombs: small files that a decoder must refuse or read without much memory or time."""

from __future__ import annotations

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image

GIGA = 1 << 29
"""Decompressed bytes of a bomb: more than the test's process may allocate."""


def saved(kind: str, high: int = 24, wide: int = 24, **options: object) -> bytes:
    """A small valid image of a format."""
    rows = np.arange(high * wide * 3, dtype=np.uint8).reshape(high, wide, 3)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@functools.cache
def unfolding(size: int) -> bytes:
    """Compressed zeros, which decompress to hundreds of times the size."""
    packer, piece = zlib.compressobj(1), bytes(1 << 20)
    return b"".join(packer.compress(piece) for _ in range(size >> 20)) + packer.flush()


def png(high: int, wide: int, body: bytes, *before: bytes, kind: int = 2) -> bytes:
    """A PNG with a given size, body and chunks before the body."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, 8, kind, 0, 0, 0))
    whole = [b"\x89PNG\r\n\x1a\n", head, *before, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"".join(whole)


def pngs() -> dict[str, bytes]:
    """PNGs that claim, or decompress to, gigabytes."""
    small, bomb = zlib.compress(bytes(8 * 25)), unfolding(GIGA)
    text = b"key\0\0" + bomb
    sound = png(8, 8, small)
    return {
        "png, size": png(30_000, 30_000, unfolding(1 << 26)),
        "png, largest size": png(2**31 - 1, 2**31 - 1, small),
        "png, one row": png(1, 2**31 - 1, small),
        "png, body": png(8, 8, bomb),
        "png, text": png(8, 8, small, chunk(b"zTXt", text)),
        "png, international text": png(8, 8, small, chunk(b"iTXt", b"k\0\1\0\0\0" + bomb)),
        "png, profile": png(8, 8, small, chunk(b"iCCP", b"name\0\0" + bomb)),
        "png, many texts": png(8, 8, small, *[chunk(b"zTXt", b"k%d\0\0" % i + unfolding(1 << 20)) for i in range(300)]),
        "png, length of a chunk": sound[:33] + b"\x7f\xff\xff\xffIDAT" + sound[41:],
        "png, animation": png(8, 8, small, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))),
    }  # fmt: skip


def jpegs() -> dict[str, bytes]:
    """JPEGs that claim gigabytes, or have scans that take hours."""
    plain, steps = saved("JPEG"), saved("JPEG", progressive=True)

    def claims(data: bytes, marker: bytes, high: int, wide: int) -> bytes:
        at = data.index(marker) + 5
        return data[:at] + struct.pack(">HH", high, wide) + data[at + 4 :]

    file = io.BytesIO()
    Image.new("CMYK", (8, 8)).save(file, "JPEG")
    start = steps.rindex(b"\xff\xda")
    last = steps[start:-2]
    frame = steps.index(b"\xff\xc2")
    rare = steps[: frame + 11] + b"\x14" + steps[frame + 12 :]
    return {
        "jpeg, rare chroma, size": claims(rare, b"\xff\xc2", 65500, 65500),
        "jpeg, rare chroma, scans": claims(rare, b"\xff\xc2", 9000, 9000)[:start] + last * 3000,
        "jpeg, size": claims(plain, b"\xff\xc0", 65500, 65500),
        "jpeg, size in steps": claims(steps, b"\xff\xc2", 65500, 65500),
        "jpeg, size of four colours": claims(file.getvalue(), b"\xff\xc0", 65500, 65500),
        "jpeg, scans": claims(steps, b"\xff\xc2", 9000, 9000)[:start] + last * 3000 + b"\xff\xd9",
        "jpeg, empty scans": claims(plain, b"\xff\xc0", 9400, 9400),
    }


def tiff(tags: list[tuple[int, int, int, int]], body: bytes = bytes(64)) -> bytes:
    """A TIFF of (tag, type, count, value); 8 is the offset of the body."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def tiffs() -> dict[str, bytes]:
    """TIFFs whose strips, tiles, samples or lists would fill the memory."""
    size = [(256, 4, 1, 64), (257, 4, 1, 64)]
    kind = [(258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    bomb = unfolding(GIGA)
    strip = [(273, 4, 1, 8), (278, 4, 1, 64), (279, 4, 1, len(bomb))]
    tile = [(322, 4, 1, 1 << 20), (323, 4, 1, 1 << 16), (324, 4, 1, 8), (325, 4, 1, len(bomb))]
    small_tile = [(322, 4, 1, 16), (323, 4, 1, 1 << 26), (324, 4, 1, 8), (325, 4, 1, len(bomb))]
    wide = [(256, 4, 1, 2**31), (257, 4, 1, 2**31 - 1)]
    many = [(258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (277, 3, 1, 65535)]
    return {
        "tiff, size": tiff(wide + kind + strip, bomb),
        "tiff, strip": tiff(size + kind + strip, bomb),
        "tiff, tile": tiff(size + kind + tile, bomb),
        "tiff, high tile": tiff(size + kind + small_tile, bomb),
        "tiff, samples": tiff(size + many + strip),
        "tiff, list": tiff([*size, *kind, (273, 4, 2**31, 8), (279, 4, 2**31, 8)]),
        "tiff, text": tiff([*size, *kind, (270, 2, 2**32 - 1, 8), *strip]),
    }


def webps() -> dict[str, bytes]:
    """WebPs, still and animated, whose canvas is larger than their contents."""
    plain, lossless = saved("WEBP"), saved("WEBP", lossless=True)
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=10)
    moving = file.getvalue()
    largest = (2**14 - 1).to_bytes(3, "little") * 2
    at = moving.index(b"VP8X") + 12
    bits = (0x3FFF | 0x3FFF << 14).to_bytes(4, "little")
    body = lossless.index(b"VP8L") + 9
    lossy = plain.index(b"\x9d\x01\x2a") + 3
    return {
        "webp, canvas": moving[:at] + largest + moving[at + 6 :],
        "webp, lossless": lossless[:body] + bits + lossless[body + 4 :],
        "webp, lossy": plain[:lossy] + b"\xff\x3f\xff\x3f" + plain[lossy + 4 :],
    }


def others() -> dict[str, bytes]:
    """GIF, BMP and portable maps."""
    gif, bmp = saved("GIF"), saved("BMP")
    frames = [Image.new("P", (16, 16), number) for number in range(2)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:] * 2000, loop=0)
    frame = gif.rindex(b",") + 5
    side = struct.pack("<HH", 65535, 65535)
    return {
        "gif, screen": gif[:6] + side + gif[10:],
        "gif, frame": gif[:frame] + side + gif[frame + 4 :],
        "gif, frames": file.getvalue(),
        "bmp, size": bmp[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + bmp[26:],
        "bmp, upside down": bmp[:18] + struct.pack("<ii", 60000, -60000) + bmp[26:],
        "bmp, palette": bmp[:28] + struct.pack("<H", 8) + bmp[30:46] + b"\xff" * 4 + bmp[50:],
        "ppm, size": b"P6 99999999 99999999 255\n" + bytes(99),
        "ppm, plain": b"P3 9000 9000 255\n" + b"1 " * 99,
        "ppm, digits": b"P6 " + b"9" * 999_999 + b" 9 255\n",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    }


def all_bombs() -> dict[str, bytes]:
    """Every bomb by name."""
    return {**pngs(), **jpegs(), **tiffs(), **webps(), **others()}
