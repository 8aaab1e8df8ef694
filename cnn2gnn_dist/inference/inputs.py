"""What users give to a model: paths, bytes, pictures, arrays, folders, shards, Parquet → pixels."""

from __future__ import annotations

import errno
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.data.images.decode import NO_IMAGE, CorruptSample, decode
from cnn2gnn_dist.data.images.formats import IMAGE_SUFFIXES
from cnn2gnn_dist.data.images.image_files import MAX_BYTES, find_images, printable, read_file
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec, render
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.log import counted

UNNAMED = "input "
"""Prefix of the names of unnamed inputs; their position follows."""
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
"""Suffixes of shards; a compressed one is read from its beginning to its end."""
PARQUET_ROWS = 256
"""Rows of a Parquet file read at a time."""


@dataclass(frozen=True)
class Input:
    """One image as it was given.

    Attributes:
        name: its path, ``shard.tar/key.jpg``, ``file.parquet#row``, or ``input N``.
        value: bytes, a path, a PIL image, an array uint8 [H, W, 3] or [H, W]; or a
            ``CorruptSample``: why there is no image.
        named: False: its name is only its position among the inputs. (A file's name may read the same.)
    """

    name: str
    value: Any
    named: bool = True


@dataclass(frozen=True)
class Pixels:
    """An input as the model sees it: ``pixels`` uint8 [S, S, 3], or the reason why there are none."""

    name: str
    pixels: np.ndarray | None
    error: str | None = None
    named: bool = True


def complaint(name: str, why: str) -> str:
    """One line about an input that can't be answered, from its name and its error."""
    if why == os.strerror(errno.ENOENT):
        return f"{name}: there is no such file; check the path"
    return f"{name}: not readable as an image: {why.removesuffix(NO_IMAGE)}"


def is_single(inputs: Any) -> bool:
    """Whether this is one image rather than a collection of images."""
    if isinstance(inputs, (str, os.PathLike)):
        return not os.path.isdir(inputs) and not _is_collection(os.fspath(inputs))
    if isinstance(inputs, np.ndarray):
        return inputs.ndim < 4 and inputs.dtype != object
    return isinstance(inputs, (bytes, bytearray, memoryview)) or hasattr(inputs, "convert")


def expand(inputs: Any, left_out: Callable[[str], None] | None = None) -> Iterator[Input]:
    """Every image of the inputs, in order; folders, shards and Parquet files are opened.

    Args:
        inputs: as ``Classifier.predict`` takes them.
        left_out: called with a line about each folder that holds more than images.

    Raises:
        UserError: a folder without images, a shard or Parquet file that can't be read.
    """
    if isinstance(inputs, np.ndarray) and inputs.ndim == 4:
        inputs = list(inputs)
    if is_single(inputs) or isinstance(inputs, (str, os.PathLike)):
        inputs = [inputs]
    if not isinstance(inputs, Iterable):
        raise UserError(
            f"a {type(inputs).__name__} is not an image",
            remedy="paths, bytes, PIL images, or uint8 arrays [H, W, 3], or a list of them",
        )
    for place, one in enumerate(inputs):
        if isinstance(one, (str, os.PathLike)):
            yield from _of_path(os.fspath(one), left_out)
        elif isinstance(one, Input):
            yield one
        else:
            yield Input(f"{UNNAMED}{place}", one, named=False)


def is_shard(path: str) -> bool:
    """Whether this is the name of a tar shard, compressed or not."""
    return path.lower().endswith(SHARD_SUFFIXES)


