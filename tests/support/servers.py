"""Real servers on loopback: HTTP with byte ranges and faults on demand, and S3 (moto)."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.ports import free_port

STARTS_S = 300.0
"""Seconds for the S3 server to answer, on a machine that gives it little processor time."""

Fault = str | None
"""None, "500", "403", "404", "short" (truncated body), "stall" (stops without closing),
"drop" (closes the connection without a response), "whole" (ignores the range),
"flip" (a wrong byte), "drip" (a byte now and then), "loop" (redirects to itself)."""


class Served:
    """A folder served over HTTP.

    ``fault`` is called before each GET with its number (from 0) and path; ``requests`` counts GETs
    by path; ``sent`` counts bytes of bodies. ``head_fault`` does the same for HEADs, by path.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.fault: Callable[[int, str], Fault] = lambda number, path: None
        self.head_fault: Callable[[str], Fault] = lambda path: None
        self.requests: Counter[str] = Counter()
        self.sent = 0
        self.lock = threading.Lock()
        self.tagged = False  # whether an ETag identifies the version of a file
        self.released = threading.Event()  # releases stalled responses


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers from the folder of ``served``, with the faults that it specifies."""

    protocol_version = "HTTP/1.1"
    served: Served
    folder: Path

    def log_message(self, *words: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(self.served.head_fault(self.path), body=False)

    def do_GET(self) -> None:
        with self.served.lock:
            number = self.served.requests.total()
            self.served.requests[self.path] += 1
        self._answer(self.served.fault(number, self.path), body=True)

    def _answer(self, fault: Fault, *, body: bool) -> None:
        path = self.folder / self.path.partition("?")[0].lstrip("/")
        if fault == "drop":
            self.close_connection = True
        elif fault == "loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif fault in ("500", "403", "404") or not path.is_file():
            self.send_error(int(fault) if fault in ("500", "403") else 404)
        else:
            data = self._head(path.read_bytes(), fault)
            if body:
                self._body(data, fault)

    def _head(self, data: bytes, fault: Fault) -> bytes:
        """Send the headers of a file; return the bytes of the range that was asked for."""
        whole, first, status = data, 0, 200
        wanted = self.headers.get("Range")
        if wanted and fault != "whole":
            start, last = wanted.removeprefix("bytes=").split("-")
            first = int(start)
            data, status = data[first : int(last) + 1 if last else None], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if self.served.tagged:
            self.send_header("ETag", f'"{hashlib.md5(whole).hexdigest()}"')
        if status == 206:
            ends = f"bytes {first}-{first + len(data) - 1}/{len(whole)}"
            self.send_header("Content-Range", ends)
        self.end_headers()
        return data

    def _body(self, data: bytes, fault: Fault) -> None:
        served = self.served
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        if fault in ("short", "stall"):
            data = data[: len(data) // 2]
            self.close_connection = True
        with served.lock:
            # Counted before sending: the client may check as soon as it has the last byte.
            served.sent += len(data)
        with contextlib.suppress(OSError):
            if fault == "drip":
                while data and not served.released.wait(0.05):
                    self.wfile.write(data[:1])
                    data = data[1:]
            self.wfile.write(data)
            if fault == "stall":
                self.wfile.flush()
                served.released.wait(60)


@contextlib.contextmanager
def http_server(folder: Path) -> Iterator[Served]:
    """Serve the files of a folder."""
    served = Served("")
    handler = type("Handler", (_Handler,), {"served": served, "folder": folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield served
        finally:
            served.released.set()
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """The endpoint of an empty S3 store (moto's server in a separate process)."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
    endpoint = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + STARTS_S
        while True:
            with contextlib.suppress(OSError):  # not yet
                urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=5).close()
                break
            assert process.poll() is None, "the S3 server ended"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)
        yield endpoint
    finally:
        process.terminate()
        process.wait(20)
