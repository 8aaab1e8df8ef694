"""Reader actors that record, wait or die. Ray's workers import this module, so it imports little."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from cnn2gnn_dist.data.reading.reader_actor import ReaderActor, batch_of
from tests.support.odd_readers import starts


class MortalActor(ReaderActor):
    """A reader that kills itself according to a plan, and whose pid is known without asking it."""

    def __init__(self, spec):
        self.folder = Path(spec.manifest).parent
        for moment in starts(self.folder, len(list((self.folder / "pids").iterdir()))):
            self.die(moment)
        (self.folder / "pids" / str(os.getpid())).touch()
        super().__init__(spec)

    def read(self, ids, view, loan=None):
        name = f"{view}-{ids[0]}"
        self.die(f"before-{name}")
        first = super().read(ids[: len(ids) // 2], view)
        self.die(f"within-{name}")
        assert len(batch_of(first).ids) == len(ids) // 2
        answer = super().read(ids, view, loan)
        self.die(f"after-{name}")
        return answer

    def die(self, moment):
        """SIGKILL this process if the plan says so, once."""
        planned, done = self.folder / "plan" / moment, self.folder / "killed" / moment
        if planned.exists():
            with contextlib.suppress(FileNotFoundError):  # another reader has died at this point
                planned.rename(done)
                mark_dead(self.folder / "pids" / str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)


def mark_dead(path: Path) -> None:
    """Record the kill: no process is killed twice, but its file still counts as a reader that has started."""
    with contextlib.suppress(FileNotFoundError):
        path.rename(path.with_suffix(".dead"))


class PoisonedActor(ReaderActor):
    """A reader that dies of one request, whichever reader it is."""

    def read(self, ids, view, loan=None):
        if 7 in ids:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(ids, view, loan)


class StillbornActor(ReaderActor):
    def __init__(self, spec):
        raise ImportError("no such library")


class NotingActor(ReaderActor):
    def read(self, ids, view, loan=None):
        note(self._spec.manifest, view)
        return super().read(ids, view, loan)


def note(manifest: str, view: int) -> None:
    (Path(manifest).parent / "read" / str(view)).touch()


class GatedActor(NotingActor):
    """A reader whose second read waits until the test allows it to continue."""

    def read(self, ids, view, loan=None):
        folder = Path(self._spec.manifest).parent
        if view == 1:
            (folder / "begun").touch()
            wait_for(folder / "go")
        return super().read(ids, view, loan)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists()


class DiesOnce(ReaderActor):
    def __init__(self, spec):
        super().__init__(spec)
        self.folder = Path(spec.manifest).parent

    def read(self, ids, view, loan=None):
        mark = self.folder / "died"
        if ids[0] == 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(ids, view, loan)


class Suicidal(ReaderActor):
    def read(self, ids, view, loan=None):
        os.kill(os.getpid(), signal.SIGKILL)
