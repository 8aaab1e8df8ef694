"""Sharded, atomic checkpoints of named tensors, readable at any world size and any ZeRO stage.

Saving copies the state to host memory (collective) and writes it in a thread of each rank; when
all shares are on disk, rank 0 makes them visible (``checkpoint/folder.py``). It doesn't change the
state, so a run that is saved at other steps is the same run. A save that fails (disk full,
read-only folder) is reported and costs only that save; the previous checkpoint stays.

Where each host has a folder of its own, it has the shares of its own ranks there, and the same manifest as the
others. Ranks on other hosts than rank 0's copy their shares to the run's storage. Before a checkpoint is read,
the hosts exchange what they lack.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import handover, host_folders
from cnn2gnn_dist.training.checkpoint import folder as disk
from cnn2gnn_dist.training.checkpoint import named_state, separate
from cnn2gnn_dist.training.checkpoint.copies import Copies, CopyCount
from cnn2gnn_dist.training.checkpoint.other_run import check_run
from cnn2gnn_dist.training.engine import Engine

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """Contents of a checkpoint apart from the engine's state.

    Attributes:
        extra: what all ranks had in common.
        owns: the private state of each rank that wrote it, in rank order.
    """

    extra: dict[str, Any]
    owns: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one stage of one run.

    Args:
        folder: created on the first save.
        run_id: the run that they belong to; checkpoints of other runs are refused.
        about: the config fields behind ``run_id``, so that a refusal can name the differences.
        keep_last: how many to keep, in addition to the best one.
        max_failures: how many consecutive saves, or copies, may fail; None: any number.
        copies: where checkpoints are also kept; None on all ranks, or on none.
    """

    def __init__(
        self,
        folder: Path,
        run_id: str,
        about: dict[str, Any] | None = None,
        keep_last: int = 2,
        max_failures: int | None = None,
        copies: Copies | None = None,
    ) -> None:
        self.max_failures, self._failures = max_failures, 0
        self.copies = CopyCount(copies, max_failures)
        self.folder, self.run_id, self.keep_last = Path(folder), run_id, keep_last
        self.about = about or {}
        self.problem: str | None = None
        """Why the last save failed; None if it is on disk or still being written."""
        self._writing: _Writing | None = None

    def save(
        self,
        step: int,
        engine: Engine,
        extra: dict[str, Any],
        own: dict[str, Any] | None = None,
        *,
        best: bool = False,
    ) -> None:
        """Start writing the state after ``step`` optimizer steps (collective).

        It counts once ``settle`` has run. ``extra`` (JSON) must be the same on all ranks; ``own`` is
        this rank's. ``best``: keep it until there is a better one.

        Raises:
            UserError: the engine's last step diverged: such weights are never saved.
        """
        engine.settle()
        self.settle()
        final = disk.path_of(self.folder, step)
        work = final.with_name(final.name + ".tmp")
        if not self._create_folder(work):
            return
        rank, world_size = collectives.rank(), collectives.world_size()
        share = _shares(engine, world_size)
        tensors, optimizer_step = named_state.pull(engine, lambda name: share[name] == rank)
        if world_size > 1:
            tensors.update(named_state.own_buffers(engine, rank))
        state = {
            "format": disk.FORMAT,
            "run_id": self.run_id,
            "step": step,
            "optimizer_step": optimizer_step,
            "world_size": world_size,
            "zero_stage": engine.zero_stage,
            "extra": extra,
            "about": self.about,
        }
        name = f"rank-{rank:05d}-of-{world_size:05d}"
        send = None if 0 in host_folders.sharing(rank) else partial(self.copies.send, final.name)
        self._writing = _Writing(work, name, tensors, own or {}, state, best, send)

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write; if so on all ranks, ``settle`` does not wait."""
        return self._writing is None or self._writing.done

    @property
    def pending(self) -> bool:
        """Whether a save is waiting for ``settle``; the same on all ranks."""
        return self._writing is not None

    def settle(self) -> None:
        """Wait until all shares are on disk and make the checkpoint visible (collective)."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        # A share that goes to the storage may take longer than cluster.timeout_s; a disk may not.
        with collectives.uneven() if host_folders.are_separate() else nullcontext():
            made = writing.finish()
        outcomes = collectives.all_gather_object(made)
        problem = next((error for error, _ in outcomes if error), None)
        if problem is None:
            files = [file for _, own in outcomes for file in own]
            problem = _error_in_a_folder(lambda: self._publish(writing, files))
        if problem is None:  # in every folder: only now may an earlier one go
            final = writing.work.with_suffix("")
            problem = _error_in_a_folder(lambda: disk.prune(self.folder, final, self.keep_last))
        self._report(problem, writing.work)
        if problem is None:
            near = host_folders.sharing(0)
            sent = [f for rank, (_, own) in enumerate(outcomes) if rank not in near for f in own]
            self.copies.note_sent(writing.work.stem, sent)
        self.copies.settle(complete=problem is None)

    def finish(self) -> Path:
        """Return the newest checkpoint at the end of training (collective).

        Raises:
            UserError: the last save failed.
        """
        self.settle()
        if self.problem is not None:
            raise UserError(
                f"the last checkpoint could not be written: {self.problem}",
                where=str(self.folder),
                remedy="free some space or fix the folder; the same command resumes from the previous one",
            )
        path = self._newest()
        assert path is not None
        return path

    def _newest(self) -> Path | None:
        """The newest complete checkpoint, once it is complete in each folder (collective)."""
        if not host_folders.are_separate():
            first = collectives.rank() == 0
            path: Path | None = collectives.broadcast_object(self.latest() if first else None)
            return path
        return separate.newest(self.folder)

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint; a corrupt one is logged and skipped."""
        disk.recover(self.folder)
        for folder in reversed(disk.all_of(self.folder)):
            problem = disk.damage(folder)
            if problem is None:
                return folder
            _log.warning(f"checkpoint {folder.name} is skipped: {problem}")
        return None

    def load(
        self,
        engine: Engine,
        *,
        force: bool = False,
        only: Path | None = None,
        answering: bool = False,
    ) -> Loaded | None:
        """Set the engine to the newest complete checkpoint; None if there is none (collective).

        Args:
            engine: one that has not stepped yet.
            only: load exactly this checkpoint, which is known to be complete.
            answering: load averages over the steps, if any, as weights: for inference, not for training.
            force: also accept another run's or config's checkpoint if the model's shapes fit.

        Raises:
            UserError: the checkpoint belongs to another run, or to another architecture.
        """
        path = self._newest() if only is None else only
        if path is None:
            return None
        if only is not None or not host_folders.are_separate():
            handover.hand_over(path, partial(separate.written, path))
        else:
            separate.complete_older(self.folder, path)
        state = disk.read_state(path)
        if not force:
            check_run(path, state, self.run_id, self.about)
        tensors = disk.read_tensors(path)
        if answering:
            tensors = disk.answering(tensors)
        _check_shapes(engine, tensors, path)
        if (
            not answering
            and collectives.rank() == 0
            and named_state.has_other_moments(engine, tensors)
        ):
            _log.warning(
                f"checkpoint {path.name} is of another optimizer, whose moments are left out"
            )
        same_world_size = state["world_size"] == collectives.world_size()
        named_state.push(engine, tensors, state["optimizer_step"])
        named_state.push_buffers(engine, tensors, collectives.rank() if same_world_size else None)
        engine.steps = int(state["step"])
        engine.deepspeed.global_steps = engine.steps
        return Loaded(state["extra"], disk.read_owns(path))

    def _create_folder(self, work: Path) -> bool:
        """Create the folder to write into: on rank 0, or on each host that has its own."""

        def make() -> None:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)

        problem = _error_in_a_folder(make)
        if problem is not None:
            self._report(problem, work)
        return problem is None

    def _publish(self, writing: _Writing, files: list[disk.File]) -> None:
        work = writing.work
        final = work.with_suffix("")
        disk.publish(work, final, writing.state, files)
        if writing.best:
            durable.write_text(self.folder / disk.BEST, final.name)
        _log.debug("checkpoint %s is complete", final.name)

    def _report(self, problem: str | None, work: Path) -> None:
        """Record the outcome of a save, the same on all ranks.

        Raises:
            UserError: ``max_failures`` consecutive saves have failed.
        """
        self.problem = problem
        self._failures = 0 if problem is None else self._failures + 1
        if problem is None:
            return
        if host_folders.acts(collectives.rank()):
            shutil.rmtree(work, ignore_errors=True)
        if collectives.rank() == 0:
            _log.error(
                f"checkpoint {work.stem} was not written: {problem}; training continues, and the "
                "previous checkpoint is kept"
            )
        if self.max_failures is not None and self._failures >= self.max_failures:
            raise UserError(
                f"{self._failures} consecutive checkpoints could not be written: {problem}",
                where=str(self.folder),
                remedy="free some space or fix the folder; the same command resumes from the last one "
                "that was written (checkpoint.max_failures)",
            )


class _Writing:
    """One rank's share while it is written to disk."""

    def __init__(
        self,
        work: Path,
        name: str,
        tensors: dict[str, Tensor],
        own: dict[str, Any],
        state: dict[str, Any],
        best: bool,
        send: Callable[[Path, disk.File], None] | None = None,
    ) -> None:
        self.work, self.state, self.best, self._send = work, state, best, send
        self._name, self._tensors, self._own = name, tensors, own
        self._files: list[disk.File] = []
        self._error: str | None = None
        # A daemon: a rank that fails must not stay alive to write what no rank will publish.
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def finish(self) -> tuple[str | None, list[disk.File]]:
        """Wait; return the error, if any, and the files."""
        self._thread.join()
        return self._error, self._files

    def _run(self) -> None:
        self._error = _error_of(self._write)

    def _write(self) -> None:
        handover.wait_for_folder(self.work)
        path = self.work / f"{self._name}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in self._tensors.items()}, path)
        self._tensors = {}
        durable.sync(path)
        own = path.with_suffix(".json")
        durable.write_json(own, self._own)
        self._files = [disk.describe(path), disk.describe(own)]
        if self._send is not None:
            for file in self._files:
                self._send(self.work / file[0], file)


