"""One measurement each, in a separate process: a folder of nodes in, a row of figures out."""

from __future__ import annotations

import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.graph import memory_model, quality
from cnn2gnn_dist.graph.partition import fennel
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.graph.sampler import TableSampler
from cnn2gnn_dist.graph.search.approximate import RecallGoal, TableResult, TableSearch
from cnn2gnn_dist.graph.search.work_units import RankGroup, WorkFolder

M, THREADS, RECALL = 16, 2, 0.95
DRIFTS = (0.02, 0.05, 0.08, 0.14)
"""How far rows move, as in the last epochs of a training up to as in its middle; see the stale recall."""
FANOUT, SEEDS = 10, 512


def nodes_of(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a folder, memory-mapped."""
    names = ("z", "labels", "candidates", "order")
    there = [name for name in names if (folder / f"{name}.npy").exists()]
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in there}


def search_of(folder: Path, name: str, z_Nd: np.ndarray) -> TableSearch:
    """A search without results of earlier ones."""
    shutil.rmtree(folder / name, ignore_errors=True)
    return TableSearch(WorkFolder(folder / name, RankGroup(threads=THREADS)), z_Nd, z_Nd, M)


def build(folder: Path) -> dict[str, Any]:
    """Build the table from scratch, and keep it for the other measurements."""
    z = nodes_of(folder)["z"]
    started = time.perf_counter()
    found = search_of(folder, "build", z).build(RecallGoal(RECALL))
    seconds = time.perf_counter() - started
    np.save(folder / "candidates.npy", found.table_NM)
    np.save(folder / "order.npy", found.order_N)
    labels = nodes_of(folder)["labels"]
    shutil.rmtree(folder / "build")
    degree = np.bincount(found.table_NM[found.table_NM >= 0], minlength=len(z))
    return {
        "seconds": seconds,
        "recall": found.history[-1],
        "peak_gib": peak_gib(),
        "homophily": quality.edge_homophily(found.table_NM, labels),
        "in_degree": {
            str(p): int(np.percentile(degree, p)) for p in (0, 10, 50, 90, 99, 99.9, 100)
        },
    }


def refresh(folder: Path) -> dict[str, Any]:
    """Refresh from the previous table, compared with a full rebuild, after moves of several sizes."""
    given = nodes_of(folder)
    rows = []
    for amount in DRIFTS:
        z = moved(given["z"], amount)
        search = search_of(folder, "refresh", z)
        stale = search.recall(given["candidates"])  # finds the sample's truth, timed below
        started = time.perf_counter()
        warm = search._improve(
            TableResult(given["candidates"], np.asarray(given["order"]), rebuilt=False),
            RecallGoal(RECALL),
            "r",
        )
        warm_s = time.perf_counter() - started
        changed = quality.changed_edges(given["candidates"], warm.table_NM)
        started = time.perf_counter()
        truth = search_of(folder, "truth", z)
        truth.recall(given["candidates"])
        truth_s = time.perf_counter() - started
        started = time.perf_counter()
        anew = search_of(folder, "anew", z).build(RecallGoal(RECALL))
        anew_s = time.perf_counter() - started
        rows.append(
            {
                "amount": amount,
                "stale_recall": stale,
                "recall": warm.history,
                "changed_edges": changed,
                "seconds": warm_s + truth_s,
                "rebuild_seconds": anew_s,
                "rebuild_recall": anew.history[-1],
                "ratio": (warm_s + truth_s) / anew_s,
            }
        )
        for name in ("refresh", "truth", "anew"):
            shutil.rmtree(folder / name)
    return {"drifts": rows, "peak_gib": peak_gib()}


def parts(folder: Path, how: str, count: int) -> dict[str, Any]:
    """One partitioner: its edge cut and halos, and the cost of rebuilding and writing them."""
    given = nodes_of(folder)
    table, order = np.asarray(given["candidates"]), np.asarray(given["order"])
    before = children_gib()
    started = time.perf_counter()
    part = _assign(how, table, order, count)
    assigned = time.perf_counter() - started
    assign_gib = max(peak_gib() if how != "metis" else 0.0, children_gib() - before)
    np.save(folder / f"part-{how}-{count}.npy", part)
    started = time.perf_counter()
    made = [partition.build_part(table, part, number) for number in range(count)]
    rebuilt = time.perf_counter() - started
    out = folder / "parts"
    started = time.perf_counter()
    for number, one in enumerate(made):
        one.save(out / f"part-{number:02d}")
    written = time.perf_counter() - started
    size = sum(path.stat().st_size for path in out.rglob("*.npy"))
    shutil.rmtree(out)
    noted = partition.summary(table, part, [one.size for one in made])
    inner = sum(noted["inner"])
    return {
        "seconds": assigned,
        "assign_gib": assign_gib,
        "cut": noted["cut"],
        "balance": max(noted["inner"]) * count / inner,
        "halo1": sum(noted["halo1"]) / inner,
        "halo2": sum(noted["halo2"]) / inner,
        "halos_seconds": rebuilt,
        "write_seconds": written,
        "write_gib": size / 2**30,
        "peak_gib": peak_gib(),
        "predicted_metis_gib": _predicted("METIS", len(table), count) if how == "metis" else None,
    }


def keep(folder: Path, count: int = 8) -> dict[str, Any]:
    """After a refresh: the partition map kept, improved by moves that pay off, and recomputed."""
    given = nodes_of(folder)
    old = np.load(folder / f"part-metis-{count}.npy")
    z = moved(given["z"], DRIFTS[-1])
    table = search_of(folder, "keep", z).build(RecallGoal(RECALL)).table_NM
    rows: dict[str, Any] = {"kept": {"cut": partition.edge_cut(table, old), "moved": 0.0}}
    for gain in (1, 4, 8):
        started = time.perf_counter()
        new = fennel.refine_partition(table, old, count, gain)
        rows[f"gain {gain}"] = {
            "cut": partition.edge_cut(table, new),
            "moved": float((new != old).mean()),
            "seconds": time.perf_counter() - started,
        }
    anew = partition.assign(table, count)
    rows["anew"] = {"cut": partition.edge_cut(table, anew), "moved": float((anew != old).mean())}
    shutil.rmtree(folder / "keep")
    return rows


def sample(folder: Path, how: str, count: int) -> dict[str, Any]:
    """Two hops of 10 around seed nodes of one partition by the table sampler, in seeds per second."""
    from cnn2gnn_dist.graph.block import block_ids, sampled_first_hop

    table, part = (np.load(folder / name) for name in ("candidates.npy", f"part-{how}-{count}.npy"))
    graph = partition.build_part(table, part, 0)
    sampler = TableSampler(graph.table_KM, 0, graph.nodes_L)
    rng, done, touched, remote = np.random.default_rng(0), 0, 0, 0
    started = time.perf_counter()
    while time.perf_counter() - started < 10:
        seeds = rng.choice(graph.num_inner, SEEDS, replace=False)
        key = {"epoch": 0, "step": done, "rank": 0}
        first = sampled_first_hop(sampler, seeds, FANOUT, **key)
        block = block_ids(sampler, first, seeds, FANOUT, **key)
        done += SEEDS
        touched += len(block.nodes_V)
        remote += int((block.nodes_V >= graph.num_inner).sum())
    seconds = time.perf_counter() - started
    return {
        "seeds_per_s": done / seconds,
        "nodes_per_seed": touched / done,
        "remote_share": remote / touched,
    }


def moved(z_Nd: np.ndarray, amount: float, seed: int = 1) -> np.ndarray:
    """Rows after some training: a smooth shared drift, and a little individual movement."""
    rng = np.random.default_rng(seed)
    dim = z_Nd.shape[1]
    first, second = (rng.standard_normal((dim, dim)) / dim**0.5 for _ in range(2))
    out = np.empty_like(z_Nd)
    for start in range(0, len(z_Nd), 65_536):
        rows = np.asarray(z_Nd[start : start + 65_536])
        shared = np.tanh(3 * rows @ first) @ second
        own = rng.standard_normal(rows.shape) / dim**0.5
        new = rows + amount * (2 * shared + 2 * own)
        out[start : start + 65_536] = new / np.linalg.norm(new, axis=1, keepdims=True)
    return out


def peak_gib() -> float:
    """Peak resident memory of this process, including mapped files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def children_gib() -> float:
    """The same for the largest child that has exited."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def _assign(how: str, table: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    ways: dict[str, Callable[[], np.ndarray]] = {
        "metis": lambda: partition.assign(table, count),
        "streaming": lambda: fennel.assign_streaming(table, order, count),
        "contiguous": lambda: partition.assign_ranges(table, count),
        "random": lambda: np.random.default_rng(0).integers(0, count, len(table)).astype(np.int32),
        "pymetis": lambda: _pymetis(table, count),
    }
    return ways[how]()


def _pymetis(table: np.ndarray, count: int) -> np.ndarray:
    import pymetis  # type: ignore[import-not-found]
    from scipy import sparse  # type: ignore[import-untyped]

    nodes, width = table.shape
    ends = (np.repeat(np.arange(nodes), width), np.maximum(table, 0).ravel())
    one = sparse.csr_matrix((np.ones(table.size, np.int8), ends), shape=(nodes, nodes))
    both = (one + one.T).tocsr()
    options = pymetis.Options()
    _, part = pymetis.part_graph(
        count, xadj=both.indptr, adjncy=both.indices, recursive=False, options=options
    )
    return np.asarray(part, np.int32)


def _predicted(name: str, images: int, count: int) -> float:
    found = memory_model.structures(
        memory_model.Sizes(images, candidates=M, parts=count, ranks=count)
    )
    return next(one.bytes for one in found if one.name.startswith(name)) / 2**30
