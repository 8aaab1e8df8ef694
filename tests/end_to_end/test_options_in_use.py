"""Options reach the step that they are for: images, losses and rates of recorded steps, worked out here again.

The formulas themselves have tests of their own; what is compared here is what the model was shown and what
was back-propagated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cnn2gnn_dist import settings
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages import student, teacher
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.stages.shared.mixing import mix
from cnn2gnn_dist.stages.shared.networks import build_student
from cnn2gnn_dist.stages.shared.training_loop import Training
from tests.end_to_end.test_learn import VIEWS, context_of, prepare_case, targets_of
from tests.support import rank_group

COMMON = [
    *("data.limit=96", "data.shard_size=16", "data.allow_empty_classes=true"),
    *("views.size=16", "views.pad=2", f"targets.views={VIEWS}", "precision=float32"),
]
TEACHER = [
    *("teacher.epochs=3", "teacher.global_batch=16", "teacher.max_micro_batch=8"),
    *("teacher.args={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}", "teacher.lr=0.001"),
    *("teacher.label_smoothing=0.2", "teacher.early_size=12", "teacher.early_share=0.34"),
]
STUDENT = [
    *("student.stem=conv3", "student.dim=16", "student.hidden=16", "student.epochs=3"),
    *("student.global_batch=16", "student.max_micro_batch=8", "student.zero_stage=0"),
    *("student.early_size=12", "student.early_share=0.34", "graph.dim=8"),
]
SMALL = 1
"""Epochs with images of 12 pixels: round(0.34 x 3)."""
SMOOTHING, ADJUST = 0.2, 1.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is packed and indexed, with soft targets written by the test."""
    made = tmp_path_factory.mktemp("options") / "run"
    rank_group.run(prepare_case, 1, str(made))
    return made


def config_of(folder: Path, overrides: list[str]) -> Config:
    return settings.load("demo", [f"run.dir={folder}", *COMMON, *overrides])


def recorded_case(folder: str, name: str, overrides: list[str]) -> list[dict[str, Any]]:
    """Every micro-batch of a training: ids, what the model was shown, its logits, the loss of each image, the epoch."""
    config = config_of(Path(folder), overrides)
    context = context_of(config, Path(folder) / f"{name}-{len(overrides)}")
    context.folder.mkdir()
    seen: list[dict[str, Any]] = []
    learn, to_device = Training.learn, Context.to_device
    stage, made = (teacher, "Teacher") if name == "teacher" else (student, "build_student")
    build = getattr(stage, made)

    def noted_batch(self: Context, batch: Any) -> Any:
        seen.append({"ids": batch.ids.copy()})
        return to_device(self, batch)

    def noted_build(*arguments: Any) -> Any:
        model = build(*arguments)
        model.register_forward_pre_hook(lambda _, given: seen[-1].update(shown=given[0].clone()))
        return model

    def noted_learn(self: Training, loss_B: Tensor, valid_B: Tensor, *others: Tensor) -> None:
        seen[-1].update(loss=loss_B.detach().clone(), logits=others[0].detach().clone())
        seen[-1]["epoch"] = self.cursor.epoch
        learn(self, loss_B, valid_B, *others)

    Context.to_device, Training.learn = noted_batch, noted_learn  # type: ignore[method-assign]
    setattr(stage, made, noted_build)
    if name == "teacher":
        teacher.run(context)
    else:
        student.run(context, "none", "targets")
    return [
        {key: value.numpy() if torch.is_tensor(value) else value for key, value in one.items()}
        for one in seen
        if "loss" in one
    ]


def read(folder: Path, config: Config, step: dict[str, Any], view: int) -> tuple[Tensor, Tensor]:
    """Images and labels of a step, read by themselves."""
    path = folder / "manifest" / "train.arrow"
    context = Context(config, Ranks(), RunPaths(folder), folder, "", "cpu", False)
    images = Reader(ReaderSpec(str(path), context.views())).read(Request(step["ids"], view)).images
    labels = np.asarray(Manifest.load(path).label_N)[step["ids"]]
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def in_size(images_BHWC: Tensor, size: int) -> np.ndarray:
    pixels = images_BHWC.permute(0, 3, 1, 2).float()
    if size != pixels.shape[2]:
        pixels = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return pixels.permute(0, 2, 3, 1).numpy()


def cross_entropy(logits_BC: np.ndarray, label_B: Tensor, smoothing: float) -> np.ndarray:
    """By its definition, in float64."""
    log_BC = logits_BC.astype(np.float64)
    log_BC = log_BC - log_BC.max(1, keepdims=True)
    log_BC = log_BC - np.log(np.exp(log_BC).sum(1, keepdims=True))
    target_BC = np.full_like(log_BC, smoothing / log_BC.shape[1])
    target_BC[np.arange(len(log_BC)), label_B.numpy()] += 1 - smoothing
    return -(target_BC * log_BC).sum(1)


