"""Stages ``student`` and ``control``: distill the teacher into the GNN, and into its stem alone."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.config import StudentConfig
from cnn2gnn_dist.data.batch_sizes import check_parts, parts_of_rank
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading.reader import on_device
from cnn2gnn_dist.data.soft_targets import Targets
from cnn2gnn_dist.graph.distdgl.served import ServedGraph
from cnn2gnn_dist.models.losses import (
    distillation_loss,
    logit_adjustment,
    neighbour_loss,
    target_shares,
)
from cnn2gnn_dist.models.stem import load_stem
from cnn2gnn_dist.models.student import Scope, StudentOutput
from cnn2gnn_dist.stages.graph import build, describe
from cnn2gnn_dist.stages.neighbours.neighbourhood import (
    Neighbourhood,
    last_refresh,
    reusable,
)
from cnn2gnn_dist.stages.neighbours.served_graph import serve
from cnn2gnn_dist.stages.shared.context import Context, load_manifest
from cnn2gnn_dist.stages.shared.learning_rates import Late
from cnn2gnn_dist.stages.shared.networks import build_student, check_early_size
from cnn2gnn_dist.stages.shared.predictions import accuracy_of
from cnn2gnn_dist.stages.shared.training_loop import Training
from cnn2gnn_dist.stages.shared.training_targets import open_targets
from cnn2gnn_dist.stages.shared.whitening import whiten_first_layers
from cnn2gnn_dist.training.checkpoint.named_state import digest
from cnn2gnn_dist.training.sync_norm import synchronise_norms


def run(context: Context, scope: Scope, targets_key: str) -> list[Path]:
    """Train; return the files of the last checkpoint."""
    config, settings = context.config, context.config.student
    manifest = load_manifest(context.paths.train_manifest)
    targets = open_targets(context, manifest, targets_key)
    torch.manual_seed(config.seed)
    model = build_student(config, manifest.num_classes, scope)
    whiten_first_layers(context, model)
    if settings.weights:
        load_stem(model.stem, settings.weights)
    check_early_size(model, model.stem, settings, "student")
    if context.ranks.world_size > 1:
        # Ranks own partitions of a graph of similar images: one rank's batch is not representative. The
        # control has no graph, but is compared with the student: its norms are the same.
        synchronise_norms(model)
    name = "control" if scope == "none" else "student"
    late = None
    if scope == "dataset":
        graph = config.graph
        late = Late(model.graph_parameters().keys(), graph.start_epoch, graph.warmup_epochs)
    training = Training(context, name, model, settings, len(manifest), late)
    adjustment = _adjustment(settings, manifest, targets, training.engine.device)
    engine, schedule = training.engine, _GraphSchedule(context, training, manifest)
    reading = context.stream(context.paths.train_manifest, name)
    with training.deferred_stop(), closing(schedule), reading as stream:
        while training.cursor.epoch < settings.epochs:
            epoch = training.cursor.epoch
            order, around = schedule.begin_epoch(epoch, scope)
            view = epoch % config.targets.views if config.targets.views else epoch
            engine.train()
            for micro in training.steps(order, epoch, view, stream):
                for batch in micro:
                    images, labels, valid = context.to_device(batch)
                    soft = on_device(targets.lookup(batch.ids, view), engine.device)
                    query = around and around.around(batch.ids, epoch, training.cursor.step)
                    output = engine(training.sized(images), query)
                    loss_B = loss_of(output, labels, soft, settings, adjustment)
                    training.learn(loss_B, valid, output.logits_BC, labels)
                    schedule.observe(output, labels)
                training.step(order.batches_per_epoch)
            training.end_epoch(lambda: {"self_path_test_accuracy": schedule.self_path_accuracy()})
    return training.finish()


def _adjustment(
    settings: StudentConfig, manifest: Manifest, targets: Targets, device: torch.device
) -> Tensor | None:
    """What logit adjustment adds to the logits [C]; None: it is off."""
    if not settings.logit_adjust:
        return None
    readable_N = ~targets.uniform()  # training leaves the others out
    shares_C = target_shares(
        torch.from_numpy(np.asarray(manifest.label_N, np.int64)[readable_N]),
        torch.from_numpy(targets.mean()) if settings.distill_weight else None,
        manifest.num_classes,
        weight=settings.distill_weight,
        label_smoothing=settings.label_smoothing,
    )
    return logit_adjustment(shares_C, settings.logit_adjust).to(device)


def loss_of(
    output: StudentOutput,
    labels: Tensor,
    soft: Tensor,
    s: StudentConfig,
    adjustment_C: Tensor | None = None,
) -> Tensor:
    """Loss of each sample: that with the graph, the self path's, and the graph head's.

    Divided by the weight of the two paths, so that its gradient is as large as that of the control,
    which has only the self path, and the same clipping has the same effect on both. ``adjustment_C`` is
    added to all logits (``logit_adjustment``).
    """

    def distil(logits: Tensor) -> Tensor:
        if adjustment_C is not None:
            logits = logits.float() + adjustment_C
        return distillation_loss(
            logits,
            labels,
            soft,
            weight=s.distill_weight,
            temperature=s.temperature,
            label_smoothing=s.label_smoothing,
        )

    loss_B = distil(output.logits_BC)
    if output.weights_BF is None:
        return loss_B
    if s.self_loss:
        loss_B = loss_B + s.self_loss * distil(output.self_logits_BC)
    if s.neighbour_loss and output.first_labels_BF is not None:
        loss_B = loss_B + s.neighbour_loss * neighbour_loss(
            output.weights_BF, output.first_labels_BF, labels
        )
    return loss_B / (1.0 + s.self_loss)


class _GraphSchedule:
    """The part of training that only the student has: the graph."""

    def __init__(self, context: Context, training: Training, manifest: Manifest) -> None:
        self.context, self.training, self.manifest = context, training, manifest
        self.around: Neighbourhood | None = None
        self.served: ServedGraph | None = None
        self.noted: set[str] = set()

    def begin_epoch(self, epoch: int, scope: Scope) -> tuple[Order, Neighbourhood | None]:
        """Return order and neighborhood of an epoch; builds or reopens the graph when due."""
        config = self.context.config
        if scope == "dataset":
            self._refresh(epoch)
        how: dict[str, Any] = {
            "seed": config.seed,
            "global_batch": config.student.global_batch,
            "window": config.stream.window,
        }
        if self.around is None:
            return Order(self.manifest.shard_sizes, **how), None
        order = self.around.order(self.manifest, **how)
        uneven = order.uneven_ranks(
            self.context.ranks.world_size,
            self.training.accumulation,
            config.student.max_micro_batch,
        )
        notes = {
            "student.global_batch, graph.partition.parts": order.short_epoch(),
            "student.max_micro_batch, graph.partition.parts": uneven,
        }
        for fields, note in notes.items():
            if note and note not in self.noted:
                self.context.warn(f"{note} ({fields})", stage="graph")
        self.noted = set(filter(None, notes.values()))
        return order, self.around

    def _refresh(self, epoch: int) -> None:
        context, engine = self.context, self.training.engine
        ranks, settings = context.ranks, context.config.graph
        number = last_refresh(epoch, settings)
        if number is None or (self.around is not None and number != epoch):
            return
        self.close()
        root = context.folder / "graph"
        version = reusable(root, number, context.key)
        due = number == epoch and not self.training.cursor.batch  # else a step has used it already
        if version is None or due:
            moment = f"step {self.training.cursor.step}, weights {digest(engine)}"
            if version is not None and version.meta.get("moment", moment) != moment:
                context.warn(
                    f"the graph of epoch {epoch} was built from other weights, before this training was "
                    "repeated: it is built again",
                    stage="graph",
                )
                version = None
        if version is None:
            previous = reusable(root, number - settings.refresh_epochs, context.key)
            engine.eval()
            with engine.averaged_buffers():
                version = build(context, self._embed, root, number, previous, moment)
            context.say(describe(version.meta), stage="graph")
        parts = settings.partition.parts
        check_parts(parts, ranks.world_size)
        own = list(parts_of_rank(ranks.rank, ranks.world_size, parts))
        if settings.sampling.sampler == "distdgl":
            self.served = serve(context, version)
        self.around = Neighbourhood(context, version, own, self.served)

    def close(self) -> None:
        """Stop the graph's servers, if there are any."""
        if self.served is not None:
            self.served.close()
            self.served = None

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        output: StudentOutput = self.training.engine(self.training.sized(images), None)
        return output.x_BD, output.z_Bd

    @torch.no_grad()
    def observe(self, output: StudentOutput, labels: Tensor) -> None:
        """Record the quality of the neighbors."""
        if output.weights_BF is None:
            return
        tally = self.training.tally
        if output.first_labels_BF is not None:
            same = output.first_labels_BF == labels[:, None]
            homophily_B = (output.weights_BF * same).sum(1)
            known_B = labels >= 0  # of those that have a label
            tally.note("homophily", (homophily_B * known_B).sum(), known_B.sum())
        tally.note("median_scale", output.scale)
        tally.note("degenerate_rows", output.degenerate)

    def self_path_accuracy(self) -> float:
        """Held-out accuracy of the self path: an evaluation during training that needs no graph."""
        return accuracy_of(
            self.context, lambda images: self.training.engine(images, None).self_logits_BC
        )
