"""Probe, before Ray is used, whether a Ray cluster answers at an address and how to authenticate.

Ray itself tries a dead address for ten minutes, and mistakes a refused token for a dead
address. Nothing here needs Ray, so the probe can run before Ray is imported.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from cnn2gnn_dist.errors import UserError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 15.0
"""A head under load may be slow."""
DEFAULT_PORT = 6379
MODE = "RAY_AUTH_MODE"
PROBE_CALL = "/ray.rpc.NodeInfoGcsService/GetClusterId"
"""A call that changes nothing; its request is empty."""
CANNOT_PROBE = ("RAY_USE_TLS", "RAY_ENABLE_K8S_TOKEN_AUTH")


def cluster_mode(address: str, where: str) -> str | None:
    """How Ray must authenticate to the cluster at ``host:port``: "token" or "disabled".

    None: it can't be told from outside (TLS, Kubernetes tokens), and the environment decides.

    Args:
        address: of the cluster's head node.
        where: the setting that named it, for messages.

    Raises:
        UserError: nothing answers within seconds, what answers is not a Ray cluster, or it demands
            a token that is missing here.
    """  # noqa: DOC501
    host, port = host_and_port(address, where)
    if failure := _unreachable(host, port):
        raise UserError(
            f"no Ray cluster answers at {host}:{port}: {failure}",
            where=where,
            remedy=_address_remedy(where),
        )
    if any(os.environ.get(name, "0").lower() in ("1", "true") for name in CANNOT_PROBE):
        return None
    code = _probe(host, port, "")
    if code == "OK":
        return "disabled"
    if code != "UNAUTHENTICATED":
        raise UserError(
            f"what listens at {host}:{port} is not the head of a Ray cluster, or is shutting down ({code})",
            where=where,
            remedy="the address that `ray start --head` printed (port 6379 by default; "
            "8265 is the job server's, 10001 the Ray Client's)",
        )
    what = f"the Ray cluster at {host}:{port}"
    if _probe(host, port, _require_token(what, where)) != "OK":
        raise _token_refused(what, where)
    return "token"


def job_server_mode(url: str, where: str) -> str:
    """The same for a job server at ``http://host:8265``.

    Raises:
        UserError: nothing answers, what answers is not a job server, or it wants another token.
    """  # noqa: DOC501
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise UserError(
            f"a job server's address has the form http://HOST:8265, not {url}",
            where=where,
            remedy="the address that `ray start --head` calls the dashboard's",
        )
    status, said = _http_get(f"{url.rstrip('/')}/api/version", "")
    if status == 401:
        what = f"the job server at {url}"
        status, said = _http_get(f"{url.rstrip('/')}/api/version", _require_token(what, where))
        if status in (401, 403):
            raise _token_refused(what, where)
        if status == 200:
            return "token"
    if status != 200:
        raise UserError(
            f"no job server answers at {url}: {said}",
            where=where,
            remedy="`ray start --head`, or fix --address",
        )
    return "disabled"


def _require_token(what: str, where: str) -> str:
    """This user's token, which ``what`` demands."""
    own = own_token()
    if not own:
        raise UserError(
            f"{what} requires a token, but there is none here",
            where=f"{where}; looked for in {token_source()}",
            remedy=_token_remedy(),
        )
    return own


def _token_refused(what: str, where: str) -> UserError:
    return UserError(
        f"{what} rejects this user's token: it was started with a different one",
        where=f"{where}; token from {token_source()}",
        remedy=_token_remedy(),
    )


def own_token(environ: Mapping[str, str] | None = None) -> str:
    """This user's token, from where Ray reads it; "" if there is none."""
    env = os.environ if environ is None else environ
    if token := env.get("RAY_AUTH_TOKEN", "").strip():
        return token
    try:
        return _token_file(env).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def token_source(environ: Mapping[str, str] | None = None) -> str:
    """Where ``own_token`` looks, for messages."""
    env = os.environ if environ is None else environ
    return "RAY_AUTH_TOKEN" if env.get("RAY_AUTH_TOKEN") else str(_token_file(env))


def _token_file(env: Mapping[str, str]) -> Path:
    named = env.get("RAY_AUTH_TOKEN_PATH", "").strip()
    return Path(named) if named else Path(env.get("HOME", "/"), ".ray", "auth_token")


def host_and_port(address: str, where: str) -> tuple[str, int]:
    """Host and port of ``host``, ``host:port`` or ``[v6]:port``.

    Raises:
        UserError: a URL, or a port that is not a number.
    """
    wrong = UserError(
        f"a Ray cluster's address has the form HOST:6379, not {address}",
        where=where,
        remedy="the address that `ray start --head` printed"
        + ("; http://… is the job server's, for launch/submit.py" * address.startswith("http")),
    )
    if "://" in address:
        raise wrong
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port or DEFAULT_PORT
    except ValueError:
        raise wrong from None
    if not host:
        raise wrong
    return host, port


def bypass_proxies(url: str) -> None:
    """Bypass any proxy that the environment names for requests to this machine itself."""
    host = urlsplit(url).hostname or ""
    if _is_loopback(host):
        for name in ("no_proxy", "NO_PROXY"):
            os.environ[name] = ",".join(filter(None, [os.environ.get(name), host]))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _unreachable(host: str, port: int) -> str:
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except TimeoutError:
        return f"not within {CONNECT_SECONDS:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _probe(host: str, port: int, token: str) -> str:
    """gRPC's status code of the probe call to a head node."""
    import grpc

    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    said = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(PROBE_CALL)(b"", timeout=ANSWER_SECONDS, metadata=said)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "OK"


def _http_get(url: str, token: str) -> tuple[int, str]:
    """HTTP status and reason; status 0 if there is no answer."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    loopback = _is_loopback(urlsplit(url).hostname or "")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if loopback else []))
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=ANSWER_SECONDS) as a:
            return a.status, a.reason
    except urllib.error.HTTPError as error:
        return error.code, f"HTTP {error.code} {error.reason}"
    except urllib.error.URLError as error:
        reason = error.reason
        return 0, getattr(reason, "strerror", None) or str(reason)
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error) or type(error).__name__


def _token_remedy() -> str:
    """What to do about a missing or wrong token; a variable would take precedence over the file."""
    named = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    first = f"unset {' '.join(named)}, and " if named else ""
    return (
        f"{first}save what `ray get-auth-token` prints on the cluster's head as ~/.ray/auth_token"
    )


def _address_remedy(where: str) -> str:
    if where.startswith("RAY_ADDRESS"):
        return (
            "`unset RAY_ADDRESS` (Ray is then started here), or start the cluster at that address"
        )
    return "start one (`ray start --head`), fix the address, or leave it null"
