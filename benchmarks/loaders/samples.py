"""The encoded images of a job, in memory."""

from __future__ import annotations

from loaders.job import Job

from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.shard_files import ShardFiles


def members(job: Job) -> list[tuple[bytes, int]]:
    """(encoded image, label) of every sample, once each, in the order of the shards."""
    manifest = Manifest.load(job.manifest)
    files = ShardFiles(manifest)
    labels = manifest.label_N.tolist()
    found = [(files.read(sample), labels[sample]) for sample in range(len(manifest) // job.copies)]
    files.close()
    return found
