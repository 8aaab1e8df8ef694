"""Partial JPEG decode by libjpeg-turbo 3, without a compiler: its TurboJPEG API through ctypes.

    pip install 'cnn2gnn-dist[partial]'     # the library, in the wheel of the package turbojpeg

Any libturbojpeg 3 will do: from the wheel, a conda environment or the system. It is used only if its pixels equal
the full decoder's and it is faster on this machine, and only for crops that omit enough of the image.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

MARGIN_COLUMNS, MARGIN_ROWS = 16, 2
"""Pixels decoded around the crop, since chroma upsampling uses neighbors."""

WORTH = 0.9
"""Maximum cost of a crop, as a share of a full decode, for which it is used."""
ENTROPY, TRANSFORM = 0.68, 0.37
"""Cost of the rows down to the crop's end, and of the crop's area, as shares of a full decode (fitted to 800 crops of
photographs, 2026-11-27): entropy coding can't be skipped above the crop."""

_DECOMPRESS, _STOP_ON_WARNING, _RGB = 1, 0, 0  # turbojpeg.h: TJINIT_, TJPARAM_, TJPF_


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "w", "h")]


class TurboCrop:
    """Crops JPEGs with one libturbojpeg. Any number of threads may call it.

    Args:
        library: its path.

    Raises:
        OSError: it can't be loaded.
        AttributeError: it is older than 3.0.
    """

    def __init__(self, library: str | Path) -> None:
        self.library = str(library)
        pointer, number = ctypes.c_void_p, ctypes.c_int
        # Calls that take microseconds keep the GIL; decoding releases it.
        quick, slow = ctypes.PyDLL(self.library), ctypes.CDLL(self.library)
        self._header, self._region = quick.tj3DecompressHeader, quick.tj3SetCroppingRegion
        self._header.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t]
        self._region.argtypes = [pointer, _Region]
        self._decode = slow.tj3Decompress8
        self._decode.argtypes = [pointer, ctypes.c_char_p, ctypes.c_size_t, pointer, number, number]
        self._of_thread = threading.local()
        self._quick = quick

    def __call__(
        self, data: bytes, height: int, width: int, top: int, left: int, high: int, wide: int
    ) -> np.ndarray | None:
        """Decode rows [top, top + high) and columns [left, left + wide) of a JPEG [height, width].

        Returns:
            As :func:`.partial.crop`; also None for a crop that is cheaper to cut from a full decode.
        """
        area = high * min(width, wide + 2 * MARGIN_COLUMNS)
        if ENTROPY * (top + high) * width + TRANSFORM * area > WORTH * height * width:
            return None
        return self.cut(data, height, width, top, left, high, wide)

    def cut(
        self, data: bytes, height: int, width: int, top: int, left: int, high: int, wide: int
    ) -> np.ndarray | None:
        """The same for any crop, worth it or not."""
        inside = 0 <= top < top + high <= height and 0 <= left < left + wide <= width
        unit = _unit(data, height, width)
        if not (inside and unit):
            return None
        x, y = max(0, left - MARGIN_COLUMNS) // unit * unit, max(0, top - MARGIN_ROWS)
        right = min(width, left + wide + MARGIN_COLUMNS)
        region = _Region(x, y, right - x, top + high - y)
        handle, size = self._handle(), len(data)
        made = np.empty((region.h, region.w, 3), np.uint8)
        if (
            self._header(handle, data, size)
            or self._region(handle, region)
            or self._decode(handle, data, size, made.ctypes.data, 0, _RGB)
        ):
            del self._of_thread.held  # after a bad header it would refuse every further image
            return None
        return made[top - y :, left - x : left - x + wide]

    def _handle(self) -> ctypes.c_void_p:
        """Return this thread's decoder, which ends with the thread."""
        held = getattr(self._of_thread, "held", None)
        if held is None:
            held = self._of_thread.held = _Handle(self._quick)
        return held.pointer


class _Handle:
    def __init__(self, library: ctypes.PyDLL) -> None:
        start, self._end = library.tj3Init, library.tj3Destroy
        start.restype, self._end.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        self.pointer = ctypes.c_void_p(start(_DECOMPRESS))
        if not self.pointer or library.tj3Set(self.pointer, _STOP_ON_WARNING, 1):
            raise MemoryError("libturbojpeg can't allocate a decoder")

    def __del__(self) -> None:
        self._end(self.pointer)


