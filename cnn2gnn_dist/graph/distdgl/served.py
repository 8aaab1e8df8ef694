"""The graph and the bank held by DistDGL's servers, seen from a rank: ``graph.sampling.sampler=distdgl``.

Each rank owns one partition and one machine (``runtime/supervisor.py``): a server that holds the
partition's rows of the graph and of the bank, and a client that queries all servers on the rank's
behalf. The rank itself neither imports DGL nor depends on its processes: it queries its client over
a private socket, with a timeout, and if either process exits or stops responding it raises
``PeerLost``. (DGL itself waits forever: docs/distdgl.md.) These processes hold nothing that training
needs to resume: the bank and the graph are rebuilt from the version on disk.

Local ids equal global ids here.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist import log
from cnn2gnn_dist.errors import PeerLost, UserError
from cnn2gnn_dist.graph.sampler import sample_key
from cnn2gnn_dist.runtime.supervisor import Spec, SupervisedProcesses

START_SECONDS = 300.0
"""Minimum time for servers and clients to find each other: each imports DGL first, and it sleeps 3 s at a time."""
NOTICE_SECONDS = 2.0
"""Time for a rank to notice by itself that its server or client has exited."""
ABORTED = "client was killed by signal 6"
"""How DGL's client exits when it sends a request to a server that is gone (its thread for sending ends in abort)."""
GRAPH_NAME = "knn"
PACKAGE_PARENT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Task:
    """Task of a machine's server and client.

    Attributes:
        version: folder of the graph version.
        part: the partition of this machine.
        folder: for DGL's files of the partition.
        addresses: host and port of every partition's server.
        seed: seed of the server's random stream.
    """

    version: str
    part: int
    folder: str
    addresses: Sequence[tuple[str, int]]
    seed: int

    @property
    def config(self) -> Path:
        """Path of DGL's description of the partitions."""
        return Path(self.folder) / f"{GRAPH_NAME}.json"

    @property
    def ip_config(self) -> Path:
        """Path of DGL's list of servers."""
        return Path(self.folder) / "servers.txt"

    def environment(self, role: str) -> dict[str, str]:
        """The environment variables by which DGL identifies a process."""
        path = [str(PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
        return {
            "PYTHONPATH": os.pathsep.join(path),
            "OMP_NUM_THREADS": "1",
            "DGLBACKEND": "pytorch",
            "DGL_DIST_MODE": "distributed",
            "DGL_ROLE": role,
            "DGL_SERVER_ID": str(self.part),
            "DGL_IP_CONFIG": str(self.ip_config),
            "DGL_NUM_SERVER": "1",
            "DGL_NUM_SAMPLER": "0",
            "DGL_NUM_CLIENT": str(len(self.addresses)),
            "DGL_CONF_PATH": str(self.config),
            "DGL_GRAPH_FORMAT": "csc",
        }

    @classmethod
    def from_argument(cls, text: str) -> Task:
        """Parse the task from a command-line argument."""
        return cls(**json.loads(text))


class ServedGraph:
    """Sampler and ``Rows`` in one: the servers' graph, through this rank's client, after ``connect``.

    Args:
        task: the task of this rank's machine; the same addresses on every rank.
        inner: global ids of the partition, ascending: this rank's seed nodes.
        num_nodes: of the complete graph.
        isolated: give the machine its own shared memory (needed by ranks that share a host).
        timeout_s: for one answer.

    Raises:
        UserError: the kernel refuses a mount namespace.
    """

    def __init__(
        self, task: Task, inner: np.ndarray, num_nodes: int, *, isolated: bool, timeout_s: float
    ) -> None:
        self.part, self.num_rows, self.timeout_s = task.part, num_nodes, timeout_s
        self._seed, self._inner = task.seed, inner
        self.log = Path(task.folder) / "log.txt"
        shutil.rmtree(task.folder, ignore_errors=True)
        Path(task.folder).mkdir(parents=True)
        lines = "".join(f"{host} {port}\n" for host, port in task.addresses)
        task.ip_config.write_text(lines, encoding="ascii")
        own, clients = socket.socketpair()
        with clients:
            self._machine = SupervisedProcesses(_spec(task, isolated, clients.fileno(), self.log))
        self._line = Connection(own.detach())
        if not self._machine.started():
            self._line.close()
            raise UserError(
                "this kernel refuses the mount namespace that DGL's servers need here",
                where="graph.sampling.sampler=distdgl",
                remedy="run as root, allow user namespaces, or set graph.sampling.sampler=table",
            )
        self._ended, self._noticed = threading.Event(), threading.Event()
        self._how = ""
        threading.Thread(target=self._watch, name="distdgl-watch", daemon=True).start()

    def connect(self) -> None:
        """Wait until all servers and clients have found each other: those of all ranks must have been started.

        Raises:
            PeerLost: one did not in time.
        """
        self._answer(max(self.timeout_s, START_SECONDS))

    @property
    def processes(self) -> dict[str, int]:
        """Process ids of ``server`` and ``client``."""
        return self._machine.processes

    def neighbours(
        self, rows: np.ndarray, fanout: int, *, epoch: int, step: int, hop: int, rank: int
    ) -> np.ndarray:
        """See ``Sampler``. The sample is not reproducible: servers draw in the order of requests."""
        distinct, place = np.unique(np.asarray(rows, np.int64), return_inverse=True)
        key = sample_key(self._seed, epoch, step, hop, rank) & 0x7FFFFFFF
        return self._ask("neighbours", distinct, fanout, key)[place]

    def local_of(self, ids: np.ndarray) -> np.ndarray:
        """See ``Rows``."""
        place = np.searchsorted(self._inner, ids)
        if (place >= len(self._inner)).any() or (self._inner[place] != ids).any():
            raise KeyError("a seed node is outside the partition of this rank")
        return np.asarray(ids, np.int64)

    def global_of(self, local: np.ndarray) -> np.ndarray:
        """See ``Rows``."""
        return local

    def rows(self, local_V: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """See ``Rows``; pulled from the servers' DistTensors."""
        x, z, labels = self._ask("rows", np.asarray(local_V, np.int64))
        return torch.from_numpy(x), torch.from_numpy(z), torch.from_numpy(labels)

    def close(self) -> None:
        """Stop the server and the client; call only when no rank sends requests any more."""
        self._noticed.set()
        self._line.close()
        self._machine.end()

    def _ask(self, *request: Any) -> Any:
        try:
            self._line.send(request)
        except OSError:
            raise self._lost() from None
        return self._answer(self.timeout_s)

    def _answer(self, seconds: float) -> Any:
        try:
            if not self._line.poll(seconds):
                raise self._lost(f"the client did not answer within {seconds:.0f} s")
            kind, value = self._line.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if kind == "error":
            self.close()  # otherwise the watcher takes its end for a lost peer
            raise RuntimeError(f"DistDGL's client of partition {self.part}: {value}")
        return value

    def _lost(self, silent: str = "") -> PeerLost:
        self._noticed.set()
        self._line.close()
        if not silent:
            self._ended.wait()  # a process that closes the socket has exited or is about to
        self._machine.end()
        if self._how == ABORTED and not silent:
            time.sleep(2 * NOTICE_SECONDS)  # the rank whose server is gone reports first
            return self._error(f"{ABORTED}: a server that it queried is gone; see the other ranks")
        return self._error(silent or self._how)

    def _error(self, what: str) -> PeerLost:
        return PeerLost(
            f"DistDGL was lost at partition {self.part}: {what}",
            where=str(self.log),
            remedy="run the same command again to resume",
        )

    def _watch(self) -> None:
        """Exit if the server or client has exited while this process sends no request and so can't notice.

        The process may be waiting in a collective for a rank that waits for the lost server, and only
        its exit would wake that rank.
        """
        self._how = self._machine.first_exit()
        self._ended.set()
        if not self._noticed.wait(NOTICE_SECONDS):
            log.report_error(self._error(self._how))
            os._exit(PeerLost.exit_code)


def _spec(task: Task, isolated: bool, line: int, log: Path) -> Spec:
    argument = json.dumps(asdict(task))
    package = __name__.rpartition(".")[0]
    return Spec(
        commands={
            "server": [sys.executable, "-m", f"{package}.server", argument],
            "client": [sys.executable, "-m", f"{package}.client", argument, str(line)],
        },
        environment={role: task.environment(role) for role in ("server", "client")},
        isolated=isolated,
        files={"client": [line]},
        log=str(log),
    )
