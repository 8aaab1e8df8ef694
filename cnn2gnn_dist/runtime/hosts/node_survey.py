"""A node's properties and how well it reaches its peers: each node answers, one compares.

Neither Ray nor torch is needed here: ``commands/doctor/cluster.py`` asks the nodes over either.
"""

from __future__ import annotations

import contextlib
import hmac
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cnn2gnn_dist.runtime import bounded_wait
from cnn2gnn_dist.runtime.hosts import allotted, host_checks

PACKAGES = ("torch", "deepspeed", "ray", "dgl", "numpy", "pyarrow", "timm")
GIB, MIB = 2**30, 2**20
SENT = 32 * MIB
"""Bytes that a node fetches from a peer to measure the bandwidth."""
PINGS = 8
PEER_SECONDS = 10.0
LEAST_SHARED_MEMORY, LEAST_DISK, LEAST_MEMORY = 1 * GIB, 5 * GIB, 2 * GIB
MOST_OFFSET_S = 1.0
"""Most seconds between two clocks: times of files and logs are compared across hosts."""
LEAST_RATE = 12 * MIB
"""Least bytes per second: a network of 100 Mbit/s."""


@dataclass
class Node:
    """What one node reports about itself.

    Attributes:
        host, address, interface: its name, its address towards the peers, and that address's interface.
        versions: of Python, this package and those of ``PACKAGES``; "" for what is missing.
        gpus: names.
        cores: those that a process may use.
        memory, shared_memory, disk: free bytes; the disk's in the shared folder.
        shared: "" if the node sees what the first has written into the shared folder; else what is wrong.
        offset_s: its clock minus the first node's, seconds.
        rate: bytes per second from the next node.
        unreachable: the address of the peer that it could not reach, and why; "" if it could.
    """

    host: str = ""
    address: str = ""
    interface: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)
    cores: int = 0
    memory: int = 0
    shared_memory: int = 0
    disk: int = 0
    shared: str = ""
    offset_s: float = 0.0
    rate: float = 0.0
    unreachable: str = ""


def look(address: str, folder: str | None) -> Node:
    """This node, as seen by itself."""
    interfaces = psutil.net_if_addrs()
    named = (n for n, found in interfaces.items() if any(one.address == address for one in found))
    shared_memory = Path("/dev/shm")
    node = Node(
        host=socket.gethostname(),
        address=address,
        interface=next(named, ""),
        versions={
            "python": platform.python_version(),
            "cnn2gnn": sys.modules["cnn2gnn_dist"].__version__,
        }
        | {name: _version(name) for name in PACKAGES},
        gpus=_gpus(),
        cores=allotted.cores(),
        memory=allotted.available_memory(),
        shared_memory=shutil.disk_usage(shared_memory).free if shared_memory.is_dir() else 0,
    )

    def free() -> str:
        node.disk = _free(folder)
        return ""

    node.shared = _said(free)
    return node


def _said(look: Callable[[], str], seconds: float = 0.0) -> str:
    """What a look at the shared folder says, which may take ``seconds``; or why there is none: the server is gone."""
    limit = seconds + host_checks.ANSWER_S
    try:
        return bounded_wait.result(look, limit, "a look at the shared folder")
    except TimeoutError:
        return f"has not answered for {limit:g} s"
    except OSError as error:
        return f"can't be accessed: {error.strerror}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _gpus() -> list[str]:
    """Names of the GPUs; the driver is asked, because torch takes seconds to import and a GPU's memory."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _free(folder: str | None) -> int:
    path = Path(folder or os.getcwd())
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def write_probe(folder: str) -> tuple[str, str]:
    """On the first node, write a file with a new name for the others to find; its path, or what is wrong."""
    path = Path(folder, f".doctor-{uuid.uuid4().hex}")

    def write() -> str:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("here", encoding="ascii")
        except OSError as error:
            return f"can't be written: {error.strerror}"
        return ""

    wrong = _said(write)
    return "" if wrong else str(path), wrong


def find_probe(path: str, seconds: float = PEER_SECONDS) -> str:
    """Find the first node's file and write another next to it; "" or what is wrong.

    A file server's client may cache for a few seconds that a name is absent.
    """
    return _said(lambda: _find(path, seconds), seconds)


def _find(path: str, seconds: float) -> str:
    deadline = time.monotonic() + seconds
    while not Path(path).exists():
        if time.monotonic() > deadline:
            return "is another folder than on the first node"
        time.sleep(0.1)
    try:
        answer = Path(f"{path}-{uuid.uuid4().hex}")
        answer.write_text("", encoding="ascii")
        answer.unlink()
    except OSError as error:
        return f"can't be written: {error.strerror}"
    return ""


class Peer:
    """A server that sends its clock, and bytes, to those who know the token.

    Args:
        address: of this node; it listens on no other.
        token: shared by all nodes of one survey.
    """

    def __init__(self, address: str, token: str) -> None:
        self._token = token.encode()
        self._server = socket.create_server((address, 0), backlog=128)
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._server.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client:
            client.settimeout(PEER_SECONDS)
            said = _receive(client, len(self._token))
            if not hmac.compare_digest(said, self._token):
                return
            while question := client.recv(1):
                if question == b"t":
                    client.sendall(f"{time.time():32.9f}".encode())
                else:
                    client.sendall(bytes(SENT))

    def close(self) -> None:
        """Stop listening."""
        self._server.close()


def measure(node: Node, token: str, first: tuple[str, int], following: tuple[str, int]) -> None:
    """Fill in the offset of this node's clock to the first node's, and the rate from the next one."""
    place = first
    try:
        with _ask(first, token) as peer:
            node.offset_s = min((_ping(peer) for _ in range(PINGS)), key=lambda one: one[0])[1]
        place = following
        with _ask(following, token) as peer:
            began = time.perf_counter()
            peer.sendall(b"b")
            _receive(peer, SENT)
            node.rate = SENT / (time.perf_counter() - began)
    except OSError as error:
        node.unreachable = f"{place[0]}: {error.strerror or error}"


def _ask(place: tuple[str, int], token: str) -> socket.socket:
    peer = socket.create_connection(place, PEER_SECONDS)
    peer.sendall(token.encode())
    return peer


def _ping(peer: socket.socket) -> tuple[float, float]:
    """Seconds of a round trip, and our clock minus the peer's."""
    before = time.time()
    peer.sendall(b"t")
    theirs = float(_receive(peer, 32))
    after = time.time()
    return after - before, (before + after) / 2 - theirs


