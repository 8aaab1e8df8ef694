"""A server for a model in a separate process, and a client that keeps its connection open; for ``serving.py``."""

from __future__ import annotations

import http.client
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TOKEN = "a-token-of-the-benchmark"
BOUNDARY = "----cnn2gnn"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
PNG = {"Content-Type": "image/png"}


def form(images: list[bytes]) -> bytes:
    """The body of a form."""
    head = (
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; "
        'name="images"; filename="{}.png"\r\n\r\n'
    )
    parts = [head.format(n).encode() + data + b"\r\n" for n, data in enumerate(images)]
    return b"".join(parts) + f"--{BOUNDARY}--\r\n".encode()


class Client:
    """A connection that is kept open."""

    def __init__(self, port: int) -> None:
        self._made = http.client.HTTPConnection("127.0.0.1", port, timeout=120)

    def ask(
        self, body: bytes, headers: dict[str, str], path: str = "/predict", method: str = "POST"
    ) -> tuple[int, bytes]:
        self._made.request(method, path, body, headers)
        answer = self._made.getresponse()
        return answer.status, answer.read()


@contextmanager
def served(
    model: Path, *options: str, errors: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "cnn2gnn_dist", "serve", str(model), "--port", "0", "--rate", "0",
         *options],
        env=os.environ | {"CNN2GNN_TOKEN": TOKEN}, stdout=subprocess.PIPE, stderr=errors, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        found = re.search(r":(\d+)/", process.stdout.readline())
        assert found, "the server did not start"
        yield process, int(found.group(1))
    finally:
        process.send_signal(signal.SIGTERM)
        print(f"  the server stopped with {process.wait(90)}")
