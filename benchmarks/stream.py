"""Images a second of the stream, side by side in one run: threads, Ray actors, webdataset + DataLoader.

PYTHONPATH=. python benchmarks/stream.py runs/demo    # not run to its end yet; any run that has been packed and indexed

Ratios matter, not absolute figures: cores are shared. Each way reads the same shards, decodes,
augments, and hands over uint8 batches of 64; the best of three rounds counts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cnn2gnn_dist import settings
from cnn2gnn_dist.compat import import_torchvision
from cnn2gnn_dist.data.manifest import Manifest
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.pool import ReaderPool
from cnn2gnn_dist.data.reader import ReaderSpec, Request
from cnn2gnn_dist.data.views import ViewSpec

BATCH, ROUNDS = 64, 3


def ours(backend: str, manifest: Path, views: ViewSpec) -> int:
    """One epoch through the stream; returns the number of images."""
    loaded = Manifest.load(manifest)
    order = Order(loaded.shard_sizes, seed=0, global_batch=BATCH, window=8)
    with ReaderPool(
        ReaderSpec(str(manifest), views), backend=backend, workers=1, prefetch=4
    ) as stream:
        requests = (Request(order.batch(0, index), 0) for index in range(order.batches_per_epoch))
        return sum(len(batch.images) for batch in stream.batches(requests))


def theirs(manifest: Path, views: ViewSpec) -> int:
    """The same through webdataset, torchvision's transforms and a DataLoader with one worker."""
    import webdataset

    import_torchvision()
    from torchvision.transforms import v2 as transforms

    shards = [shard.path for shard in Manifest.load(manifest).shards]
    augment = transforms.Compose(
        [
            transforms.PILToTensor(),
            transforms.Resize(views.size),
            transforms.RandomCrop(views.size, padding=views.pad),
        ]
    )
    data = webdataset.WebDataset(shards, shardshuffle=False).shuffle(1000).decode("pil")
    data = data.to_tuple("jpg;png;jpeg", "cls").map_tuple(augment, lambda label: label)
    loader = webdataset.WebLoader(data.batched(BATCH), batch_size=None, num_workers=1)
    return sum(len(images) for images, _ in loader)


def best(read: Callable[[], int]) -> float:
    """Images a second, the best of some rounds."""
    found = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        count = read()
        found.append(count / (time.perf_counter() - began))
    return float(np.max(found))


def main(run: Path) -> None:
    """Print the three figures and their ratios."""
    from cnn2gnn_dist.runtime import group

    config = settings.load(str(run / "config.yaml"))
    v = config.views
    views = ViewSpec(kind=v.kind, size=v.size, seed=0, pad=v.pad, flip=v.kind != "shift")
    manifest = run / "manifest" / "train.arrow"
    group.start(None, cpus=2)
    figures = {
        "webdataset + DataLoader": best(lambda: theirs(manifest, views)),
        "stream, a thread": best(lambda: ours("local", manifest, views)),
        "stream, a Ray actor": best(lambda: ours("ray", manifest, views)),
    }
    base = figures["webdataset + DataLoader"]
    for name, value in figures.items():
        print(f"{name:26}{value:10.0f} images/s{value / base:8.2f} x")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