def _receive(peer: socket.socket, count: int) -> bytes:
    found = bytearray(count)
    view, have = memoryview(found), 0
    while have < count:
        got = peer.recv_into(view[have:])
        if not got:
            raise ConnectionResetError("it closed the connection")
        have += got
    return bytes(found)


def problems(nodes: Sequence[Node], folder: str | None) -> list[tuple[str, str]]:
    """What keeps these nodes from working together, each with its remedy; the first node is the reference."""
    if not nodes:
        return []
    found = [
        *_version_problems(nodes),
        *_address_problems(nodes),
    ]
    for node in nodes:
        if node.shared:
            found.append(
                (
                    f"{node.host}: {folder or 'the current folder'} {node.shared}",
                    "storage that all nodes mount at this path",
                )
            )
        if node.unreachable:
            found.append(
                (
                    f"{node.host} can't reach {node.unreachable}",
                    "a firewall rule that lets the cluster's nodes reach each other on all ports",
                )
            )
        elif len(nodes) > 1 and node.rate < LEAST_RATE:
            found.append(
                (
                    f"{node.host}: only {node.rate / MIB:.1f} MiB/s from the next node",
                    "another interface: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; or faster links",
                )
            )
        if abs(node.offset_s) > MOST_OFFSET_S:
            found.append(
                (
                    f"{node.host}: its clock is off by {node.offset_s:+.1f} s from {nodes[0].host}'s",
                    "set all clocks by one server (chrony, systemd-timesyncd)",
                )
            )
        for what, bytes_free, least, remedy in (
            (
                "/dev/shm",
                node.shared_memory,
                LEAST_SHARED_MEMORY,
                "a larger one (docker: --shm-size)",
            ),
            ("disk", node.disk, LEAST_DISK, "free some space, or another folder"),
            ("memory", node.memory, LEAST_MEMORY, "fewer ranks on this node, or more memory"),
        ):
            if bytes_free < least:
                text = f"{node.host}: {bytes_free / GIB:.1f} GiB free of {what}"
                found.append((f"{text}, of the {least / GIB:.0f} needed", remedy))
    return found


def _version_problems(nodes: Sequence[Node]) -> list[tuple[str, str]]:
    """Nodes whose versions differ from the first's."""
    first, found = nodes[0], []
    for node in nodes[1:]:
        for name, wanted in first.versions.items():
            have = node.versions.get(name, "")
            if have != wanted:
                text = f"{node.host}: {name} {have or 'is missing'}, but {wanted or 'none'} on {first.host}"
                found.append((text, "the same image or environment on all nodes (constraints.txt)"))
        if len(node.gpus) != len(first.gpus) and node.gpus and first.gpus:
            text = f"{node.host}: {len(node.gpus)} GPUs, but {len(first.gpus)} on {first.host}"
            found.append(
                (
                    text,
                    "ranks fill Ray's nodes as they are; srun and torchrun start equally many on each",
                )
            )
    return found


def _address_problems(nodes: Sequence[Node]) -> list[tuple[str, str]]:
    if len({node.host for node in nodes}) == 1:
        return []
    return [
        (
            f"{node.host}: its address is {node.address}, which no other node can reach",
            "remove its name from the line 127.0.1.1 of /etc/hosts there, or ray start --node-ip-address=…",
        )
        for node in nodes
        if node.address.startswith("127.")
    ]


def table(nodes: Sequence[Node], folder: str | None) -> str:
    """A line for each node, under a header line; ``folder``: that all should share; None: not looked at."""
    first = ("host", "address", "interface", "cnn2gnn", "torch", "GPUs", "cores")
    rows = [[*first, "memory", "/dev/shm", "disk", "shared", "clock", "from next"]]
    for node in nodes:
        versions = [node.versions.get(name) or "-" for name in ("cnn2gnn", "torch")]
        sizes = [f"{n / GIB:.1f} GiB" for n in (node.memory, node.shared_memory, node.disk)]
        kinds = ", ".join(f"{node.gpus.count(one)} {one}" for one in sorted(set(node.gpus)))
        row = [node.host, node.address, node.interface or "-", *versions, kinds or "0"]
        shared = "no" if node.shared else "yes" if folder else "-"
        row += [str(node.cores), *sizes, shared]
        row += [f"{1000 * node.offset_s:+.1f} ms", f"{node.rate / MIB:,.0f} MiB/s"]
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