def even_size(count: int, size: int) -> int:
    """Images per batch, at most ``size``, if all batches of ``count`` images are about equally large."""
    return -(-count // max(1, -(-count // size)))


def to_pixels(given: Input, views: ViewSpec) -> Pixels:
    """Decode and render one input; a corrupt one is returned with its error."""
    try:
        image = _decoded(given.value)
        return Pixels(given.name, render(views, image, 0, CLEAN), named=given.named)
    except OSError as error:
        return Pixels(given.name, None, error.strerror or str(error))
    except (CorruptSample, ValueError, TypeError) as error:
        return Pixels(given.name, None, str(error))
    except Exception as error:  # Pillow raises many types for an already opened image
        if not hasattr(given.value, "convert"):
            raise
        return Pixels(given.name, None, f"{type(error).__name__}: {error}")


def _decoded(value: Any) -> np.ndarray:
    if isinstance(value, CorruptSample):
        raise value
    if isinstance(value, (str, os.PathLike)):
        return decode(read_file(value))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return decode(bytes(value))
    if isinstance(value, np.ndarray):
        return _array(value)
    if hasattr(value, "convert"):  # PIL, by the same rules as files: docs/images.md
        from cnn2gnn_dist.data.images.pixels import rgb

        return rgb(value)
    raise CorruptSample(f"a {type(value).__name__} is not an image")


def _array(value: np.ndarray) -> np.ndarray:
    if value.dtype != np.uint8:
        raise CorruptSample(f"an array of {value.dtype}; images are uint8, 0..255")
    if value.ndim == 2:
        value = np.repeat(value[:, :, None], 3, axis=2)
    if value.ndim != 3 or value.shape[2] != 3 or 0 in value.shape:
        raise CorruptSample(f"an array of shape {list(value.shape)}; images are [H, W, 3]")
    return np.ascontiguousarray(value)


def _is_collection(path: str) -> bool:
    return is_shard(path) or path.lower().endswith(".parquet")


def _of_path(path: str, left_out: Callable[[str], None] | None) -> Iterator[Input]:
    if os.path.isdir(path):
        found = find_images(path)
        if found.left_out and left_out is not None:
            left_out(f"{printable(path)}: left out: {found.summary()}")
        if not found.images:
            raise UserError(
                "no image in this folder",
                where=printable(path),
                remedy="name image files, or a folder that contains images",
            )
        for image in found.images:
            full = Path(path) / image
            yield Input(printable(full), full)
    elif is_shard(path):
        yield from _of_shard(path)
    elif path.lower().endswith(".parquet"):
        yield from _of_parquet(path)
    else:
        yield Input(printable(path), path)


def _of_shard(path: str) -> Iterator[Input]:
    count = 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                suffix = member.name.rpartition(".")[2].lower()
                if member.isfile() and suffix in IMAGE_SUFFIXES:
                    count += 1
                    yield Input(f"{printable(path)}/{printable(member.name)}", _member(tar, member))
            _check_end(tar)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError) as error:
        behind = f" after its first {counted(count, 'image')}" if count else ""
        raise _unreadable(f"shard can't be read{behind}", path, error) from None
    if not count:
        raise _no_image("shard", path)


def _check_end(tar: tarfile.TarFile) -> None:
    """Check that the tar ended where its members did: tarfile stops at a damaged header without an error.

    Raises:
        ReadError: it did not.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("it is damaged, or was cut off")  # the same message as in training


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | CorruptSample:
    if member.size > MAX_BYTES:  # a sparse file of terabytes may take a few bytes in a tar
        return CorruptSample(f"more than {MAX_BYTES / 1e9:g} GB, too large for an image")
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def _unreadable(what: str, path: str, error: Exception) -> UserError:
    if not os.path.exists(path):
        return UserError("there is no such file", where=printable(path), remedy="check the path")
    if isinstance(error, OSError) and error.strerror:
        why = error.strerror
    elif isinstance(error, tarfile.ReadError) and "successfully" in str(error):
        why = "it does not begin as a tar file does"
    else:
        why = str(error).partition("\n")[0] or type(error).__name__
    return UserError(
        f"this {what}: {why}", where=printable(path), remedy="copy or download it again"
    )


def _no_image(kind: str, path: str) -> UserError:
    return UserError(
        f"no image in this {kind}",
        where=printable(path),
        remedy="name image files, or something that contains images",
    )


def _of_parquet(path: str) -> Iterator[Input]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        column = image_column(file.schema_arrow, path)
        row = 0
        for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
            for value in batch.column(column).to_pylist():
                data = value.get("bytes") if isinstance(value, dict) else value
                if data is None:
                    data = CorruptSample("this row contains no bytes")
                yield Input(f"{printable(path)}#{row}", data)
                row += 1
    except (OSError, pa.ArrowException) as error:
        raise _unreadable("Parquet file can't be read", path, error) from None
    if not row:
        raise _no_image("Parquet file", path)


def image_column(schema: Any, path: str) -> str:
    """Name of the column of images in a Parquet file: by its usual names, else the only one.

    One of structs with bytes takes precedence over columns of plain bytes, which may hold hashes.

    Raises:
        UserError: there is none; there are several, and none has a usual name.
    """
    from cnn2gnn_dist.data.packing.parquet_columns import IMAGE_COLUMNS, is_image

    # Bytes only: text would be taken for the path of a file.
    fitting = [field for field in schema if is_image(field.type)]
    names = [str(field.name) for field in fitting]
    if usual := [name for name in IMAGE_COLUMNS if names.count(name) == 1]:
        return usual[0]
    structs = [str(field.name) for field in fitting if field.type.num_fields]
    likely = structs or names
    if len(likely) == 1:
        return likely[0]
    if likely:
        raise UserError(
            f"{len(likely)} of these columns may hold the images: {', '.join(likely)}",
            where=printable(path),
            remedy=f"name the right one '{IMAGE_COLUMNS[0]}', and no other",
        )
    raise UserError(
        f"none of these columns holds images: {', '.join(schema.names)}",
        where=printable(path),
        remedy="a column of bytes, or of structs with a field `bytes` (as datasets writes them)",
    )
