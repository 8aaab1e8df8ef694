"""The code of a reader process, and its protocol with the stream: messages over a socket, pixels in shared memory.

It ends when the stream closes the socket, or when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
from typing import Any

import numpy as np

from cnn2gnn_dist.data.images.crops import crops_of
from cnn2gnn_dist.data.reading.reader import Reader, Request, use_one_thread
from cnn2gnn_dist.data.reading.shared_batches import Layout, mapped
from cnn2gnn_dist.errors import UserError

_LENGTH = struct.Struct("<Q")
_LOOK_SECONDS = 1.0
"""Seconds between an idle reader's checks that its parent is alive."""


def send(channel: socket.socket, message: Any, handle: int | None = None) -> None:
    """Send plain data, and an open file if given.

    Raises:
        OSError: the other side is gone.
    """
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    header = _LENGTH.pack(len(body))
    if handle is None:
        channel.sendall(header + body)
    else:
        socket.send_fds(channel, [header], [handle])
        channel.sendall(body)


def receive(channel: socket.socket) -> tuple[Any, int | None]:
    """Return the next message, and the open file that came with it.

    Raises:
        EOFError: the other side is gone.
    """
    try:
        header, handles, _, _ = socket.recv_fds(channel, _LENGTH.size, 1)
        header += _exactly(channel, _LENGTH.size - len(header)) if header else b""
        if not header:
            raise EOFError("the other side has closed")
        body = _exactly(channel, _LENGTH.unpack(header)[0])
    except OSError as error:
        raise EOFError(str(error)) from None
    return pickle.loads(body), handles[0] if handles else None  # from our own parent or child


def _exactly(channel: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = channel.recv(size - len(parts))
        if not part:
            raise EOFError("the other side has closed")
        parts += part
    return bytes(parts)


class _Requests:
    """The stream's requests, as they arrive."""

    def __init__(self, channel: socket.socket, parent: int) -> None:
        self._channel, self._parent = channel, parent

    def next(self) -> tuple[Any, int | None]:
        """Wait for the next message.

        Raises:
            EOFError: the stream has closed, or its process is gone (another child of it may hold the socket).
        """
        while not select.select([self._channel], [], [], _LOOK_SECONDS)[0]:
            if os.getppid() != self._parent:
                raise EOFError("the parent is gone")
        return receive(self._channel)


def serve(channel: socket.socket, parent: int) -> None:
    """Answer the stream's requests until it closes."""
    requests = _Requests(channel, parent)
    (opened, spec), handle = requests.next()
    assert handle is not None
    given_up = mapped(handle, 8).view(np.uint64)
    os.close(handle)
    groups = crops_of(spec.views)
    reader: Reader | None = None
    with contextlib.suppress(UserError):  # it is raised again with the first request
        reader = opened(spec)
    send(channel, "ready")
    buffers: dict[int, np.ndarray] = {}
    while True:
        (number, ids, view, place, size, forgotten), handle = requests.next()
        for one in forgotten:
            buffers.pop(one, None)
        if handle is not None:
            buffers[place] = mapped(handle, size)
            os.close(handle)
        if number <= given_up[0]:
            send(channel, (number, None, None))
            continue
        problems: list[str] | None = None
        failure: Exception | None = None
        try:
            reader = reader or opened(spec)
            layout = Layout(groups, len(ids), view)
            memory = buffers[place]
            batch = reader.read(Request(ids, view), layout.images(memory))
            layout.labels(memory)[:] = batch.labels
            layout.valid(memory)[:] = batch.valid
            problems = batch.problems
        except Exception as error:  # an OSError too: dying of it would hide its message
            failure = _portable(error)
        send(channel, (number, problems, failure))


def _portable(error: Exception) -> Exception:
    """Return an error that can be sent, with its traceback as a note."""
    if isinstance(error, UserError):
        return error
    with contextlib.suppress(Exception):
        made = pickle.loads(pickle.dumps(error))
        if isinstance(made, Exception):
            made.add_note(traceback.format_exc())
            return made
    return RuntimeError(traceback.format_exc())


def main() -> None:
    """Entry of the process; its arguments are the socket's number and the parent's process id."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which then closes
    use_one_thread()
    with socket.socket(fileno=int(sys.argv[1])) as channel, contextlib.suppress(EOFError, OSError):
        serve(channel, int(sys.argv[2]))
