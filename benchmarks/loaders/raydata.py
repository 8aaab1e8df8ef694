"""Ray Data: read_webdataset, map_batches, iter_torch_batches.

The images stay encoded until map_batches, in favor of Ray Data: by default, decoded images of many sizes would
pass through the object store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from loaders.job import WORKERS, Job
from loaders.users import one_thread, opened, transform


def batches(job: Job) -> Iterator[Any]:
    import ray.data

    from cnn2gnn_dist.runtime.ray import cluster as ray_cluster

    ray_cluster.start(None, cpus=WORKERS)
    data = ray.data.read_webdataset(job.shards * job.passes, decoder=None)
    # Tasks rather than an actor pool: they are fused with reading, while two actors on two cores
    # would leave no core for reading and wait forever.
    data = data.map_batches(views, batch_size=job.batch, fn_kwargs={"job": job})
    for batch in data.iter_torch_batches(batch_size=job.batch, prefetch_batches=2):
        yield batch["image"]


def views(batch: dict[str, Any], job: Job) -> dict[str, Any]:
    """Convert a batch of undecoded samples to uint8 [n, 3, size, size]."""
    one_thread()
    augment = transform(job)
    images = [augment(opened(data)).numpy() for data in batch["jpg"]]
    return {"image": np.stack(images), "label": np.array([int(c) for c in batch["cls"]])}
