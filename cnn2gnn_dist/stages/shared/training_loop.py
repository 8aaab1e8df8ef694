"""The training loop that teacher and student share: cursor, steps, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.config import StudentConfig, TeacherConfig
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Batch, Request
from cnn2gnn_dist.errors import Preempted, UserError
from cnn2gnn_dist.models.normalise import shrunk
from cnn2gnn_dist.models.precision import MixedPrecision
from cnn2gnn_dist.runtime import preemption
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.shared.conditions import Conditions
from cnn2gnn_dist.stages.shared.context import Context, CorruptCount
from cnn2gnn_dist.stages.shared.learning_rates import Late, rates_of
from cnn2gnn_dist.stages.shared.networks import share_buffers
from cnn2gnn_dist.stages.shared.scheduled_values import rate_at, share_kept, slow_average
from cnn2gnn_dist.stages.shared.stragglers import Stragglers
from cnn2gnn_dist.stages.shared.tally import Tally, means_of
from cnn2gnn_dist.training import ds_config, random_state
from cnn2gnn_dist.training.accumulation import accumulation_for, small_micro_batches
from cnn2gnn_dist.training.checkpoint.folder import path_of, root_of
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from cnn2gnn_dist.training.engine import Engine
from cnn2gnn_dist.training.metrics import MetricsLog, process_memory_mb
from cnn2gnn_dist.training.schedule import late_lr_at, late_share, size_at
from cnn2gnn_dist.training.sync_norm import batch_of_norms


@dataclass
class Cursor:
    """Position in training: the next batch of an epoch, and the optimizer steps done."""

    epoch: int = 0
    batch: int = 0
    step: int = 0


class Training:
    """One model's training under DeepSpeed, resumable at every optimizer step.

    Args:
        context: the stage's view of the run.
        name: its name in logs.
        model: on the CPU; the same initial weights on every rank.
        settings: epochs, batch, learning rate.
        samples: number of training samples.
        late: the parameters that have no gradients at first.
    """

    def __init__(
        self,
        context: Context,
        name: str,
        model: MixedPrecision,
        settings: TeacherConfig | StudentConfig,
        samples: int,
        late: Late | None = None,
    ) -> None:
        self.context, self.name, self.settings, self.late = context, name, settings, late
        world_size = context.ranks.world_size
        self.accumulation = accumulation_for(
            settings.global_batch, world_size, settings.max_micro_batch
        )
        kind = "teacher" if isinstance(settings, TeacherConfig) else "student"
        sizes = settings.global_batch, world_size, self.accumulation, settings.max_micro_batch
        if small := small_micro_batches(*sizes, f"{kind}.global_batch"):
            context.warn(small, name)
        model.compute_dtype = context.compute_dtype(kind)
        resolved = ds_config.resolve_for(
            context.deepspeed_of(kind),
            settings,
            world_size,
            self.accumulation,
            context.device,
            precision=context.config.precision,
        )
        share_buffers(model)
        self.engine = Engine(
            model,
            resolved,
            device=context.device,
            late=late.names if late else (),
            rates=rates_of(model, settings, context.config.graph.gate_lr),
            average=settings.average,
            name=name,
        )
        # Rank losses are averaged over ranks and micro-batches: divided by this they are sum / G,
        # whatever the ranks' shares of the global batch.
        self.micro: int = resolved["train_micro_batch_size_per_gpu"]
        self.checkpoints = Checkpoints(
            root_of(context.folder),
            context.key,
            context.about,
            keep_last=context.config.checkpoint.keep_last,
            max_failures=context.config.checkpoint.max_failures,
            copies=context.copies(),
        )
        self.metrics = MetricsLog(context.folder, context.ranks.rank, name=name)
        self.corrupt = CorruptCount(context.config.data.max_corrupt, samples)
        self.cursor = Cursor()
        self.tally, self.stragglers = Tally(self.engine.device), Stragglers()
        self._saved_at, self._began = -1, time.perf_counter()
        self.best: float | None = None
        self._order: str | None = None
        self.conditions = Conditions()
        self._resume()
        self._note_conditions(model)

    def _resume(self) -> None:
        loaded = self.checkpoints.load(self.engine, force=self.context.force)
        if loaded is None:
            self.metrics.truncate_after(-1)
            # Not the state that building the model left: student and control get the same dropout.
            random_state.seed(self.context.config.seed, 0, self.context.ranks.rank)
            return
        extra, ranks = loaded.extra, self.context.ranks
        self.engine.late_from = extra.get("late_from")
        self.cursor = Cursor(**extra["cursor"])
        self.corrupt.seen = {int(i): text for i, text in extra["corrupt"].items()}
        self.best, self._order = extra["best"], extra["order"]
        self.conditions = Conditions.of(extra)
        self._began -= loaded.owns[0].get("seconds", 0.0)
        if len(loaded.owns) == ranks.world_size:
            own = loaded.owns[ranks.rank]
            self.tally = Tally.of([own["tally"]], self.engine.device)
            random_state.restore(own["random"])
        else:  # other ranks than before: the first one takes all tallies
            if ranks.is_first:
                tallies = [own["tally"] for own in loaded.owns]
                self.tally = Tally.of(tallies, self.engine.device)
            random_state.seed(self.context.config.seed, self.cursor.step, ranks.rank)
        self.metrics.truncate_after(self.cursor.step)
        self.context.say(
            f"resumes at epoch {self.cursor.epoch}, batch {self.cursor.batch} "
            f"(step {self.cursor.step})",
            self.name,
        )

    def _note_conditions(self, model: MixedPrecision) -> None:
        """Record what the result depends on, and warn if that has changed since an earlier attempt."""
        ranks = self.context.ranks.world_size
        for kind, now in (
            ("precisions", str(model.compute_dtype).removeprefix("torch.")),
            ("norms", batch_of_norms(model, self.micro, ranks)),
            ("pools", self.micro if getattr(model, "scope", None) == "batch" else None),
        ):
            changed = self.conditions.note(kind, self.cursor.step, now)
            if changed is not None:
                self.context.warn(changed, self.name)

    def deferred_stop(self) -> AbstractContextManager[None]:
        """Context in which a request to stop (SIGTERM …) leads to a save at the next step."""

        def describe() -> tuple[str, str]:
            path = self.checkpoints.folder / "latest"
            last = path.read_text() if path.exists() else "none"
            if self.checkpoints.copies.waiting:
                return (
                    "run.storage did not get the last checkpoint",
                    f"{last}: it is only in run.dir",
                )
            return "no step finished", f"so nothing was saved: the last checkpoint is {last}"

        return preemption.deferred_stop(self.context.config.checkpoint.grace_s, describe)

    def save(self, best: bool = False) -> None:
        """Start writing a checkpoint (collective).

        Raises:
            UserError: the last step diverged; nothing is saved.
        """
        self.engine.settle()  # before anything else records the step as done
        extra = {
            "cursor": asdict(self.cursor),
            "corrupt": self.corrupt.check(),
            "best": self.best,
            "order": self._order,
            "late_from": self.engine.late_from,
            **self.conditions.seen,
        }
        own = {
            "tally": self.tally.state(),
            "random": random_state.capture(),
            "seconds": time.perf_counter() - self._began,
        }
        self.metrics.flush()
        self.checkpoints.save(self.cursor.step, self.engine, extra, own, best=best)
        self._saved_at = self.cursor.step

    def steps(
        self, order: Order, epoch: int, view: int, stream: ReaderPool
    ) -> Iterator[list[Batch]]:
        """This rank's batches of the rest of an epoch, one list of micro-batches per step."""
        ranks = self.context.ranks
        order.check_ranks(ranks.world_size, self.accumulation)
        whole = self.settings.epochs * order.batches_per_epoch
        late = self.late.epoch * order.batches_per_epoch if self.late else 0
        if not self.cursor.step and (slow := slow_average(self.settings, whole, late)):
            self.context.warn(slow, self.name)
        self._check_order(order)
        first, last = self.cursor.batch, order.batches_per_epoch

        def requests() -> Iterator[Request]:
            for index in range(first, last):
                for part in order.micro_batches(
                    epoch, index, ranks.rank, ranks.world_size, self.accumulation
                ):
                    yield Request(np.ascontiguousarray(part), view)

        batches = stream.batches(requests())
        for _ in range(first, last):
            waited = stream.wait_seconds
            micro = [next(batches) for _ in range(self.accumulation)]
            self.tally.waited += stream.wait_seconds - waited
            for batch in micro:
                self.corrupt.note(batch)
            yield micro

    def _check_order(self, order: Order) -> None:
        """Within an epoch the order must not change (only ``--force`` can lead here)."""
        if self.cursor.batch and self._order != order.digest:
            self.context.warn(
                f"the order of samples has changed: epoch {self.cursor.epoch} starts over",
                self.name,
            )
            self.cursor.batch = 0
        self._order = order.digest

    def sized(self, images_BHWC: Tensor) -> Tensor:
        """The images in the size of this epoch (``early_size``)."""
        s, size = self.settings, self.context.config.views.size
        return shrunk(
            images_BHWC,
            size_at(self.cursor.epoch, s.epochs, size, s.early_size, s.early_share),
        )

    def learn(self, loss_B: Tensor, valid_B: Tensor, logits_BC: Tensor, labels_B: Tensor) -> None:
        """Back-propagate one micro-batch, with corrupt samples masked; count what the log shows.

        Nothing is read from the device here: a read would wait for all queued work.
        """
        loss = (loss_B * valid_B).sum()
        self.engine.backward(loss / self.micro)
        with torch.no_grad():
            right = ((logits_BC.argmax(1) == labels_B) * valid_B).sum()
            self.tally.add(loss.detach(), right, valid_B.sum())
            if self.context.config.data.unlabelled:
                self.tally.note("labelled_accuracy", right, (valid_B * (labels_B >= 0)).sum())

    def step(self, batches_per_epoch: int) -> None:
        """Update the weights, advance the cursor, log and save when due.

        The outcome of the step (finite or not, which ranks were asked to stop) is read one step later,
        so that the host never waits for the device; before a log line and a save it does wait.

        Raises:
            Preempted: some rank was asked to stop; the step is saved, or the message says why not.
            UserError: this step or the previous one diverged; neither is logged or saved.
        """
        progress = self.cursor.epoch + self.cursor.batch / batches_per_epoch
        s = self.settings
        # The first step of a warm-up from zero would have no effect: count from the step's end.
        progress += 1 / batches_per_epoch
        warmup = min(s.warmup_epochs, s.epochs / 2)
        lr = rate_at(s, progress, warmup)
        late_lr = self._late_lr(progress, warmup)
        mine = (float(preemption.stop_requested()), float(self.checkpoints.written))
        previous = self.engine.step_ahead(
            lr, mine, late_lr, share_kept(s, progress, self.cursor.step + 1)
        )
        self.cursor.batch += 1
        self.cursor.step += 1
        last = self.cursor.batch == batches_per_epoch
        logs = last or self.cursor.step % self.context.config.run.log_steps == 0
        saves = not last and self.cursor.step % self.context.config.checkpoint.every_steps == 0
        if logs or saves:
            previous = self.engine.settle()
        stop_votes, written = (0.0, 0.0) if previous is None else previous.votes
        # Votes cast before the pending save started say nothing about it.
        if (
            previous
            and previous.step >= self._saved_at
            and written == self.context.ranks.world_size
        ):
            self.checkpoints.settle()
        if logs:
            self._log(lr, late_lr, batches_per_epoch)
        if stop_votes or saves:
            self.save()
        if stop_votes:
            self._stop()

    def _late_lr(self, progress: float, warmup: float) -> float | None:
        """Learning rate of the late parameters; None: there are none, or they have not started."""
        late, s = self.late, self.settings
        if late is None or self.cursor.epoch < late.epoch:
            return None
        if self.engine.late_from is None:
            self.engine.late_from = self.cursor.step
        own = min(late.warmup, (s.epochs - late.epoch) / 2)
        if s.schedule != "cosine":
            return rate_at(s, progress, warmup) * late_share(progress, late.epoch, own)
        return late_lr_at(progress, s.epochs, s.lr, warmup, late.epoch, own)

    def end_epoch(self, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Close an epoch: evaluate when due, save with the cursor at the next epoch's start."""
        every, found = self.settings.eval_epochs, {}
        if evaluate is not None and every and (self.cursor.epoch + 1) % every == 0:
            self.engine.eval()  # else BatchNorm would learn from the held-out images
            with self.engine.answering():
                found = evaluate()
            self.metrics.log(self.cursor.step, epoch=self.cursor.epoch + 1, **found)
        self.cursor.epoch += 1
        self.cursor.batch = 0
        self.tally = Tally(self.engine.device)
        best = self.best
        self.save(best=self._is_best(found))
        self.checkpoints.settle()  # what follows (a graph, a stage) may take long
        if self.checkpoints.problem is not None:
            self.best = best  # of the checkpoints that exist: the next best need not beat this one
        if collectives.any_rank(preemption.stop_requested()):
            self._stop()

    def _is_best(self, found: dict[str, float]) -> bool:
        """Whether this held-out accuracy is the best so far, so that its checkpoint is kept."""
        accuracy = next((v for k, v in found.items() if k.endswith("test_accuracy")), None)
        if accuracy is None or (self.best is not None and accuracy <= self.best):
            return False
        self.best = accuracy
        return self.context.config.checkpoint.keep_best

    def _stop(self) -> None:
        self.checkpoints.settle()
        problem = self.checkpoints.problem
        kept = f"step {self.cursor.step} is saved" if problem is None else f"NOT saved: {problem}"
        raise Preempted(
            f"{self.name} was asked to stop: {kept}{self.checkpoints.copies.wait()}",
            where=str(self.checkpoints.folder),
            remedy="run the same command to resume",
        )

    def _log(self, lr: float, late_lr: float | None, batches_per_epoch: int) -> None:
        t, now = self.tally, time.perf_counter()
        device = self.engine.device
        host = t.sums.new_tensor([t.waited, *t.own_work()])
        sums = torch.cat([t.sums, t.noted.view(-1), host])
        loss, right, samples, *others = collectives.all_reduce_sum(sums).tolist()
        noted, (waited, *work) = others[: t.noted.numel()], others[t.noted.numel() :]
        seconds = max(now - t.began, 1e-9)
        slow = self.stragglers.note(work, lambda text: self.context.warn(text, self.name))
        values: dict[str, float | str] = {
            "epoch": self.cursor.epoch + self.cursor.batch / batches_per_epoch,
            "loss": loss / max(samples, 1),
            "accuracy": right / max(samples, 1),
            "lr": lr,
            "images_per_s": samples / seconds,
            "wait_share": waited / seconds / self.context.ranks.world_size,
            "memory_mb": process_memory_mb(),
            **slow,
        }
        if late_lr is not None:
            values["graph_lr"] = late_lr
        if device.type == "cuda":
            values["gpu_memory_mb"] = torch.cuda.max_memory_allocated(device) / 2**20
        values.update(means_of(noted))
        self.metrics.log(self.cursor.step, **values)
        self.tally = Tally(self.engine.device)

    def finish(self) -> list[Path]:
        """Return the files of the last checkpoint, at the end of training (collective).

        Raises:
            UserError: it could not be written, or not be read back.
        """
        corrupt = self.corrupt.check()
        if corrupt:
            some = "; ".join(sorted(corrupt.values())[:3])
            self.context.warn(f"{len(corrupt)} corrupt images were left out: {some}", self.name)
        last = self.checkpoints.finish()
        wanted = path_of(self.checkpoints.folder, self.cursor.step)
        if last.name != wanted.name:  # it would pass for the result of the whole training
            raise UserError(
                f"the last checkpoint, {wanted.name}, can't be read back from disk",
                where=str(wanted),
                remedy=f"check the disk; the same command resumes from {last.name}",
            )
        return [path for path in last.iterdir() if path.is_file()]
