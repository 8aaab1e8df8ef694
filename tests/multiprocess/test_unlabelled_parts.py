"""Images without a label are in the partition of the labelled image nearest to them: only there do they search."""

from __future__ import annotations

import dataclasses
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
PARTITIONERS = ("metis", "streaming", "ranges")


def images() -> np.ndarray:
    """uint8 [N, 16, 16, 3]: noisy copies of four patterns."""
    rng = np.random.default_rng(0)
    patterns = rng.integers(0, 200, (KINDS, 16, 16, 3))
    kinds = rng.permutation(np.arange(N) % KINDS)
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


def nearest_labelled(root: Path) -> np.ndarray:
    """[N] by brute force; a labelled image's is itself."""
    z_Nd, labelled = projections(root), np.flatnonzero(np.arange(N) % LABELLED == 0)
    return labelled[(z_Nd @ z_Nd[labelled].T).argmax(1)]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", PARTITIONERS)
def test_the_features_of_an_unlabelled_image_choose_its_partition(root, name, number):
    version = built(root, name, number)
    part_N, whole = np.asarray(version.part), np.delete(np.arange(N), CORRUPT)
    np.testing.assert_array_equal(part_N[whole], part_N[nearest_labelled(root)][whole])
    # What is divided evenly is the nodes that can be found.
    labelled = np.bincount(part_N[::LABELLED], minlength=2)
    assert labelled.min() >= 0.4 * labelled.sum()
    z_Nd = np.asarray(version.z)
    assert not z_Nd[np.asarray(version.labels) < 0].any()  # nobody's neighbors, as before


@pytest.mark.parametrize("name", PARTITIONERS)
def test_unlabelled_seeds_find_the_image_nearest_to_them(root, name):
    version, z_Nd, nearest = built(root, name, 1), projections(root), nearest_labelled(root)
    for part in range(2):
        around = Neighbourhood(context(root, name, Ranks()), version, [part])
        seeds = np.flatnonzero(
            (np.asarray(version.part) == part) & (np.asarray(version.labels) < 0)
        )
        seeds = seeds[seeds != CORRUPT]
        query = around.around(seeds, 1, 0)
        query.block(torch.from_numpy(z_Nd[seeds]))
        np.testing.assert_array_equal(query.first_BF[:, 0], nearest[seeds])
        assert (query.first_BF >= 0).all()


def test_all_images_are_seeds_of_one_partition(root):
    version = built(root, "metis", 2)
    assert sum(version.meta["inner"]) == N
    manifest = load_manifest(root / "manifest" / "train.arrow")
    around = Neighbourhood(context(root, "metis", Ranks()), version, [0])
    order = around.order(manifest, seed=0, global_batch=16, window=4)
    assert order.batches_per_epoch > 0
