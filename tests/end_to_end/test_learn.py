"""Inputs of a training step: the loss of a global batch, its images, its soft targets.

The references are plain torch on the complete batch, a reader that is asked for the order's ids, and
soft targets that the test wrote itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.data.soft_targets import write_shard
from cnn2gnn_dist.durable import read_lines
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.pipeline import runner
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import student
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.stages.shared.training_loop import Training
from cnn2gnn_dist.training.checkpoint import folder as disk
from tests.support import rank_group

G, WIDTH, CLASSES, VIEWS = 8, 6, 4, 3


def context_of(config: Config, folder: Path) -> Context:
    """A stage's view of a run, for the ranks of this process's group."""
    ranks = Ranks(collectives.rank(), collectives.rank(), collectives.world_size())
    root = Path(str(config.run.dir))
    return Context(config, ranks, RunPaths(root), folder, "key", "cpu", False)


def whole_batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features [G, WIDTH], labels [G] and which of them are valid [G]."""
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(G, WIDTH, generator=generator)
    labels = torch.randint(0, CLASSES, (G,), generator=generator)
    valid = torch.ones(G)
    valid[[1, 6]] = 0.0
    return features, labels, valid


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, CLASSES)


def learn_case(folder: str, shares: list[list[list[int]]]) -> dict[str, Any]:
    """Gradient and counts after one step; ``shares[rank][micro-batch]`` has rows of the batch."""
    rank, accumulation = collectives.rank(), len(shares[0])
    overrides = [
        f"run.dir={folder}",
        f"teacher.global_batch={G}",
        f"teacher.max_micro_batch={G // len(shares) // accumulation}",
        "teacher.zero_stage=0",
        "teacher.clip=0",
    ]
    config = settings.load("demo", overrides)
    context = context_of(config, Path(folder) / "teacher")
    training = Training(context, "teacher", net(), config.teacher, G)
    assert training.accumulation == accumulation
    training.engine.train()
    features, labels, valid = whole_batch()
    for rows in shares[rank]:
        logits = training.engine(features[rows])
        loss_B = F.cross_entropy(logits, labels[rows], reduction="none")
        training.learn(loss_B, valid[rows], logits, labels[rows])
    found = {
        "gradients": {n: p.grad.clone() for n, p in training.engine.module.named_parameters()},
        **dict(zip(("loss", "right", "samples"), training.tally.sums.tolist(), strict=True)),
    }
    training.step(batches_per_epoch=10)
    training.checkpoints.settle()
    return found


def best_case(folder: str) -> list[tuple[float | None, str | None]]:
    """The best accuracy, and which checkpoint has it, after each of three evaluations."""
    overrides = [f"teacher.global_batch={G}", "teacher.eval_epochs=1", "teacher.zero_stage=0"]
    config = settings.load("demo", [f"run.dir={folder}", *overrides])
    context = context_of(config, Path(folder) / "teacher")
    training = Training(context, "teacher", net(), config.teacher, G)
    root = disk.root_of(context.folder)

    def evaluated(accuracy: float) -> tuple[float | None, str | None]:
        training.cursor.step += 1
        training.end_epoch(lambda: {"test_accuracy": accuracy})
        best = disk.best_of(root)
        collectives.barrier()  # both ranks have looked, before rank 0 moves the folder
        return training.best, best and best.name

    found = [evaluated(0.5)]
    aside = root.with_name("aside")
    collectives.alone(lambda: (root.rename(aside), root.write_text("not a folder")))
    found.append(evaluated(0.9))
    collectives.alone(lambda: (root.unlink(), aside.rename(root)))
    return [*found, evaluated(0.7)]


def training_of(folder: str, *overrides: str) -> Training:
    """A training of ``net``, with the batches of all tests."""
    how = [f"teacher.global_batch={G}", "teacher.zero_stage=0", *overrides]
    config = settings.load("demo", [f"run.dir={folder}", *how])
    return Training(
        context_of(config, Path(folder) / "teacher"), "teacher", net(), config.teacher, G
    )


