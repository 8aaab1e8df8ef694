"""Images without a label are in the partition of the labelled image nearest to them, where they search, or the next.

Most of them are like one of the kinds of labelled images, so that the partitions would be far from equal otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist import settings
from cnn2gnn_dist.data.index import manifest as manifests
from cnn2gnn_dist.graph.version import GraphVersion, open_version, version_path
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import graph
from cnn2gnn_dist.stages.neighbours.neighbourhood import Neighbourhood
from cnn2gnn_dist.stages.shared.context import Context, RunPaths, load_manifest
from tests.support import rank_group, runs
from tests.support.graph_builds import projection
from tests.support.shards import make_shards

N, KINDS, LABELLED, CORRUPT = 240, 4, 5, 31
"""Every fifth image has a label; one of those without can't be read."""
MOST = math.ceil(1.03 * N / 2)
"""Images of a partition, as METIS would balance them."""
PARTITIONERS = ("metis", "streaming", "ranges")


def images() -> np.ndarray:
    """uint8 [N, 16, 16, 3]: noisy copies of four patterns; three of four without a label are of the first."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (KINDS, 16, 16, 3))
    kinds = rng.permutation(np.arange(N) % KINDS)
    kinds[(np.arange(N) % LABELLED > 0) & (rng.random(N) < 0.7)] = 0
    return (patterns[kinds] + rng.integers(0, 56, (N, 16, 16, 3))).astype(np.uint8)


def write(root: Path) -> None:
    """Shards and manifest, without most of the labels."""
    paths = make_shards(root / "shards", images(), [0] * N, shard_size=60)
    found = manifests.index(paths, progress=False)
    label_N = np.where(np.arange(N) % LABELLED == 0, np.arange(N) % 3, -1).astype(np.int32)
    data = bytearray(Path(paths[0]).read_bytes())
    start = int(found.offset_N[CORRUPT])
    data[start : start + 8] = bytes(8)
    Path(paths[0]).write_bytes(data)
    dataclasses.replace(found, label_N=label_N).save(root / "manifest" / "train.arrow")


def context(root: Path, partitioner: str, ranks: Ranks) -> Context:
    micro = [o for o in runs.MICRO if not o.startswith(("data.", "graph.partition", "views."))]
    config = settings.load(
        "demo",
        [*micro, f"run.dir={root}", "views.kind=none", "views.size=16", "data.max_corrupt=0.5",
         "data.source=shards", "data.train=x.tar", "data.test=y.tar", "data.unlabelled=true",
         "evaluate.batch=16", f"graph.partition.partitioner={partitioner}"],
    )  # fmt: skip
    return Context(config, ranks, RunPaths(root), root / partitioner, "key", "cpu", False)


def builds(root: str) -> None:
    """A first graph and a refresh by each partitioner."""
    for name in PARTITIONERS:
        here = context(Path(root), name, Ranks.from_environment())
        embed = projection(here)
        first = graph.build(here, embed, here.folder, 1, None)
        graph.build(here, embed, here.folder, 2, first)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with graphs of two ranks."""
    folder = tmp_path_factory.mktemp("run")
    write(folder)
    rank_group.run(builds, 2, str(folder))
    return folder


def built(root: Path, name: str, number: int) -> GraphVersion:
    return open_version(version_path(root / name, number))


def projections(root: Path) -> np.ndarray:
    """z of all images, with or without a label."""
    embed = projection(context(root, "metis", Ranks()))
    return embed(torch.from_numpy(images()))[1].numpy()


def nearest_labelled(root: Path, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each image the nearest with a label among some (bool [N]), and the similarity, by brute force: [N] each."""
    z_Nd, labelled = projections(root), np.flatnonzero((np.arange(N) % LABELLED == 0) & among)
    near = z_Nd @ z_Nd[labelled].T
    return labelled[near.argmax(1)], near.max(1)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_features_of_an_unlabelled_image_choose_its_partition_while_there_is_room(
    root, name, number
):
    version = built(root, name, number)
    part_N = np.asarray(version.part)
    nearest, near = nearest_labelled(root, np.ones(N, bool))
    lone = np.setdiff1d(np.flatnonzero(np.arange(N) % LABELLED > 0), CORRUPT)
    moved = lone[part_N[nearest][lone] != part_N[lone]]
    stayed = np.setdiff1d(lone, moved)
    sizes = np.bincount(part_N, minlength=2)
    assert sizes.max() <= MOST
    for image in moved:
        wanted = part_N[nearest[image]]
        assert sizes[wanted] == MOST
        assert near[image] <= near[stayed[part_N[stayed] == wanted]].min() + 1e-6
    # What the partitioner divides evenly is the nodes that can be found.
    labelled = np.bincount(part_N[::LABELLED], minlength=2)
    assert labelled.min() >= 0.4 * labelled.sum()
    z_Nd = np.asarray(version.z)
    assert not z_Nd[np.asarray(version.labels) < 0].any()  # nobody's neighbors, as before


@pytest.mark.parametrize("name", PARTITIONERS)
def test_unlabelled_seeds_find_the_image_of_their_partition_or_its_halo_nearest_to_them(root, name):
    version, z_Nd = built(root, name, 1), projections(root)
    for part in range(2):
        there = np.asarray(version.part) == part
        halo = np.unique(np.asarray(version.candidates)[there])
        there[halo[halo >= 0]] = True
        nearest, _ = nearest_labelled(root, there)
        around = Neighbourhood(context(root, name, Ranks()), version, [part])
        seeds = np.flatnonzero(
            (np.asarray(version.part) == part) & (np.asarray(version.labels) < 0)
        )
        seeds = seeds[seeds != CORRUPT]
        query = around.around(seeds, 1, 0)
        query.block(torch.from_numpy(z_Nd[seeds]))
        np.testing.assert_array_equal(query.first_BF[:, 0], nearest[seeds])
        assert (query.first_BF >= 0).all()


@pytest.mark.parametrize("name", PARTITIONERS)
def test_all_images_are_seeds_and_ranks_get_equal_shares_of_them(root, name):
    version = built(root, name, 2)
    assert sum(version.meta["inner"]) == N
    manifest = load_manifest(root / "manifest" / "train.arrow")
    around = Neighbourhood(context(root, name, Ranks()), version, [0])
    order = around.order(manifest, seed=0, global_batch=64, window=4)
    shares = [len(order.rank_batch(0, 0, rank, 2)) for rank in range(2)]
    assert sum(shares) == 64
    assert max(shares) <= 1.03 * 32 + 1
    order.check_ranks(2, 30)  # a rank with fewer than 30 images could not divide them