def _error_of(work: Any) -> str | None:
    """Run ``work``; return the disk error, if any."""
    try:
        work()
    except Exception as error:  # safetensors reports ENOSPC with its own exception
        return str(error) or type(error).__name__
    return None


def _error_in_a_folder(work: Callable[[], object]) -> str | None:
    """The ranks that act for a folder do the work; return the first one's error, if any (collective)."""
    own = _error_of(work) if host_folders.acts(collectives.rank()) else None
    if not host_folders.are_separate():
        shared: str | None = collectives.broadcast_object(own)
        return shared
    return next(filter(None, collectives.all_gather_object(own)), None)


def _shares(engine: Engine, world_size: int) -> dict[str, int]:
    """The rank that writes each tensor: largest first, each to the rank with the fewest bytes."""
    sizes = {name: 3 * _elements(p) for name, p in engine.module.named_parameters()}
    sizes.update({name: b.numel() for name, b in engine.module.named_buffers()})
    load = [0] * world_size
    share = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        share[name] = load.index(min(load))
        load[share[name]] += sizes[name]
    return share


def _elements(parameter: Any) -> int:
    """Elements of the full parameter; ZeRO-3 leaves an empty tensor and ``ds_numel``."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _check_shapes(engine: Engine, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = {
        "w/" + name: tuple(getattr(p, "ds_shape", p.shape))
        for name, p in engine.module.named_parameters()
    }
    wanted.update({"b/" + name: tuple(b.shape) for name, b in engine.module.named_buffers()})
    there = {n: tuple(t.shape) for n, t in tensors.items() if n[:2] in ("w/", "b/")}
    for name in dict.fromkeys([*wanted, *there]):
        if wanted.get(name) != there.get(name):
            raise UserError(
                f"the checkpoint does not fit the model at {name[2:]}: shape "
                f"{there.get(name, 'absent')} saved, {wanted.get(name, 'absent')} expected",
                where=str(path),
                remedy="use the config of the run that wrote it, or another run.dir=…",
            )