def observed_case(folder: str) -> list[dict[str, Any]]:
    """The log after a step: rank 0's images have no label, two of rank 1's three labelled ones are right."""
    training, own = training_of(folder, "data.unlabelled=true", "run.log_steps=1"), G // 2
    training.engine.train()
    logits = training.engine(whole_batch()[0][collectives.rank() * own :][:own])
    labels = torch.full((own,), -1)
    if collectives.rank():
        labels[:3] = (logits.argmax(1)[:3] + torch.tensor([0, 0, 1])) % CLASSES
    loss_B = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    training.learn(loss_B, torch.ones(own), logits, labels)
    training.step(batches_per_epoch=10)
    collectives.barrier()  # rank 0 has written the line
    return read_lines(training.metrics.path)


def test_the_accuracy_of_labelled_images_is_that_of_all_ranks(tmp_path):
    for (line,) in rank_group.run(observed_case, 2, str(tmp_path)):
        assert line["labelled_accuracy"] == pytest.approx(2 / 3)
        assert line["accuracy"] == 2 / G


def saved_case(folder: str) -> tuple[float, str]:
    """Seconds of training over two attempts, the first of a thousand seconds; what ``finish`` says of lost bytes."""
    for step in (1, 2):
        training = training_of(folder)
        assert training.cursor.step == step - 1
        training._began -= 1000 * (step == 1)
        training.cursor.step = step
        training.save()
        training.checkpoints.settle()
    last = disk.path_of(training.checkpoints.folder, 2)
    (last / "rank-00000-of-00001.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as raised:
        training.finish()
    return disk.seconds_of(last), f"{raised.value.what}; {raised.value.remedy}"


def test_seconds_count_all_attempts_and_only_the_last_checkpoint_is_the_result(tmp_path):
    ((seconds, said),) = rank_group.run(saved_case, 1, str(tmp_path))
    assert 1000 <= seconds < 2000
    assert "step-00000002, can't be read back" in said
    assert "resumes from step-00000001" in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_best_checkpoint_that_is_not_saved_is_not_the_best(tmp_path, ranks):
    """Otherwise none of the later ones, which are better than any on disk, would be kept."""
    wanted = [(0.5, "step-00000001"), (0.5, None), (0.7, "step-00000003")]
    assert rank_group.run(best_case, ranks, str(tmp_path)) == [wanted] * ranks


@pytest.mark.parametrize(
    "shares",
    [
        [[[0, 1, 2, 3, 4, 5, 6, 7]]],
        [[[0, 1, 2], [3, 4, 5, 6, 7]]],
        [[[0, 1, 2, 3, 4]], [[5, 6, 7]]],  # shares of unequal size
        [[[0, 1, 2], [3, 4]], [[5], [6, 7]]],
    ],
    ids=["one", "accumulated", "two ranks", "two ranks accumulated"],
)
def test_the_gradient_is_that_of_the_global_batch(tmp_path, shares):
    """Sum over valid samples / G, however rows are distributed over ranks and micro-batches."""
    features, labels, valid = whole_batch()
    model = net()
    loss_B = F.cross_entropy(model(features), labels, reduction="none") * valid
    (loss_B.sum() / G).backward()
    ranks = rank_group.run(learn_case, len(shares), str(tmp_path), shares)
    for found in ranks:
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, msg=name)
    assert sum(found["loss"] for found in ranks) == pytest.approx(
        float(loss_B.detach().sum()), rel=1e-5
    )
    assert sum(found["samples"] for found in ranks) == valid.sum()
    right = ((model(features).argmax(1) == labels) * valid).sum()
    assert sum(found["right"] for found in ranks) == right


