"""Stage ``teacher``: train the CNN under DeepSpeed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.config import Config, TeacherConfig
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.models.losses import distillation_loss
from cnn2gnn_dist.models.teacher import check_classifier
from cnn2gnn_dist.stages.shared.context import Context, load_manifest
from cnn2gnn_dist.stages.shared.mixing import Mixed, check_even, mix
from cnn2gnn_dist.stages.shared.networks import Teacher, check_early_size
from cnn2gnn_dist.stages.shared.predictions import accuracy_of, check_held_out
from cnn2gnn_dist.stages.shared.training_loop import Training
from cnn2gnn_dist.stages.shared.whitening import whiten_first_layers


def run(context: Context) -> list[Path]:
    """Train the teacher; return the files of its last checkpoint."""
    config, settings = context.config, context.config.teacher
    check_held_out(context)
    manifest = load_manifest(context.paths.train_manifest)
    torch.manual_seed(config.seed)
    model = Teacher(config, manifest.num_classes)
    if not settings.weights:
        whiten_first_layers(context, model)
    elif not settings.epochs:
        check_classifier(model.cnn, settings.weights)
    check_early_size(model, model.cnn, settings, "teacher")
    training = Training(context, "teacher", model, settings, len(manifest))
    if settings.epochs:
        _train(context, training, manifest)
    else:
        training.save()  # the weights as they were given
    return training.finish()


def _train(context: Context, training: Training, manifest: Manifest) -> None:
    config, settings, engine = context.config, context.config.teacher, training.engine
    if settings.mixup or settings.cutmix:
        check_even(training.micro)
    labelled_N = np.asarray(manifest.label_N) >= 0  # it learns nothing from the others
    order = Order(
        manifest.shard_sizes,
        seed=config.seed,
        global_batch=settings.global_batch,
        window=config.stream.window,
        only=None if labelled_N.all() else labelled_N,
    )
    reading = context.stream(context.paths.train_manifest, "teacher")
    with training.deferred_stop(), reading as stream:
        while training.cursor.epoch < settings.epochs:
            epoch = training.cursor.epoch
            engine.train()
            for micro in training.steps(order, epoch, epoch, stream):
                for batch in micro:
                    images, labels, valid = context.to_device(batch)
                    mixed = _mixed(config, images, batch.ids, valid, epoch)
                    seen = images if mixed is None else mixed.images_BHWC
                    logits = engine(training.sized(seen))
                    loss_B = _cross_entropy(logits, labels, settings)
                    if mixed is not None:
                        other_B = _cross_entropy(logits, labels[mixed.partner_B], settings)
                        loss_B = mixed.loss(loss_B, other_B)
                    training.learn(loss_B, valid, logits, labels)
                training.step(order.batches_per_epoch)
            training.end_epoch(lambda: {"test_accuracy": accuracy_of(context, engine)})


def _mixed(
    config: Config, images: Tensor, ids_B: np.ndarray, valid: Tensor, epoch: int
) -> Mixed | None:
    """The micro-batch mixed in pairs; None: mixing is off."""
    mixup, cutmix = config.teacher.mixup, config.teacher.cutmix
    if not (mixup or cutmix):
        return None
    return mix(images, ids_B, valid, seed=config.seed, epoch=epoch, mixup=mixup, cutmix=cutmix)


def _cross_entropy(logits: Tensor, labels: Tensor, settings: TeacherConfig) -> Tensor:
    return distillation_loss(
        logits,
        labels,
        None,
        weight=0.0,
        temperature=1.0,
        label_smoothing=settings.label_smoothing,
    )
