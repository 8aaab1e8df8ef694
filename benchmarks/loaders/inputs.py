"""The input data: full-size photographs and CIFAR-10, as WebDataset shards with a manifest."""

from __future__ import annotations

import os
from pathlib import Path

from loaders.job import Job, warm

from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.packing.packers import pack_parquet

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def data_folder(given: str | None) -> Path:
    """The folder of public data sets: --data, $CNN2GNN_DATA, or ../shared/data."""
    return Path(given or os.environ.get("CNN2GNN_DATA") or DATA)


def photos(data: Path, work: Path, copies: int) -> Job:
    """Full-size JPEGs, random resized crops to 224, batches of 64; each shard occurs under several names."""
    found = sorted((data / "imagenet-sample").glob("*.tar"))
    if not found:
        raise SystemExit(f"no photographs: {data}/imagenet-sample/*.tar (see --data)")
    (work / "photos").mkdir()
    links = [
        work / "photos" / f"{copy:04d}-{path.name}" for copy in range(copies) for path in found
    ]
    for number, link in enumerate(links):
        link.symlink_to(found[number % len(found)])
    return _job("photos", links, work / "photos", copies, batch=64, size=224)


def small(data: Path, work: Path, limit: int | None) -> Job:
    """CIFAR-10, padded by 4, cropped and flipped, batches of 256."""
    found = sorted((data / "cifar10").glob("train*.parquet"))
    if not found:
        raise SystemExit(f"no CIFAR-10: {data}/cifar10/train*.parquet (see --data)")
    shards = pack_parquet(
        found, work / "small" / "shards", shard_size=2000, limit=limit, progress=False
    )
    return _job("small", shards, work / "small", 1, batch=256, size=32)


def _job(kind: str, found: list[Path], folder: Path, copies: int, *, batch: int, size: int) -> Job:
    shards = [str(path) for path in found]
    manifest = index(shards, progress=False, allow_empty_classes=True)
    manifest.save(folder / "manifest.arrow")
    warm(shards)
    return Job(
        module="",
        kind=kind,
        folder=str(folder),
        shards=shards,
        manifest=str(folder / "manifest.arrow"),
        images=len(manifest),
        copies=copies,
        batch=batch,
        size=size,
        passes=1,
        seconds=1.0,
    )


def describe(job: Job) -> str:
    """The line above a table."""
    size = sum(os.path.getsize(path) for path in job.shards)
    each = f", each image {job.copies} times" if job.copies > 1 else ""
    return (
        f"{job.images:,} images in {len(job.shards)} shards ({size / 1e6:.1f} MB{each}), "
        f"views of {job.size} x {job.size}, batches of {job.batch}"
    )
