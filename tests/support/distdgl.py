"""DistDGL's servers on this host: a graph version and the machines that serve it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.graph.distdgl.served import ServedGraph, Task
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.graph.version import GraphVersion, GraphWriter, open_version
from cnn2gnn_dist.runtime.supervisor import can_isolate
from tests.support.ports import free_port

N, D, DIM, M = 300, 6, 4, 8

needs_namespaces = pytest.mark.skipif(
    not can_isolate(),
    reason="two machines on one host need mount namespaces, which this kernel refuses this user",
)


def make_version(root: Path, parts: int) -> GraphVersion:
    """A graph with empty cells in its table, and partitions unrelated to the order of ids."""
    rng = np.random.default_rng(0)
    table = rng.permuted(np.tile(np.arange(N), (N, 1)), axis=1)[:, :M].astype(np.int32)
    table[rng.random((N, M)) < 0.1] = -1
    table[7] = -1
    made = {
        "x": rng.normal(size=(N, D)).astype(np.float16),
        "z": rng.normal(size=(N, DIM)).astype(np.float32),
        "labels": rng.integers(-1, 5, N).astype(np.int32),
        "candidates": table,
        "part": rng.permutation(np.arange(N) % parts).astype(np.int32),
    }
    writer = GraphWriter.create(root, 0, {n: (a.shape, a.dtype.type) for n, a in made.items()})
    for name, array in made.items():
        writer.rows(name, 0, array)
    for part in range(parts):
        partition.build_part(table, made["part"], part).save(writer.path / f"part-{part:02d}")
    return open_version(writer.finalise({}))


@contextmanager
def serving(
    version: GraphVersion, folder: Path, *, timeout_s: float = 60.0
) -> Iterator[list[ServedGraph]]:
    """One running machine per partition."""
    part_N = np.asarray(version.part)
    parts = int(part_N.max()) + 1
    addresses = [("127.0.0.1", free_port()) for _ in range(parts)]

    def start(part: int) -> ServedGraph:
        task = Task(str(version.path), part, str(folder / f"machine{part}"), addresses, 0)
        inner = np.flatnonzero(part_N == part)
        made = ServedGraph(task, inner, len(part_N), isolated=True, timeout_s=timeout_s)
        made.connect()
        return made

    with ThreadPoolExecutor(parts) as crew:
        machines = list(crew.map(start, range(parts)))
    try:
        yield machines
    finally:
        for machine in machines:
            machine.close()
