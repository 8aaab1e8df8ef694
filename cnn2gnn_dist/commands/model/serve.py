"""``cnn2gnn serve``: a model behind HTTP, with a page to try it."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.log import output
from cnn2gnn_dist.serving import token

if TYPE_CHECKING:
    import uvicorn

_log = logging.getLogger(__name__)

LOCAL_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
PATIENCE_SECONDS = 60
"""How long a stopping server waits for the requests that it has accepted."""
BACKLOG = 2048


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn serve``."""
    parser.description = (
        "Answer over HTTP: /predict, /memory, /healthz, /metrics, /openapi.json, and a page at /."
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a model or of a finished run")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default %(default)s"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one; default 8000")
    parser.add_argument(
        "--public", action="store_true",
        help="listen on an address that other machines can reach: anyone there can query the "
        "model and see the pictures in its memory, unencrypted",
    )  # fmt: skip
    parser.add_argument(
        "--token-file", metavar="FILE",
        help=f"file whose first line is the token that edits of the memory require; or set {token.VARIABLE}. "
        "Without a token, editing is disabled",
    )  # fmt: skip
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="also accept requests for this host name (behind a proxy)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default auto")
    for name, kind, default, text in (
        ("--max-upload-mb", float, 16.0, "megabytes per request"),
        ("--max-images", int, 64, "images per request"),
        ("--max-megapixels", float, 50.0, "megapixels per image"),
        ("--rate", float, 100.0, "requests per second from one address; 0 = unlimited"),
        ("--timeout", float, 30.0, "seconds from a request to its answer"),
    ):
        parser.add_argument(
            name, type=kind, default=default, metavar="N", help=f"{text}; default %(default)g"
        )
    parser.set_defaults(command=command)


def command(given: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; accepted requests are answered first.

    Raises:
        UserError: not a model, no permission to listen, a port in use, a bad token or option.
    """
    hosts = _hosts(given.host, given.public, given.allow_host)
    secret = token.read_token(given.token_file)
    _check_numbers(given)
    try:
        from uvicorn import Config, Server

        from cnn2gnn_dist.serving.app import create_app
        from cnn2gnn_dist.serving.limits import Limits
        from cnn2gnn_dist.serving.service import Service
    except ModuleNotFoundError as error:
        raise UserError(
            f"serving needs {error.name}, which is not installed",
            remedy='pip install "cnn2gnn-dist[serve]"',
        ) from None
    from cnn2gnn_dist.commands.model.opening import opened

    limits = Limits(
        body_bytes=int(given.max_upload_mb * 1e6),
        images=given.max_images,
        pixels=int(given.max_megapixels * 1e6),
        rate=given.rate,
        burst=max(1, round(2 * given.rate)),
        seconds=given.timeout,
    )
    listening = _bound(given.host, given.port)
    edited = secret is not None
    with listening, opened(Path(given.model), given.device, edited=edited) as model:
        # It warns about every malformed form; the client gets that error as its answer.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        service = Service.batching(model, limits=limits, token=secret)
        config = Config(
            create_app(service, hosts=hosts),
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # otherwise a client could claim any address
            ws="none",
            timeout_graceful_shutdown=PATIENCE_SECONDS,
            limit_concurrency=8 * limits.requests,  # connections, idle ones included
        )
        if secret is None:
            _log.info("no token: the memory can't be edited (--token-file, %s)", token.VARIABLE)
        listening.listen(BACKLOG)  # whoever reads the next line can connect at once
        host, port = listening.getsockname()[:2]
        output(f"serving  http://{f'[{host}]' if ':' in host else host}:{port}/  (Ctrl-C stops it)")
        _until_signal(Server(config), listening)
    return 0


def _hosts(host: str, public: bool, more: list[str]) -> frozenset[str] | None:
    """Host names that the server accepts: its own on loopback, any if it is public."""
    if _is_loopback(host):
        return LOCAL_NAMES | {name.lower() for name in more} | {host.lower()}
    if not public:
        raise UserError(
            f"{host} can be reached from other machines: anyone there can query the model and "
            "see the pictures in its memory, and nothing is encrypted",
            where="--host",
            remedy="--host 127.0.0.1 (behind a proxy with TLS), or add --public if that is intended",
        )
    _log.warning(
        f"listening on {host}: anyone who can reach it can query the model and see the pictures in its "
        "memory, and nothing is encrypted, the token for edits included"
    )
    return frozenset(name.lower() for name in more) or None


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_numbers(given: argparse.Namespace) -> None:
    for name in ("max_upload_mb", "max_images", "max_megapixels", "timeout"):
        if not 0 < getattr(given, name) < 1e6:
            raise UserError(
                f"{getattr(given, name):g} is not a valid limit",
                where=f"--{name.replace('_', '-')}",
                remedy="give a number above 0",
            )
    if not 0 <= given.rate < 1e9:
        raise UserError(f"{given.rate:g} is not a rate", where="--rate", remedy="0 or more")
    if not 0 <= given.port < 65536:
        raise UserError(f"there is no port {given.port}", where="--port", remedy="0 … 65535")


def _bound(host: str, port: int) -> socket.socket:
    """Take the port before the model is opened: one in use is reported at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as error:
        raise UserError(
            f"can't listen on {host}, port {port}: {error.strerror or error}",
            where="--host, --port",
            remedy="--port 0 picks a free one",
        ) from None
    return listening


def _until_signal(server: uvicorn.Server, listening: socket.socket) -> None:
    """Run the server; SIGINT and SIGTERM shut it down cleanly, and this command exits with 0."""
    # After its shutdown uvicorn raises the signal again, for the handler installed before its own.
    before = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if not server.started:
        raise UserError("the server could not start", remedy="see the lines above")


def _nothing(*_: object) -> None:
    pass
