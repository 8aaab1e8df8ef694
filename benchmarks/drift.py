r"""Refreshes under the drift of a real training: every pair of consecutive graph versions of a run.

    cnn2gnn run --config cifar10 run.dir=RUN run.ranks=1 teacher.epochs=3 student.epochs=12 \
        graph.start_epoch=2 graph.refresh_epochs=1 graph.keep_versions=20 graph.partition.parts=1 student.control=false
    python benchmarks/drift.py RUN

For each pair: how far rows moved, the stale recall of the previous table, and the time of joins from that table
relative to a build from scratch, both including the sample's exact search. Then figures by which to compare the
real graph with those of ``embeddings.py``: homophily, in-degrees, METIS's cut and halos at 2, 4, 8 parts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np

from cnn2gnn_dist.graph import quality
from cnn2gnn_dist.graph.partition import parts
from cnn2gnn_dist.graph.search.approximate import RecallGoal, TableResult, TableSearch
from cnn2gnn_dist.graph.search.work_units import RankGroup, WorkFolder
from cnn2gnn_dist.graph.version import GraphVersion, open_version

M, GOAL = 16, RecallGoal(0.95)


def search(z: np.ndarray, folder: str) -> TableSearch:
    """A search in a separate folder."""
    return TableSearch(WorkFolder(Path(tempfile.mkdtemp(dir=folder)), RankGroup()), z, z, M)


def refreshes(versions: list[GraphVersion], folder: str) -> None:
    """Print a line for each pair."""
    print(
        "| version | median cosine moved | stale recall | joins, recall | changed | joins / build | build, recall |"
    )
    print("|---|---|---|---|---|---|---|")
    for before, after in pairwise(versions):
        z = np.ascontiguousarray(after.z)
        table = np.ascontiguousarray(before.candidates[:, :M])
        order = np.arange(len(z), dtype=np.int32)
        started = time.process_time()
        warm = search(z, folder)._improve(TableResult(table, order, rebuilt=False), GOAL, "joins")
        joined = time.process_time() - started
        started = time.process_time()
        built = search(z, folder).build(GOAL)
        anew = time.process_time() - started
        cosine = np.median(np.einsum("nd,nd->n", before.z, z))
        recalls = " > ".join(f"{r:.3f}" for r in warm.history)
        changed = quality.changed_edges(table, warm.table_NM)
        print(f"| {after.path.name} | {cosine:.3f} | {warm.history[0]:.3f} | {recalls} | {changed:.1%} "
              f"| {joined / anew:.2f} | {built.history[-1]:.3f} |")  # fmt: skip


def shape(version: GraphVersion) -> None:
    """Print statistics of the last graph."""
    table = np.ascontiguousarray(version.candidates[:, :M])
    degree = np.bincount(table.ravel(), minlength=len(table))
    percentiles = "/".join(
        str(int(np.percentile(degree, p))) for p in (0, 10, 50, 90, 99, 99.9, 100)
    )
    print(f"\n{version.path.name}: {len(table):,} nodes, homophily "
          f"{quality.edge_homophily(table, np.asarray(version.labels)):.3f}, in-degree {percentiles}")  # fmt: skip
    for count in (2, 4, 8):
        part = parts.assign(table, count)
        made = [parts.build_part(table, part, number) for number in range(count)]
        noted = parts.summary(table, part, [one.size for one in made])
        print(f"{count} parts: cut {noted['cut']:.3f}, halos {sum(noted['halo1']) / len(table):.2f} and "
              f"{sum(noted['halo2']) / len(table):.2f} per inner node")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    given = parser.parse_args()
    versions = [
        open_version(path) for path in sorted((given.run / "student" / "graph").glob("v????"))
    ]
    with tempfile.TemporaryDirectory() as folder:
        refreshes(versions, folder)
    shape(versions[-1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
