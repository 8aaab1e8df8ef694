"""The driver's side of leaving nothing behind, however it ends.

| the driver                      | who cleans up, and the exit code                   |
|---------------------------------|----------------------------------------------------|
| calls ``group.stop()``          | ``stop``                                           |
| returns or raises without it    | the same, at exit                                  |
| gets SIGTERM                    | the same; 143 (a second SIGTERM is not waited for) |
| gets SIGKILL, SIGHUP, crashes   | the watcher, within seconds                        |

Only for a Ray that this process has started; a cluster that it joins belongs to others.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cnn2gnn_dist.runtime.ray import watcher
from cnn2gnn_dist.runtime.ray.watcher import MARK, Traces

LONGEST_FOLDER = 40
"""Characters: Ray appends sockets of 64 more, and a socket's path has at most 107."""
ENDED_BY_SIGTERM = 128 + signal.SIGTERM

_terminated = threading.Event()


@dataclass
class Session:
    """The traces of the Ray that this process starts, and the watcher that guards them.

    Attributes:
        traces: what has to be cleared.
        driver: pid of the process that began the session; only it may end it.

    From ``begin`` to ``end`` Ray in this process authenticates by the session's own token: a
    token in the user's home would be demanded from then on by every Ray that the user starts.
    """

    traces: Traces
    driver: int
    _watcher: subprocess.Popen[bytes]
    _before: dict[str, str | None]

    @classmethod
    def begin(cls, logs: Path | None = None) -> Session:
        """Make the folder and start the watcher.

        Args:
            logs: folder for Ray's logs when the session fails (replaced if it exists).
        """
        folder = Path(tempfile.mkdtemp(prefix="cnn2gnn-", dir=_short_place()))
        (folder / "tmp").mkdir()
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        traces = Traces(folder, secrets.token_hex(16), logs)
        arguments = [str(folder), traces.mark, *([str(logs.absolute())] if logs else [])]
        process = subprocess.Popen(
            [sys.executable, "-P", watcher.__file__, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        authentication = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_AUTH_TOKEN": None,
        }
        session = cls(traces, os.getpid(), process, _replace(authentication))
        # A forked child would keep the pipe open after its parent's death.
        os.register_at_fork(after_in_child=session._forget)
        return session

    @contextlib.contextmanager
    def environment(self) -> Iterator[None]:
        """Set what Ray's processes inherit: the mark, and a temporary folder of the session."""
        ours: dict[str, str | None] = {
            MARK: self.traces.mark,
            "TMPDIR": str(self.traces.folder / "tmp"),
        }
        before = _replace(ours)
        try:
            yield
        finally:
            _replace(before)

    def end(self, *, failed: bool) -> Path | None:
        """Clear the traces and dismiss the watcher; returns where the logs were kept, if they were.

        Does nothing in a forked child of the driver.
        """
        if os.getpid() != self.driver:
            return None
        _replace(self._before)
        kept = self.traces.clear(keep_logs=failed)
        with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
            self._watcher.communicate(watcher.DONE, timeout=watcher.PATIENCE_SECONDS)
        return kept

    def _forget(self) -> None:
        if self._watcher.stdin is not None:
            self._watcher.stdin.close()


@contextlib.contextmanager
def orderly_sigterm() -> Iterator[None]:
    """Make SIGTERM an orderly exit after this block, inside which Ray replaces its handler.

    A handler that the program itself had set is restored instead.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        ours = before in (signal.SIG_DFL, None)
        signal.signal(signal.SIGTERM, _terminate if ours else before)


@contextlib.contextmanager
def exit_code_kept() -> Iterator[None]:
    """Restore SIGTERM's exit code: Ray turns any exit out of ``ray.get`` into exit code 1.

    Raises:
        SystemExit: with the code of SIGTERM.
    """
    try:
        yield
    except SystemExit:
        if _terminated.is_set():
            raise SystemExit(ENDED_BY_SIGTERM) from None
        raise


def _terminate(number: int, frame: FrameType | None) -> None:
    _terminated.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the next one kills; the watcher cleans up
    raise SystemExit(ENDED_BY_SIGTERM)


def _replace(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set environment variables (None: unset); returns their earlier values."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return before


def _short_place() -> str:
    """Where Ray would put its files ($RAY_TMPDIR, else the temporary folder), if short enough."""
    room = LONGEST_FOLDER - len("/cnn2gnn-12345678")
    place = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return place if len(place) <= room else "/tmp"
