"""Partial JPEG decode: an optional extra that only saves time. There are two implementations.

    pip install 'cnn2gnn-dist[partial]'                  # libjpeg-turbo 3 in a wheel (turbo_crop.py)
    python -m cnn2gnn_dist.data.images.partial build     # needs a C compiler and libjpeg-turbo's header

If one is available (the compiled one is preferred), it is used for random resized crops of JPEGs: it saves up to half
of the decoding, and the pixels are bit-identical. CNN2GNN_PARTIAL=0 turns it off. Nothing is compiled unless you run
the second command, and no feature depends on it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cnn2gnn_dist import durable, log
from cnn2gnn_dist.data.images import turbo_crop
from cnn2gnn_dist.data.images.turbo_crop import TurboCrop
from cnn2gnn_dist.errors import UserError

SOURCE = Path(__file__).with_suffix(".c")
_Crop = Callable[..., int]


def crop(
    data: bytes, height: int, width: int, top: int, left: int, high: int, wide: int
) -> np.ndarray | None:
    """Decode rows [top, top + high) and columns [left, left + wide) of a JPEG [height, width].

    Returns:
        Pixels [high, wide, 3] uint8, RGB, equal to a crop of the full decode. None: unavailable or
        turned off, or the crop is most of the image, or the image is of a kind that needs a full
        decode, or is corrupt in a way that needs one, as every truncated file is. Corruption visible
        only below the crop (too few or too many bits there) goes undetected: the pixels are then those
        of a lenient full decoder such as Pillow's, where our full decode reports the image as corrupt.
    """
    decode = _decoder()
    if decode is None:
        turbo = _turbo()
        return None if turbo is None else turbo(data, height, width, top, left, high, wide)
    made = np.empty((high, wide, 3), np.uint8)
    if decode(data, len(data), height, width, top, left, high, wide, made.ctypes.data):
        return None
    return made


def path() -> Path:
    """Return the path of the compiled library for this source and machine type."""
    what = SOURCE.read_bytes() + platform.machine().encode()
    return SOURCE.with_name(f"_partial-{hashlib.sha256(what).hexdigest()[:12]}.so")


def build(target: Path | None = None, *flags: str) -> Path:
    """Compile the library ($CC, else cc, gcc or clang), test it and return its path.

    Raises:
        UserError: no compiler, no header, or the library fails its test.
    """
    target = target or path()
    compiler = (
        shlex.split(os.environ.get("CC", ""))
        or [found for found in map(shutil.which, ("cc", "gcc", "clang")) if found][:1]
    )
    if not compiler or not shutil.which(compiler[0]):
        raise UserError("there is no C compiler", where="cc, gcc or $CC", remedy=_REMEDY)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as folder:
            made = Path(folder) / target.name
            options = ["-O2", "-Wall", "-shared", "-fPIC", *flags, "-o", str(made)]
            command = [*compiler, *options, str(SOURCE), "-ljpeg"]
            run = subprocess.run(command, capture_output=True, text=True, errors="replace")
            if run.returncode:
                lines = [line for line in run.stderr.splitlines() if "error" in line]
                what = (lines or run.stderr.splitlines() or ["no message"])[0]
                raise UserError(f"it does not compile: {what}", where=str(SOURCE), remedy=_REMEDY)
            if not flags:
                _load(made)
            durable.sync(made)
            os.replace(made, target)  # atomic: another process may be loading it
    except OSError as error:
        raise UserError(
            f"the library can't be written or loaded: {error}",
            where=str(target.parent),
            remedy="build it as the owner of this installation",
        ) from None
    return target


_REMEDY = (
    "install a compiler and libjpeg-turbo's header (Debian: gcc and libjpeg62-turbo-dev, Fedora: "
    "gcc and libjpeg-turbo-devel), or do without it: everything works, but crops are slower"
)


@functools.cache
def _decoder() -> _Crop | None:
    if os.environ.get("CNN2GNN_PARTIAL", "1") == "0" or not path().exists():
        return None
    try:
        return _load(path())
    except (OSError, UserError) as error:
        reason = error.what if isinstance(error, UserError) else error
        warnings.warn(f"partial JPEG decode is not used: {reason}", stacklevel=2)
        return None


@functools.cache
def _turbo() -> TurboCrop | None:
    return None if os.environ.get("CNN2GNN_PARTIAL", "1") == "0" else turbo_crop.find()


def _load(library: Path) -> _Crop:
    """Load the library's function and check that its pixels equal the full decoder's."""
    import simplejpeg

    decode = ctypes.CDLL(str(library)).cnn2gnn_crop  # ctypes releases the GIL during the call
    number = ctypes.c_uint32
    decode.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[number] * 6, ctypes.c_void_p]
    decode.restype = ctypes.c_int
    rows, columns = np.mgrid[:75, :99]
    waves = 128 + 90 * np.sin(np.stack([rows * columns / 40, rows / 3, columns / 2], axis=-1))
    for chroma in ("444", "420"):
        data = simplejpeg.encode_jpeg(waves.astype(np.uint8), colorsubsampling=chroma)
        made = np.empty((24, 31, 3), np.uint8)
        failed = decode(data, len(data), 75, 99, 33, 41, 24, 31, made.ctypes.data)
        if failed or not np.array_equal(made, simplejpeg.decode_jpeg(data)[33:57, 41:72]):
            raise UserError(
                "its pixels differ from those of the full decoder",
                where=str(library),
                remedy="build it again: python -m cnn2gnn_dist.data.images.partial build",
            )
    return decode  # type: ignore[no-any-return]


def main(words: list[str]) -> int:
    """Run ``build``; any other argument, or none, prints the status."""
    try:
        if words == ["build"]:
            log.output(f"built and tested: {build()}")
        elif _decoder() is not None:
            log.output(f"in use: {path()}")
        elif (turbo := _turbo()) is not None:
            log.output(f"in use: {turbo.library}")
        elif path().exists():
            log.output(f"built, but not in use (CNN2GNN_PARTIAL=0, or see the warning): {path()}")
        else:
            log.output(
                "not available, or not faster than a full decode: pip install 'cnn2gnn-dist[partial]', or "
                "python -m cnn2gnn_dist.data.images.partial build"
            )
    except UserError as error:
        log.report_error(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
