"""Readers that record, wait, die or fail. Reader processes import this module, so it imports little."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec

MOMENTS = ("start", "before", "within")


def starts(folder: Path, started: int) -> list[str]:
    """The planned deaths of those readers that start when so many have started, or had done so before.

    Of two that start at the same time neither need see that it is the next one, so a number that was passed over
    is the next one's.
    """
    numbers = [int(path.name.split("-")[1]) for path in (folder / "plan").glob("start-*")]
    return [f"start-{number}" for number in sorted(numbers) if number <= started]


class Noting(Reader):
    """A reader that records what it reads."""

    def __init__(self, spec: ReaderSpec) -> None:
        super().__init__(spec)
        self.folder = Path(spec.manifest).parent

    def read(self, request, into=None):
        (self.folder / "read" / str(request.view)).touch()
        return super().read(request, into)


class Waiting(Noting):
    """A reader that waits in request 1 until it is told to continue."""

    def read(self, request, into=None):
        if request.view == 1:
            (self.folder / "begun").write_text("begun")
            (self.folder / "go").read_text()
        return super().read(request, into)


class Mortal(Noting):
    """A reader that kills itself according to a plan."""

    def __init__(self, spec: ReaderSpec) -> None:
        folder = Path(spec.manifest).parent
        (folder / f"{os.getpid()}.pid").touch()
        started = len(list(folder.glob("*.pid")))
        for moment in starts(folder, started):
            self.die(folder, moment)
        super().__init__(spec)

    def read(self, request, into=None):
        self.die(self.folder, f"before-{request.view}")
        batch = super().read(request, into)
        self.die(self.folder, f"within-{request.view}")
        return batch

    @staticmethod
    def die(folder: Path, moment: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (folder / "plan" / moment).rename(folder / "killed" / moment)
            os.kill(os.getpid(), signal.SIGKILL)


class Poisoned(Reader):
    """A reader that dies of one request."""

    def read(self, request, into=None):
        if request.view == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(request, into)


class Stillborn(Reader):
    """A reader whose process ends at once."""

    def __init__(self, spec: ReaderSpec) -> None:
        os._exit(7)


class Unreadable(Reader):
    """A reader of a disk with a bad block."""

    def read(self, request, into=None):
        raise OSError(5, "Input/output error", "shard-000000.tar")
