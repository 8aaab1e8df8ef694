"""A rank's side of DGL's servers, without DGL."""

from __future__ import annotations

import socket
import threading
from multiprocessing.connection import Connection

import pytest

from cnn2gnn_dist.graph.distdgl.served import ServedGraph
from cnn2gnn_dist.runtime.supervisor import Spec, SupervisedProcesses


def test_an_error_of_the_client_is_not_taken_for_a_lost_peer():
    """The client exits after its error; the watcher must not end this process before it is reported."""
    served = ServedGraph.__new__(ServedGraph)
    served.part = 3
    served._ended, served._noticed = threading.Event(), threading.Event()
    served._machine = SupervisedProcesses(Spec(isolated=False))
    assert served._machine.started()
    own, clients = socket.socketpair()
    served._line = Connection(own.detach())
    with Connection(clients.detach()) as client:
        client.send(("error", "KeyError('x')"))
    with pytest.raises(RuntimeError, match=r"client of partition 3: KeyError"):
        served._answer(60.0)
    assert served._noticed.is_set()
    assert served._machine.first_exit()
