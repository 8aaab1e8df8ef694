"""Where ranks meet: sockets that listen on that address only, and the interfaces that ranks use.

torch's store listens on every interface of its host unless it is given a socket, and
anyone who reaches it can write to it. So the socket is made here.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Iterable, Mapping

import psutil

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ranks import Ranks, is_loopback

_log = logging.getLogger(__name__)

BACKLOG = 2048
"""Ranks that may connect at once."""
GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"

_reserved: dict[tuple[str, int], socket.socket] = {}


def reserve(address: str) -> int:
    """Reserve a free port at ``address`` for this process until ``listen`` takes it over."""
    held = socket.socket()
    held.bind((address, 0))
    port = int(held.getsockname()[1])
    _reserved[address, port] = held
    return port


def listen(ranks: Ranks) -> socket.socket:
    """Rank 0's socket at the rendezvous; the caller owns it.

    A ``master_addr`` that is not an address of this host (a Kubernetes service, a forwarded port)
    can't be bound: then, with a line on stderr, the socket listens on all interfaces as torch's
    would.

    Raises:
        UserError: the port is taken; the address can't be resolved here.
    """  # noqa: DOC501
    address, port = ranks.meeting_address(), ranks.master_port
    held = _reserved.pop((address, port), None)
    if held is not None:
        held.listen(BACKLOG)
        return held
    where = f"MASTER_ADDR={address} MASTER_PORT={port}"
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(
            f"rank 0's address can't be resolved here: {error.strerror}",
            where=where,
            remedy="MASTER_ADDR=an address of rank 0's host that all hosts can resolve",
        ) from None
    # "localhost" may be both; ranks find either, and gloo uses IPv4 more often.
    family, _, _, _, place = min(found, key=lambda one: one[0] != socket.AF_INET)
    try:
        return _listen_at(family, place)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _port_taken(port, where) from None
        if error.errno != errno.EADDRNOTAVAIL:
            raise UserError(
                f"rank 0 can't listen: {error.strerror}", where=where, remedy="another MASTER_PORT"
            ) from None
    _log.warning(
        f"MASTER_ADDR={address} is not an address of rank 0's host, so the ranks' store listens "
        "on all of its interfaces"
    )
    try:
        return _listen_at(family, ("", port))
    except OSError:
        raise _port_taken(port, where) from None


def check_interfaces(backend: str, environ: Mapping[str, str] | None = None) -> None:
    """Check that the interfaces in gloo's or NCCL's variable exist, before a rank waits on them.

    Raises:
        UserError: one doesn't.
    """
    env = os.environ if environ is None else environ
    name = GLOO if backend == "gloo" else NCCL
    wanted = env.get(name, "")
    there = sorted(psutil.net_if_addrs())
    if missing := unknown_interfaces(backend, wanted, there):
        raise UserError(
            f"{name} names no network interface of host {socket.gethostname()}: "
            f"{', '.join(missing)}",
            where=f"{name}={wanted}",
            remedy=f"unset {name}, or give one of: {', '.join(there)}",
        )


def unknown_interfaces(backend: str, wanted: str, there: Iterable[str]) -> list[str]:
    """Names in a list like gloo's (exact) or NCCL's (prefixes, ``=exact``, ``^all but``) that match nothing."""
    there = list(there)
    if backend != "gloo" and wanted.startswith("^"):
        return []
    exact = backend == "gloo" or wanted.startswith("=")
    names = [name.strip() for name in wanted.removeprefix("=").split(",") if name.strip()]
    if backend != "gloo":
        names = [name.partition(":")[0] for name in names]
    found = [any(one == name if exact else one.startswith(name) for one in there) for name in names]
    if not exact:  # NCCL uses those of several that exist
        return [] if any(found) else names
    return [name for name, known in zip(names, found, strict=True) if not known]


def interface_facing(ranks: Ranks) -> str | None:
    """Name of the interface that faces rank 0; None if it can't be determined.

    gloo would use the one that the host's name resolves to: often 127.0.1.1, or none.
    """
    if is_loopback(ranks.master_addr):
        own = "127.0.0.1"
    else:
        try:
            own = ranks.own_address()
        except UserError:
            return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            return name
    return None


def _listen_at(family: int, place: tuple[object, ...]) -> socket.socket:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def _port_taken(port: int, where: str) -> UserError:
    return UserError(
        f"port {port}, the ranks' rendezvous, is in use by another process on this host",
        where=where,
        remedy="another port for all ranks: MASTER_PORT=29501, or the launcher's --master_port 29501",
    )
