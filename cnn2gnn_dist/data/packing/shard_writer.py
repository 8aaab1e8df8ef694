"""Atomic and deterministic writing of WebDataset shards."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import durable, log
from cnn2gnn_dist.data.images.formats import image_suffix
from cnn2gnn_dist.data.index.class_names import refuse_blank
from cnn2gnn_dist.errors import UserError

__all__ = ["NewSample", "encode_png", "image_suffix", "write_shards"]


@dataclass(frozen=True)
class NewSample:
    """One image to write into a shard; ``label`` -1: none; ``about`` goes into its ``.json``."""

    key: str
    image: bytes
    suffix: str
    label: int
    about: dict[str, Any] = field(default_factory=dict)


def write_shards(
    sources: Iterable[NewSample],
    count: int,
    out: str | os.PathLike[str],
    *,
    prefix: str,
    shard_size: int,
    classes: Sequence[str | None],
    progress: bool,
) -> list[Path]:
    """Write ``count`` samples as ``out/PREFIX-000000.tar``…, and their ``PREFIX-classes.json``.

    Each sample is KEY.cls (the label in ASCII), KEY.<suffix> (the image as given) and KEY.json
    (label, class_name, which is null if the class has only a number, and ``about``). A shard is
    renamed when complete, so an interrupted run leaves no partial shards; a second run replaces
    those of the first.

    Raises:
        UserError: an invalid prefix or shard size; shards of an earlier, larger run would remain
            next to the new ones; a class has an empty name.
    """
    refuse_blank(classes, f"the classes of {prefix}")
    folder = _prepare(Path(out), prefix, shard_size, count)
    bar = log.progress(total=count, desc=f"pack {prefix}", unit="img", disable=not progress)
    stream = iter(sources)
    paths = []
    for first in range(0, count, shard_size):
        path = folder / f"{prefix}-{first // shard_size:06d}.tar"
        with (
            durable.replacing(path, shared=True) as temporary,
            tarfile.open(temporary, mode="w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for _ in range(min(shard_size, count - first)):
                _add_sample(tar, next(stream), classes)
                bar.update()
        paths.append(path)
    bar.close()
    names = folder / f"{prefix}-classes.json"
    text = json.dumps(list(classes), ensure_ascii=False, indent=0) + "\n"
    durable.write_text(names, text, shared=True)
    return paths


def _prepare(folder: Path, prefix: str, shard_size: int, count: int) -> Path:
    if not re.fullmatch(r"[A-Za-z0-9_-]+", prefix):
        raise UserError(
            f"the prefix '{prefix}' is not valid in names of shards and samples",
            remedy="use letters, digits, '-' and '_'",
        )
    if shard_size < 1:
        raise UserError(
            f"the shard size is {shard_size}",
            remedy="set the number of images per shard to at least 1",
        )
    if count < 1:
        raise UserError("there are no images to pack", where=prefix, remedy="check the source")
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-count // shard_size)
    name = re.compile(re.escape(prefix) + r"-(\d{6,})\.tar")
    matches = {path: name.fullmatch(path.name) for path in folder.iterdir()}
    stale = sorted(path for path, m in matches.items() if m and int(m.group(1)) >= shards)
    if stale:
        raise UserError(
            f"the folder contains {len(stale)} shards of an earlier, larger run, "
            f"which would mix with the {shards} new ones",
            where=str(stale[0]),
            remedy="delete them, or choose another folder or prefix",
        )
    return folder


def _add_sample(tar: tarfile.TarFile, source: NewSample, classes: Sequence[str | None]) -> None:
    known = source.label >= 0
    label = {"label": source.label, "class_name": classes[source.label]} if known else {}
    about = {**source.about, **label}
    members = {
        **({"cls": str(source.label).encode("ascii")} if known else {}),
        source.suffix: source.image,
        "json": json.dumps(about, sort_keys=True, ensure_ascii=False).encode(),
    }
    for suffix, data in sorted(members.items()):
        info = tarfile.TarInfo(f"{source.key}.{suffix}")  # mtime and owner are 0
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def encode_png(image: np.ndarray) -> bytes:
    """Encode a uint8 image [H, W, 3] as PNG, losslessly."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=6)
    return file.getvalue()
