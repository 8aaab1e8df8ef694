"""Clear what a Ray that was started here has left; also the process that waits to do so.

A driver killed by SIGKILL cleans nothing up, and Ray's agents live on. So a watcher, in its own
session, holds the read end of a pipe whose write end exists in the driver alone: when the
pipe closes without a message, the watcher does what the driver should have done. It imports
neither Ray nor torch, and is run by its path: ``python -P watcher.py FOLDER MARK [LOGS]``.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "CNN2GNN_SESSION"
"""Environment variable that every process of a session inherits."""
GRACE_SECONDS = 1.0
"""Seconds for processes to exit by themselves before they are killed."""
PATIENCE_SECONDS = 30.0
"""Seconds until a process that can't be killed (a disk that doesn't answer) is given up."""
DONE = b"done"
"""What the driver writes when there is nothing left to clear."""


@dataclass(frozen=True)
class Traces:
    """What belongs to one session only.

    Attributes:
        folder: where its Ray keeps everything; nothing else is in it.
        mark: value of ``MARK`` in the environment of its processes; can't be guessed.
        logs: where Ray's logs are kept when the session fails; None: nowhere.
    """

    folder: Path
    mark: str
    logs: Path | None = None

    def processes(self) -> list[psutil.Process]:
        """Its running processes, except this one."""
        me = os.getpid()
        return [p for p in psutil.process_iter() if p.pid != me and self._owns(p)]

    def _owns(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if process.environ().get(MARK) == self.mark:
                return True
            # Ray's agents overwrite their environment with their title; their logs are open.
            if not "".join(process.cmdline()[:1]).startswith("ray::"):
                return False
            return any(self.folder in Path(f.path).parents for f in process.open_files())
        except (psutil.Error, OSError):  # exited meanwhile, or another user's
            return False

    def clear(self, keep_logs: bool) -> Path | None:
        """End the processes and remove the folder; safe to repeat, and concurrently.

        Returns where the logs are now, if they were kept.
        """
        self._end()
        kept = self._keep_logs() if keep_logs else None
        shutil.rmtree(self.folder, ignore_errors=True)
        return kept

    def _end(self) -> None:
        began = time.monotonic()
        while left := self.processes():  # until none: one may start another before it dies
            waited = time.monotonic() - began
            if waited > PATIENCE_SECONDS:
                return
            if waited > GRACE_SECONDS:
                for process in left:
                    with contextlib.suppress(psutil.Error):
                        process.kill()  # psutil checks that the pid is still the same process
            time.sleep(0.05)

    def _keep_logs(self) -> Path | None:
        """Keep the logs only beside existing files: a run that made no folder gets none from us."""
        found = sorted(self.folder.glob("session_2*/logs"))
        if self.logs is None or not found:
            return None
        with contextlib.suppress(OSError):
            if not any(self.logs.parent.iterdir()):
                return None
            shutil.rmtree(self.logs, ignore_errors=True)
            shutil.copytree(found[-1], self.logs)
            return self.logs
        return None


def main() -> None:
    """Wait for the end of the driver; clear its traces unless it reported that it did."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # meant for the driver, whose end shows on stdin
    folder, mark, *logs = sys.argv[1:]
    if sys.stdin.buffer.read() != DONE:
        Traces(Path(folder), mark, Path(logs[0]) if logs else None).clear(keep_logs=True)


if __name__ == "__main__":
    main()
