"""Stage ``teacher``: train the CNN under DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.models.losses import distillation_loss
from cnn2gnn_dist.models.normalise import Normalise
from cnn2gnn_dist.models.teacher import build_teacher
from cnn2gnn_dist.stages.context import Context, load_manifest
from cnn2gnn_dist.stages.judge import accuracy_of
from cnn2gnn_dist.stages.loop import Training


class Teacher(nn.Module):
    """uint8 images [B, H, W, 3] → logits_BC: normalisation, then the CNN."""

    def __init__(self, config: Config, num_classes: int, initial: bool = True) -> None:
        super().__init__()
        t = config.teacher
        self.normalise = Normalise(config.views.mean, config.views.std)
        self.cnn = build_teacher(
            t.arch,
            num_classes,
            config.views.size,
            pretrained=t.pretrained and initial,
            weights=t.weights if initial else None,
            args=dict(t.args),
        )

    def forward(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """Classify."""
        return self.cnn(self.normalise(images_BHWC))


def run(context: Context) -> list[Path]:
    """Train the teacher; returns the files of its last checkpoint."""
    config, settings = context.config, context.config.teacher
    manifest = load_manifest(context.paths.train_manifest)
    torch.manual_seed(config.seed)
    model = Teacher(config, manifest.num_classes)
    order = Order(
        manifest.shard_sizes,
        seed=config.seed,
        global_batch=settings.global_batch,
        window=config.stream.window,
    )
    training = Training(context, "teacher", model, settings, len(manifest))
    engine = training.engine
    with context.stream(context.paths.train_manifest, "teacher") as stream:
        while training.cursor.epoch < settings.epochs:
            epoch = training.cursor.epoch
            engine.train()
            for micro in training.steps(order, epoch, epoch, stream):
                for batch in micro:
                    images, labels, valid = context.to_device(batch)
                    logits = engine(images)
                    loss_B = distillation_loss(
                        logits,
                        labels,
                        None,
                        weight=0.0,
                        temperature=1.0,
                        label_smoothing=settings.label_smoothing,
                    )
                    training.learn(loss_B, valid, logits, labels)
                training.step(order.batches_per_epoch)
            training.end_epoch(lambda: {"test_accuracy": accuracy_of(context, engine)})
    training.corrupt.check()
    return training.finish()