def _unit(data: bytes, height: int, width: int) -> int:
    """Return the width of a JPEG's coded units in pixels; 0 if the full decoder must handle it.

    That is every image that might decode differently: progressive, arithmetic or lossless coding, several scans,
    four colors, another size, a file that is truncated or has further markers after the header.
    """
    at, unit, colors, restarts = 2, 0, 0, False
    while data[at : at + 1] == b"\xff" and at + 10 < len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in (0xC0, 0xC1):
            colors = data[at + 9]
            size = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            if data[at + 4] != 8 or size != (height, width) or colors not in (1, 3):
                return 0
            factors = data[at + 11 : at + 11 + 3 * colors : 3]
            unit = 8 * max(factor >> 4 for factor in factors) if colors == 3 else 8
        elif marker == 0xDA:
            whole = data[at + 4] == colors and _rest_is_sound(data, at + 2 + length, restarts)
            return unit if whole else 0
        elif marker == 0xDD:
            restarts = data[at + 4 : at + 6] != b"\0\0"
        elif not (0xE0 <= marker <= 0xFE or marker in (0xC4, 0xDB)):
            return 0
        at += 2 + length
    return 0


def _rest_is_sound(data: bytes, start: int, restarts: bool) -> bool:
    """Whether the coded data run to the end marker without another one, except for expected restart markers."""
    if data[-2:] != b"\xff\xd9":
        return False
    found = data.count(b"\xff", start) - data.count(b"\xff\0", start) - 1
    if found and restarts:
        found -= sum(data.count(bytes((0xFF, marker)), start) for marker in range(0xD0, 0xD8))
    return found == 0


def find() -> TurboCrop | None:
    """Return a libturbojpeg with the full decoder's pixels that is faster; None if there is none."""
    for library in _libraries():
        with contextlib.suppress(OSError, AttributeError, MemoryError):
            found = TurboCrop(library)
            if is_right(found) and _pays(found):
                return found
    return None


def _libraries() -> Iterator[str]:
    """Yield where a libturbojpeg may be: the wheel, this environment (conda), the system."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("turbojpeg") or []:
            if "libturbojpeg" in file.name:
                yield str(file.locate())
    yield from map(str, sorted(Path(sys.prefix, "lib").glob("libturbojpeg.*")))
    yield from (
        "libturbojpeg.so.0",
        "libturbojpeg.dylib",
    )  # the loader finds it; no process is started


def _sample(high: int, wide: int, chroma: str) -> bytes:
    import simplejpeg

    rows, columns = np.mgrid[:high, :wide]
    waves = 128 + 90 * np.sin(np.stack([rows * columns / 40, rows / 3, columns / 2], axis=-1))
    return simplejpeg.encode_jpeg(waves.astype(np.uint8), colorsubsampling=chroma)  # type: ignore[no-any-return]


def is_right(crop: TurboCrop) -> bool:
    """Whether a library's pixels equal the full decoder's, in all samplings of chroma."""
    import simplejpeg

    for chroma in ("444", "422", "420", "440"):
        data = _sample(75, 99, chroma)
        made = crop.cut(data, 75, 99, 33, 41, 24, 31)
        if made is None or not np.array_equal(made, simplejpeg.decode_jpeg(data)[33:57, 41:72]):
            return False
    return True


def _pays(crop: TurboCrop) -> bool:
    """Whether it decodes the middle of a photograph faster than the full decoder decodes all of it, on this machine."""
    import simplejpeg

    data, best = _sample(400, 500, "420"), [float("inf")] * 2
    for _ in range(5):
        marks = [time.thread_time()]
        crop.cut(data, 400, 500, 100, 100, 160, 240)
        marks.append(time.thread_time())
        simplejpeg.decode_jpeg(data, strict=True)
        marks.append(time.thread_time())
        best = [min(old, new) for old, new in zip(best, np.diff(marks).tolist(), strict=True)]
    return best[0] < best[1]
