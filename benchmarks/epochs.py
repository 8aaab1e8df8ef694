"""What a resume costs, and what the decoded cache gives: python benchmarks/epochs.py MANIFEST [SIZE].

PYTHONPATH=. python benchmarks/epochs.py runs/cifar10/manifest/train.arrow

Time to the first batch at the first and at the last batch of an epoch, medians interleaved; images
a second of three epochs with the decoded cache, by the clock and by processor time. The cache file
is removed afterwards.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from cnn2gnn_dist.data import Stream, ViewSpec
from cnn2gnn_dist.data.decoded import cache_path

ROUNDS, EPOCHS = 61, 3


def first_batch(manifest: Path, views: ViewSpec, batch: int) -> float:
    """Seconds from nothing to a batch."""
    began = time.perf_counter()
    with Stream(manifest, global_batch=256, views=views, window=8, backend="local") as stream:
        stream.batch = batch
        next(iter(stream))
        return time.perf_counter() - began


def epochs(manifest: Path, views: ViewSpec, workers: int) -> list[str]:
    """Images a second, by the clock and by processor time, of each epoch."""
    how = {"global_batch": 512, "window": 8, "backend": "local", "decoded_bytes": 1 << 32}
    found = []
    with Stream(manifest, views=views, workers=workers, **how) as stream:
        file = cache_path(manifest, stream.manifest, views)
        try:
            for _ in range(EPOCHS):
                clock, processor = time.perf_counter(), time.process_time()
                count = sum(len(batch.ids) for batch in stream)
                clock, processor = time.perf_counter() - clock, time.process_time() - processor
                found.append(f"{count / clock:,.0f} ({count / processor:,.0f})")
        finally:
            file.unlink(missing_ok=True)
    return found


def main() -> None:
    manifest = Path(sys.argv[1])
    views = ViewSpec("crop_flip", int(sys.argv[2]) if len(sys.argv) > 2 else 32)
    torch.set_num_threads(1)
    with Stream(manifest, global_batch=256, views=views, window=8, backend="local") as stream:
        last = len(stream) - 1
    first_batch(manifest, views, 0)
    pairs = [[first_batch(manifest, views, b) for b in (0, last)] for _ in range(ROUNDS)]
    begin, end = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"first batch: {begin:.1f} ms at 0, {end:.1f} ms at {last}, ratio {end / begin:.2f}")
    for workers in (1, 2):
        line = ", ".join(epochs(manifest, views, workers))
        print(f"{workers} threads, decoded cache, images/s (per processor second): {line}")


if __name__ == "__main__":
    main()
