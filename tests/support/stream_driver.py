"""A small driver of a stream, for tests of how it ends: python stream_driver.py MANIFEST BACKEND END."""

from __future__ import annotations

import itertools
import signal
import sys

import numpy as np

from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import ReaderSpec, Request

ENOUGH = 6


def main() -> None:
    """Read forever, or until the requested end."""
    manifest, backend, end = sys.argv[1:]
    # A shell that starts the tests in the background ignores SIGINT, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if backend == "ray":
        from cnn2gnn_dist.runtime.ray import cluster as ray_cluster

        ray_cluster.start(None, cpus=2)
    samples = len(Manifest.load(manifest))
    requests = (Request(np.arange(n, n + 8) % samples, n) for n in itertools.count())
    spec = ReaderSpec(manifest, ViewSpec("crop_flip", 32))
    with ReaderPool(spec, backend=backend, workers=2, prefetch=4) as stream:
        for number, _ in enumerate(stream.batches(requests)):
            if number == ENOUGH:
                print("streaming", flush=True)
                if end != "stop":
                    sys.stdin.read()  # until the test has listed this driver's processes
                if end == "raise":
                    raise RuntimeError("the trainer is broken")
                if end == "return":
                    break
    if backend == "ray" and end == "stop":
        ray_cluster.stop()


if __name__ == "__main__":
    main()
