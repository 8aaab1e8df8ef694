"""Readers in separate processes, without Ray: for small images, where threads contend for the interpreter.

A reader process has no state but caches. Pixels arrive in unnamed shared memory, so that nothing is left behind
however a process ends. A reader that dies is restarted, and its unanswered requests go to the others at once; since
reading is a pure function, each batch is delivered exactly once.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.data.images.crops import crops_of
from cnn2gnn_dist.data.reading.reader import Batch, Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.reader_process import receive, send
from cnn2gnn_dist.data.reading.shared_batches import MOST_LENT, Buffer, Layout, Lease, Spares
from cnn2gnn_dist.errors import UserError

MOST_DEATHS = 10
"""Number of readers that may die while reading one request before the request is blamed."""
CLOSING_SECONDS = 10.0
"""Time that a reader has to finish its request when the stream closes."""
READER: Any = Reader
"""The reader that a process opens; a test may substitute one that dies."""


class ProcessReaders:
    """Reader processes, children of this one.

    Args:
        spec: specification of the readers.
        workers: number of processes.

    Raises:
        UserError: the spec can't be opened.
    """

    def __init__(self, spec: ReaderSpec, workers: int) -> None:
        Reader(spec).close()  # fail here, not in a dying process
        self._groups = crops_of(spec.views)
        self._several = isinstance(spec.views, tuple)
        self._numbers = 0
        self.readers = [_Process(spec) for _ in range(workers)]

    def ask(self, request: Request) -> ProcessAnswer:
        """Send a request to the least busy reader."""
        self._numbers += 1
        layout = Layout(self._groups, len(request.ids), request.view)
        answer = ProcessAnswer(self, request, layout, self._numbers)
        self._assign([answer])
        return answer

    def depth(self, request: Request, prefetch: int) -> int:
        """Return how many requests may be in flight: shared memory is limited only by the main memory."""
        return prefetch

    def close(self) -> None:
        """End the processes; may be called twice."""
        for reader in self.readers:
            reader.channel.close()
        for reader in self.readers:
            reader.end()
        self.readers = []

    def fetch(self, answer: ProcessAnswer) -> Batch:
        """Wait for an answer, sending its request again as often as necessary.

        Raises:
            UserError: a shard is missing or changed; readers keep dying.
            Exception: a reader raised any other error, which is a bug.
        """
        while not answer.done:
            assert answer.reader is not None
            try:
                answer.reader.receive()
            except EOFError:
                self._lost(answer.reader)
        if answer.error is not None:
            raise answer.error
        buffer, layout, request = answer.buffer, answer.layout, answer.request
        assert buffer is not None
        labels, valid = layout.labels(buffer.memory).copy(), layout.valid(buffer.memory).copy()
        if sum(reader.spares.in_use() for reader in self.readers) < MOST_LENT:
            images = layout.images(np.asarray(answer.lease()))
        else:  # a buffer takes two open files as long as its batch is kept: there are only so many
            images = [image.copy() for image in layout.images(buffer.memory)]
            answer.release()
        crops = tuple(images) if self._several else ()
        ids = np.array(request.ids, np.int64)
        return Batch(images[0][0], labels, ids, valid, answer.problems, crops, request.view)

    def _assign(self, answers: list[ProcessAnswer]) -> None:
        for answer in answers:
            while answer.reader is None:
                reader = self._free_reader()
                try:
                    reader.ask(answer)
                except OSError:
                    if reader.failures >= MOST_DEATHS:
                        raise _too_many_deaths(answer.request, reader.last_exit) from None
                    self._lost(reader)

    def _free_reader(self) -> _Process:
        """Return the reader with the fewest requests; one that is starting only if all are."""
        for reader in self.readers:
            if not reader.ready:
                with contextlib.suppress(EOFError):  # noticed when its answers are awaited
                    reader.look()
        return min(self.readers, key=lambda reader: (not reader.ready, len(reader.asked)))

    def _lost(self, reader: _Process) -> None:
        """Restart a dead reader, send its requests to others and blame the one that it was reading."""
        unanswered = [answer for answer in reader.asked if not answer.dropped]
        # It reads in order, so it died on its first request: the others are never to blame.
        guilty = unanswered[0] if unanswered and unanswered[0] is reader.asked[0] else None
        reader.restart()
        for answer in unanswered:
            answer.reader = None
        if guilty is not None:
            guilty.deaths += 1
            if guilty.deaths >= MOST_DEATHS:  # don't send it: it would kill the next reader
                unanswered.remove(guilty)
        self._assign(unanswered)
        if guilty is not None and guilty not in unanswered:
            raise _too_many_deaths(guilty.request, reader.last_exit)


class ProcessAnswer:
    """A request in flight."""

    def __init__(
        self, readers: ProcessReaders, request: Request, layout: Layout, number: int
    ) -> None:
        self.request, self.layout, self.number = request, layout, number
        self.reader: _Process | None = None
        self.buffer: Buffer | None = None
        self.done = self.dropped = False
        self.problems: list[str] = []
        self.error: Exception | None = None
        self.deaths = 0
        self._readers = readers
        self._spares = Spares()

    def wait(self) -> Batch:
        """Wait for the batch and return it."""
        return self._readers.fetch(self)

    def drop(self) -> None:
        """Discard the request; a reader that has not started it skips it."""
        self.dropped = True
        if self.reader is not None and not self.done:
            self.reader.give_up(self.number)
        elif self.done:
            self.release()

    def hold(self, buffer: Buffer, spares: Spares) -> None:
        """Hold a buffer, to be returned to ``spares``."""
        self.buffer, self._spares = buffer, spares

    def lease(self) -> Lease:
        """Hand the buffer over to the arrays of the batch."""
        assert self.buffer is not None
        buffer, self.buffer = self.buffer, None
        return self._spares.lease(buffer)

    def release(self) -> None:
        """Return the buffer."""
        if self.buffer is not None:
            self._spares.add(self.buffer)
            self.buffer = None


class _Process:
    """One reader process and its unanswered requests in order."""

    def __init__(self, spec: ReaderSpec) -> None:
        self._spec = spec
        self.asked: deque[ProcessAnswer] = deque()
        self.failures = 0
        """Deaths since the last answer."""
        self.last_exit: int | None = None
        self._buffers = 0
        self.spares = Spares()
        self._start()

    def _start(self) -> None:
        self.ready = False
        self.channel, theirs = socket.socketpair()
        self._control = Buffer(0, 8)
        self._known: set[int] = set()
        self._forgotten: list[int] = []
        # -P: nothing is imported from the working folder, only our own package.
        package = str(Path(__file__).parents[3])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        code = "from cnn2gnn_dist.data.reading.reader_process import main; main()"
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", code, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )
        self._ended = weakref.finalize(self, _end, self.process, self.channel)
        with contextlib.suppress(OSError):  # noticed by whoever asks it for something
            send(self.channel, (READER, self._spec), self._control.handle)

    def restart(self) -> None:
        """Put a new process in place of a dead one."""
        self.failures += 1
        self.channel.close()
        self.end()
        for answer in self.asked:
            answer.release()
        self.asked.clear()
        self._start()

    def end(self) -> None:
        """Wait for the process to end, since its socket is closed."""
        self._ended()
        self.last_exit = self.process.returncode

    def ask(self, answer: ProcessAnswer) -> None:
        """Send a request.

        Raises:
            OSError: the process is gone.
            UserError: there is no memory for the batch.
        """
        buffer = self._buffer(answer.layout.size)
        request = answer.request
        ids = np.asarray(request.ids)
        message = (answer.number, ids, request.view, buffer.number, buffer.size, self._forgotten)
        send(self.channel, message, None if buffer.number in self._known else buffer.handle)
        self._known.add(buffer.number)
        self._forgotten = []
        answer.reader = self
        answer.hold(buffer, self.spares)
        self.asked.append(answer)

    def _buffer(self, size: int) -> Buffer:
        """Return a free buffer that is large enough, or a new one; smaller ones are discarded."""
        while (spare := self.spares.pop()) is not None:
            if spare.size >= size:
                return spare
            self._known.discard(spare.number)
            self._forgotten.append(spare.number)
        try:
            buffer = Buffer(self._buffers + 1, size)
        except OSError as error:  # not to be taken for the end of the process
            raise UserError(
                f"no shared memory for a batch of {size / 1e6:,.1f} MB: {error.strerror}",
                where="stream.backend=processes",
                remedy="raise the limit of open files (ulimit -n 65536), or set a smaller stream.prefetch",
            ) from None
        self._buffers += 1
        return buffer

    def look(self) -> None:
        """Take a message if there is one.

        Raises:
            EOFError: the process is gone.
        """
        if select.select([self.channel], [], [], 0)[0]:
            self.receive()

    def receive(self) -> None:
        """Wait for the next message and record its contents.

        Raises:
            EOFError: the process is gone.
        """
        message, _ = receive(self.channel)
        self.ready = True
        if message == "ready":
            return
        self.failures = 0
        number, problems, error = message
        answer = self.asked.popleft()
        assert answer.number == number
        answer.done, answer.error, answer.problems = True, error, problems or []
        if answer.dropped or error is not None:
            answer.release()

    def give_up(self, number: int) -> None:
        """Tell the process to skip all requests up to this one that it has not started."""
        given_up = self._control.memory.view(np.uint64)
        given_up[0] = max(int(given_up[0]), number)


def _end(process: subprocess.Popen[bytes], channel: socket.socket) -> None:
    """End a reader: it stops when its socket is closed; otherwise it is killed, which loses nothing."""
    channel.close()
    try:
        process.wait(CLOSING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _too_many_deaths(request: Request, code: int | None) -> UserError:
    return UserError(
        f"a reader died {MOST_DEATHS} times on one request (exit code {code})",
        where=f"sample ids {request.ids[:4].tolist()}…, view {request.view}",
        remedy="see what the readers wrote to stderr; the usual cause is that memory ran out: use fewer "
        "stream.workers or smaller batches",
    )