@pytest.mark.parametrize("mixing", [[], ["teacher.mixup=0.4", "teacher.cutmix=1"]])
def test_the_teacher_sees_mixed_images_in_their_size_and_learns_smoothed_labels(
    folder: Path, mixing: list[str]
) -> None:
    overrides = [*TEACHER, *mixing]
    config = config_of(folder, overrides)
    ((steps),) = rank_group.run(recorded_case, 1, str(folder), "teacher", overrides)
    assert len(steps) == 3 * 2 * (len(Manifest.load(folder / "manifest" / "train.arrow")) // 16)
    changed = 0
    for step in steps:
        epoch = step["epoch"]
        images, labels = read(folder, config, step, epoch)
        loss = cross_entropy(step["logits"], labels, SMOOTHING)
        if mixing:
            every = torch.ones(len(images))
            how = {"seed": config.seed, "epoch": epoch, "mixup": 0.4, "cutmix": 1.0}
            mixed = mix(images, step["ids"], every, **how)
            changed += not np.array_equal(mixed.images_BHWC.numpy(), images.numpy())
            images, share = mixed.images_BHWC, mixed.share_B.numpy()
            other = cross_entropy(step["logits"], labels[mixed.partner_B], SMOOTHING)
            loss = share * loss + (1 - share) * other
        size = 12 if epoch < SMALL else 16
        assert step["shown"].shape[1:3] == (size, size)
        np.testing.assert_allclose(step["shown"], in_size(images, size), atol=1e-3)
        np.testing.assert_allclose(step["loss"], loss, rtol=1e-4, atol=1e-5)
    assert changed == len(steps) * bool(mixing)


def adjusted_logits(folder: Path, logits_BC: np.ndarray, weight: float) -> np.ndarray:
    """Logits plus ADJUST times the logarithm of each class's share of all targets, labels and soft ones."""
    manifest = Manifest.load(folder / "manifest" / "train.arrow")
    soft_C = np.exp(targets_of(len(manifest))[0]).mean(0)
    label_C = np.bincount(np.asarray(manifest.label_N), minlength=10).clip(1)
    return logits_BC + ADJUST * np.log(weight * soft_C + (1 - weight) * label_C / label_C.sum())


@pytest.mark.parametrize("adjust", [[], [f"student.logit_adjust={ADJUST}"]])
def test_the_student_sees_images_in_their_size_and_learns_with_adjusted_logits(
    folder: Path, adjust: list[str]
) -> None:
    weight, heat = 0.25, 2.0
    overrides = [*STUDENT, f"student.distill_weight={weight}", f"student.temperature={heat}"]
    overrides += adjust
    config = config_of(folder, overrides)
    ((steps),) = rank_group.run(recorded_case, 1, str(folder), "control", overrides)
    assert len(steps) == 3 * 2 * (len(Manifest.load(folder / "manifest" / "train.arrow")) // 16)
    log_VNC = targets_of(len(Manifest.load(folder / "manifest" / "train.arrow")))
    for step in steps:
        epoch = step["epoch"]
        images, labels = read(folder, config, step, epoch % VIEWS)
        size = 12 if epoch < SMALL else 16
        assert step["shown"].shape[1:3] == (size, size)
        np.testing.assert_allclose(step["shown"], in_size(images, size), atol=1e-3)
        logits = step["logits"].astype(np.float64)
        if adjust:
            logits = adjusted_logits(folder, logits, weight)
        soft = np.exp(log_VNC[epoch % VIEWS, step["ids"]] / heat)
        soft /= soft.sum(1, keepdims=True)
        own = logits / heat - np.log(np.exp(logits / heat).sum(1, keepdims=True))
        distance = (soft * (np.log(soft) - own)).sum(1)
        loss = (1 - weight) * cross_entropy(logits, labels, 0) + weight * heat**2 * distance
        np.testing.assert_allclose(step["loss"], loss, rtol=5e-3, atol=5e-3)  # float16 targets


def gates_case(folder: str, gate_lr: float) -> dict[str, np.ndarray]:
    """How far one step moves the parameters of a student with the graph of the mini-batch."""
    overrides = ["graph.scope=batch", "graph.candidates=4", "graph.neighbours=2"]
    overrides += [f"graph.gate_lr={gate_lr}", "student.clip=0", "student.lr=0.01"]
    config = config_of(Path(folder), [*STUDENT, *overrides])
    context = context_of(config, Path(folder) / f"gates-{gate_lr}")
    torch.manual_seed(0)
    model = build_student(config, 10, "batch")
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    training = Training(context, "student", model, config.student, 96)
    training.engine.train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(training.accumulation):
        images = torch.randint(0, 256, (8, 16, 16, 3), generator=generator).to(torch.uint8)
        labels = torch.randint(0, 10, (8,), generator=generator)
        output = training.engine(images, None)
        loss_B = F.cross_entropy(output.logits_BC, labels, reduction="none")
        training.learn(loss_B, torch.ones(8), output.logits_BC, labels)
    training.step(batches_per_epoch=10)
    after = dict(training.engine.module.named_parameters())
    return {name: (after[name].detach() - one).numpy() for name, one in before.items()}


def test_gates_have_their_own_learning_rate(tmp_path: Path) -> None:
    (plain,) = rank_group.run(gates_case, 1, str(tmp_path), 1.0)
    (faster,) = rank_group.run(gates_case, 1, str(tmp_path), 8.0)
    gates = {name for name in plain if name.startswith("gnn.gate")}
    assert gates == {"gnn.gate1", "gnn.gate2"}
    for name, moved in plain.items():
        factor = 8.0 if name in gates else 1.0
        np.testing.assert_allclose(faster[name], factor * moved, rtol=1e-3, atol=1e-6)
    assert all(np.abs(plain[name]).max() > 1e-4 for name in gates)