def targets_of(samples: int) -> np.ndarray:
    """Log-probabilities [VIEWS, samples, 10], all rows different."""
    logits = np.random.default_rng(9).normal(0, 2, (VIEWS, samples, 10))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def prepared(folder: Path) -> Config:
    """A run of the digits that is packed and indexed, with soft targets written by the test."""
    config = settings.load(
        "demo",
        [
            f"run.dir={folder}",
            "data.limit=96",
            "data.shard_size=16",
            "data.allow_empty_classes=true",
            "views.size=16",
            "views.pad=2",
            f"targets.views={VIEWS}",
            "student.stem=conv3",
            "student.dim=16",
            "student.hidden=16",
            "student.epochs=5",
            "student.global_batch=16",
            "student.max_micro_batch=4",
        ],
    )
    if collectives.rank() == 0 and not (folder / "targets").exists():
        runner.run_rank(settings.as_tree(config), ["pack", "index"], False, False, Ranks())
        manifest = Manifest.load(folder / "manifest" / "train.arrow")
        log_VNC = targets_of(len(manifest))
        classes = np.broadcast_to(np.arange(10, dtype=np.int32), log_VNC.shape)
        for number, ids in enumerate(np.array_split(np.arange(len(manifest)), 3)):
            write_shard(
                folder / "targets" / f"{number}.parquet",
                ids=ids,
                view_count=VIEWS,
                indices=classes[:, ids],
                log_probs=log_VNC[:, ids].astype(np.float16),
                meta={"key": "targets"},
            )
    return config


def student_case(folder: str) -> list[dict[str, np.ndarray]]:
    """What each micro-batch of this rank contributed to the loss, in order."""
    config = prepared(Path(folder))
    context = context_of(config, Path(folder) / "control")
    seen: list[dict[str, np.ndarray]] = []
    loss, build = student.distillation_loss, student.build_student

    def noted_loss(logits: Any, labels: Any, soft: Any, **how: Any) -> Any:
        seen[-1].update(labels=labels.numpy().copy(), soft=soft.numpy().copy())
        return loss(logits, labels, soft, **how)

    def noted_build(*arguments: Any) -> Any:
        model = build(*arguments)
        model.register_forward_pre_hook(
            lambda module, inputs: seen.append({"images": inputs[0].numpy().copy()})
        )
        return model

    student.distillation_loss, student.build_student = noted_loss, noted_build
    student.run(context, "none", "targets")
    return [one for one in seen if "soft" in one]


@pytest.mark.parametrize("world_size", [1, 2])
def test_image_label_and_soft_target_belong_together(tmp_path, world_size):
    """Every sample has its own label and the target of exactly the crop that is shown."""
    folder = tmp_path / "run"
    rank_group.run(prepare_case, 1, str(folder))
    ranks = rank_group.run(student_case, world_size, str(folder))
    config = settings.load("demo", [f"run.dir={folder}", "views.size=16", "views.pad=2"])
    path = folder / "manifest" / "train.arrow"
    manifest, log_VNC = Manifest.load(path), targets_of(len(Manifest.load(path)))
    context = Context(config, Ranks(), RunPaths(folder), folder, "", "cpu", False)
    reader = Reader(ReaderSpec(str(path), context.views()))
    order = Order(manifest.shard_sizes, seed=0, global_batch=16, window=config.stream.window)
    shown = set()
    for epoch in range(5):
        for index in range(order.batches_per_epoch):
            rows = [ranks[r].pop(0) for r in range(world_size) for _ in range(4 // world_size)]
            together = {n: np.concatenate([row[n] for row in rows]) for n in rows[0]}
            ids = order.batch(epoch, index)
            batch, view = reader.read(Request(ids, epoch % VIEWS)), epoch % VIEWS
            shown.add(batch.images.tobytes())
            # Micro-batches may take a rank's rows in any order: compare sample by sample.
            place = matched(together["images"], batch.images)
            np.testing.assert_array_equal(together["labels"], manifest.label_N[ids[place]])
            wanted = log_VNC[view, ids[place]].astype(np.float16).astype(np.float32)
            wanted -= np.log(np.exp(wanted).sum(1, keepdims=True))
            np.testing.assert_allclose(together["soft"], wanted, atol=1e-5)
    assert not any(ranks)
    assert len(shown) == 5 * order.batches_per_epoch


def prepare_case(folder: str) -> None:
    prepared(Path(folder))


def matched(shown_BHWC: np.ndarray, wanted_BHWC: np.ndarray) -> np.ndarray:
    """For each image that was shown, its position among the expected ones; every one occurs once."""
    places = {image.tobytes(): place for place, image in enumerate(wanted_BHWC)}
    assert len(places) == len(wanted_BHWC)
    found = np.array([places[image.tobytes()] for image in shown_BHWC])
    assert sorted(found.tolist()) == list(range(len(wanted_BHWC)))
    return found
