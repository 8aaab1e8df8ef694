"""Data for several test files: the location of real data, and small generated shards."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support import REPOSITORY


def data_dir(name: str) -> Path:
    """Folder of a real data set ('cifar10', 'mini-imagenet', 'imagenet-sample'); skips the test without it.

    It is looked for in $CNN2GNN_DATA, or else in ../shared/data next to the repository.
    """
    beside = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("CNN2GNN_DATA") or beside) / name
    if not folder.is_dir():
        pytest.skip(f"real data '{name}' is not at {folder} (set CNN2GNN_DATA)")
    return folder


def random_images(count: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth random RGB images, uint8 [N, H, W, 3]: upsampled noise, which JPEG preserves well."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    size = (width, height)
    return np.stack(
        [np.asarray(Image.fromarray(s).resize(size, Image.Resampling.BICUBIC)) for s in small]
    )


def encode_image(image: np.ndarray, suffix: str = "png", **options: object) -> bytes:
    """Encode a uint8 image as 'png' (lossless) or 'jpg' (quality 90 by default)."""
    file = io.BytesIO()
    if suffix in ("jpg", "jpeg"):
        Image.fromarray(image).save(file, "JPEG", **{"quality": 90, **options})
    else:
        Image.fromarray(image).save(file, suffix.upper(), **options)
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write a tar of (name, payload) pairs as given, even invalid ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def make_shards(
    folder: Path,
    images: np.ndarray | Sequence[np.ndarray],
    labels: Sequence[int] | np.ndarray | None,
    *,
    shard_size: int = 8,
    suffix: str = "png",
    prefix: str = "shard",
    keys: Sequence[str] | None = None,
) -> list[Path]:
    """Write images [H, W, 3] (any sizes) and labels (None: no .cls) as shards of ``shard_size``."""
    names = keys or [f"{prefix}-{i:05d}" for i in range(len(images))]
    paths = []
    for number, first in enumerate(range(0, len(images), shard_size)):
        members: list[tuple[str, bytes]] = []
        for i in range(first, min(first + shard_size, len(images))):
            if labels is not None:
                members.append((f"{names[i]}.cls", str(int(labels[i])).encode()))
            members.append((f"{names[i]}.{suffix}", encode_image(images[i], suffix)))
        paths.append(write_tar(folder / f"{prefix}-{number:06d}.tar", members))
    return paths


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep this user's cache in the test's own folder: ``pytest.mark.usefixtures("own_cache")``."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def shard_pattern(folder: Path, images: Any, labels: Any) -> str:
    """Write shards of nine samples each; return the pattern that names them."""
    make_shards(folder, images, labels, shard_size=9)
    return str(folder / "shard-*.tar")
