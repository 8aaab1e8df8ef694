"""A run that is also kept in a store (``run.storage``): what is fetched before a stage and stored after it.

Only rank 0 talks to the store, unless hosts have folders of their own. Every rank calls these functions, which
do nothing without one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cnn2gnn_dist import ledger
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.ledger import Status
from cnn2gnn_dist.pipeline.planning import Step
from cnn2gnn_dist.pipeline.registry import STAGES, Stage, stages_of
from cnn2gnn_dist.run_storage import host_copies, session
from cnn2gnn_dist.run_storage.depot import StoreDepot
from cnn2gnn_dist.run_storage.session import RunStorage
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.shared_files import host_folders

Look = tuple[Config, list[str]]
PACKED = STAGES["pack"].folder


class Stored:
    """A run's storage as the pipeline uses it.

    Attributes:
        storage: set on rank 0 of a run that has one; else None.
    """

    def __init__(self, config: Config) -> None:
        self._config, self._used = config, config.run.storage is not None
        self.storage: RunStorage | None = None

    def open(self) -> None:
        """Open the storage and restore the run's progress (collective).

        Raises:
            UserError: it can't be used, or the config doesn't name it and the folder is incomplete without it.
        """
        collectives.alone(self._open)
        if host_folders.are_separate():
            self._open_elsewhere()

    def _open_elsewhere(self) -> None:
        """Prepare the folders of other hosts, and what their ranks exchange files through."""
        root, url = Path(str(self._config.run.dir)), str(self._config.run.storage)
        owner: str = collectives.broadcast_object(self.storage.store.owner if self.storage else "")
        if self.storage is not None:
            depot = StoreDepot(url, owner, self.storage.objects)
        else:
            depot = StoreDepot(url, owner)
        rank = collectives.rank()

        def begin() -> None:
            if rank:
                host_copies.begin(root, url)
                depot.check(rank)

        host_folders.in_each(begin)
        host_folders.use(depot)

    def _open(self) -> None:
        root, url = Path(str(self._config.run.dir)), self._config.run.storage
        if url is not None:
            self.storage = RunStorage.open(root, url)
            _fetch_kept(self._config, self.storage)
        else:
            _check_whole(self._config, root)

    def begin(self, ahead: Sequence[Stage]) -> None:
        """Fetch packed shards if a stage that reads images is to run (rank 0)."""
        if self.storage is not None and any(stage.name != "pack" for stage in ahead):
            self.storage.fetch(PACKED)

    def before(self, step: Step, stages: list[Stage], force: bool) -> None:
        """Fetch what a stage builds on, and what it resumes from (rank 0).

        Raises:
            UserError: it can't be fetched.
        """
        if self.storage is None or step.key is None:
            return
        for stage in stages:
            if self.is_input(stage, step.stage):
                self.storage.fetch(stage.folder)
        if step.status is Status.RESUME or (step.status is Status.STALE and force):
            self.storage.fetch(step.stage.folder, resumes=True)

    @staticmethod
    def is_input(stage: Stage, of: Stage) -> bool:
        """Whether a stage reads files of another one: of those that it needs, or the packed shards."""
        return stage.name in of.needs or stage.folder == PACKED != of.folder

    def set_aside(self, stage: Stage) -> None:
        """Keep a stage's files in the storage under another name (rank 0)."""
        if self.storage is not None:
            self.storage.set_aside(stage.folder)

    def after(self, step: Step, *, made: bool) -> None:
        """Store a complete stage (collective).

        Raises:
            UserError: it could not be stored; it is complete on this disk.
        """
        if not self._used:
            return

        def keep() -> None:
            assert self.storage is not None
            try:
                self.storage.keep_stage(step.stage.folder, made=made)
            except UserError as error:
                raise UserError(
                    f"the stage {step.stage.name} is complete, but could not be stored: {error.what}",
                    where=error.where,
                    remedy=f"{error.remedy}; the same command continues from here",
                ) from None

        collectives.alone(keep)

    def end(self) -> None:
        """Store what belongs to no stage: config, results, report (collective)."""
        if self._used:
            collectives.alone(lambda: self.storage.keep_run() if self.storage else None)


@contextmanager
def looked_at(config: Config) -> Iterator[Look]:
    """Context manager for a config to plan with, whose folder is as a run would find it after ``open``.

    Neither the run's folder nor its storage is changed. Also yields lines that describe the storage's contents.

    Raises:
        UserError: as ``Stored.open``.
    """
    root, url = Path(str(config.run.dir)), config.run.storage
    if url is None:
        _check_whole(config, root)
        yield config, []
        return
    ledger.check_claim(root)
    with tempfile.TemporaryDirectory(prefix="cnn2gnn-plan-") as name:
        storage, moved = RunStorage.look(root, url, Path(name))
        _fetch_kept(config, storage)
        run = config.run.model_copy(update={"dir": name})
        lines = [f"storage: {_holdings(config, storage)}"]
        lines += [
            f"the run has continued elsewhere: {one} would be moved aside here" for one in moved
        ]
        yield config.model_copy(update={"run": run}), lines


def _fetch_kept(config: Config, storage: RunStorage) -> None:
    """Fetch what earlier results decide about later ones, such as the list of forgotten images."""
    for stage in stages_of(config):
        for name in stage.keeps:
            storage.fetch_file(stage.folder, name)


def _check_whole(config: Config, root: Path) -> None:
    host_copies.check_whole(root)
    folders = [stage.folder for stage in stages_of(config)]
    if (found := session.held_back(root, folders)) is not None:
        raise UserError(
            f"parts of this run are only in {found}",
            where=f"run.dir={root}",
            remedy=f"run.storage={found}",
        )


def _holdings(config: Config, storage: RunStorage) -> str:
    """What a storage holds, in one line: complete stages, and the progress of others."""
    whole, begun = [], []
    for stage in stages_of(config):
        record = storage.store.records.get(stage.folder)
        if record is None:
            continue
        if ledger.DONE in record.files:
            whole.append(stage.name)
            continue
        steps = [n.split("/")[1] for n in record.files if n.startswith("checkpoints/step-")]
        begun.append(
            f"{stage.name} up to {max(steps)}" if steps else f"the beginning of {stage.name}"
        )
    parts = [f"complete: {', '.join(whole)}"] * bool(whole) + begun
    return f"{storage.store.url} holds {'; '.join(parts) or 'nothing of this run yet'}"
