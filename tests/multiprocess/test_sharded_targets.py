"""Targets of a teacher that two ranks have trained: the same under ZeRO-3, which shards it, as without."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cnn2gnn_dist import ledger
from cnn2gnn_dist.data.index import manifest as manifests
from cnn2gnn_dist.data.soft_targets import Targets
from cnn2gnn_dist.ledger import Entry
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages import targets
from cnn2gnn_dist.stages.shared.context import Context
from cnn2gnn_dist.stages.shared.networks import Teacher
from cnn2gnn_dist.training import ds_config
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from cnn2gnn_dist.training.engine import Engine
from tests.multiprocess.test_evaluate import C, context
from tests.support import rank_group
from tests.support.shards import encode_image, random_images, write_tar

PER_SHARD = 6
FILE = ds_config.PACKAGE.parent / "ds_config.json"


def shards(root: Path) -> None:
    """Two shards, one for each rank, and their manifest."""
    tars = []
    for part in range(2):
        members = []
        for i, image in enumerate(random_images(PER_SHARD, 16, 16, seed=part)):
            members += [
                (f"{part}{i}.cls", str(i % C).encode()),
                (f"{part}{i}.png", encode_image(image)),
            ]
        tars.append(write_tar(root / f"train-{part:06d}.tar", members))
    path = root / "manifest" / "train.arrow"
    path.parent.mkdir()
    manifests.index(tars, progress=False).save(path)


def with_file(here: Context, **fields: Any) -> Context:
    """The context with changes to the packaged DeepSpeed config."""
    return dataclasses.replace(here, deepspeed={"teacher": ds_config.load(FILE) | fields})


def train(here: Context) -> None:
    """A few steps under ZeRO-3, on images of which those of rank 1 are much darker, and their checkpoint."""
    torch.manual_seed(0)
    resolved = ds_config.resolve_for(
        ds_config.load(FILE), here.config.teacher, 2, 1, "cpu", precision="float32"
    )
    engine = Engine(Teacher(here.config, C), resolved, device="cpu")
    engine.train()
    images = torch.from_numpy(random_images(16, 16, 16, seed=9)) // (1 + 15 * collectives.rank())
    for _ in range(3):
        engine.backward(F.cross_entropy(engine(images), torch.arange(16) % C))
        engine.step(0.01)
    folder = here.paths.root / "teacher"
    saved = Checkpoints(folder / "checkpoints", "teacher")
    saved.save(3, engine, {})
    files = [path for path in saved.finish().iterdir() if path.is_file()]
    if here.ranks.is_first:
        ledger.finish(folder, Entry("teacher", {}, "teacher", ledger.outputs(folder, files)))
    collectives.barrier()


def of_both_stages(root: str) -> dict[int, list[str]]:
    """Train, then write targets under ZeRO-3 and without sharding; the files of each."""
    found = {}
    sharded = context(Path(root), "sharded", "teacher.zero_stage=3")
    train(sharded)
    fixed = {"train_batch_size": 32, "gradient_accumulation_steps": 1}
    for stage, here in (
        (3, with_file(sharded, **fixed)),
        (0, with_file(context(Path(root), "whole", "teacher.zero_stage=0"), **fixed)),
    ):
        found[stage] = [str(path) for path in targets.run(here, "teacher")]
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    shards(root)
    rank_group.run(of_both_stages, 2, str(root))
    return root


def looked_up(folder: Path) -> np.ndarray:
    found = Targets.load(folder, 2 * PER_SHARD, C)
    return np.exp(found.lookup(np.arange(2 * PER_SHARD), 0))


def test_every_rank_answers_with_the_mean_of_the_ranks_statistics(made: Path) -> None:
    """Rank 1 wrote the second shard: with its own statistics, those of dark images, it would say something else."""
    np.testing.assert_allclose(looked_up(made / "sharded"), looked_up(made / "whole"), atol=2e-3)


def test_the_statistics_of_the_ranks_differ(made: Path) -> None:
    """Otherwise the test above would show nothing."""
    from safetensors.torch import load_file

    [folder] = (made / "teacher" / "checkpoints").glob("step-*")
    assert json.loads((folder / "state.json").read_text())["zero_stage"] == 3
    own = {}
    for path in folder.glob("*.safetensors"):
        own |= {n: t for n, t in load_file(path).items() if n.endswith("bn1.running_mean")}
    first, second = (own[f"own-{rank}/cnn.bn1.running_mean"] for rank in (0, 1))
    assert (first - second).abs().max() > 0.1 * first.abs().max()
