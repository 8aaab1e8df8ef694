"""Checks of every request: host, rate, size, time; every response gets its headers and is counted."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cnn2gnn_dist.serving.limits import Body, Limits, RateLimit, Refused, check_host
from cnn2gnn_dist.serving.metrics import Metrics

_log = logging.getLogger(__name__)

_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        b"img-src 'self' blob: data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    ),
]
UNTIL = "until"
"""Name in a request's state: the end of its time (``limits.Body``), which began with its headers."""
_UNLIMITED = re.compile(r"/healthz|/metrics|/static/.*|/memory/[^/]*/thumbnail")
"""Paths that a page or a probe requests often, and that cost little; GET only."""
CLOSED = 499
"""Status in the metrics of a request whose client went away before the end of its body: it gets no answer."""


def error_response(status: int, what: str, remedy: str, headers: Any = None) -> JSONResponse:
    """An error as every endpoint reports it."""
    return JSONResponse({"error": what, "remedy": remedy}, status, headers)


class Guard:
    """ASGI middleware around the whole app.

    Args:
        app: the app that it guards.
        limits, metrics: see there.
        hosts: host names that the server accepts; None: any.
    """

    def __init__(
        self, app: ASGIApp, limits: Limits, metrics: Metrics, hosts: frozenset[str] | None
    ) -> None:
        self.app, self.limits, self.metrics, self.hosts = app, limits, metrics, hosts
        self._rate = RateLimit(limits.rate, limits.burst)
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; websockets are not supported."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = time.monotonic()
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            await self._guarded(scope, receive, answer)
        except ClientDisconnect:
            status = status or CLOSED
        except Exception:
            if status:
                raise  # too late for another response; the server closes the connection
            _log.exception("%s %s failed", scope["method"], scope["path"])
            response = error_response(500, "internal error", "see the server's log")
            await response(scope, receive, answer)
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, _method(scope), str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.monotonic() - start)

    async def _guarded(self, scope: Scope, receive: Receive, answer: Send) -> None:
        try:
            headers = dict(scope["headers"])
            check_host(headers.get(b"host", b""), self.hosts)
            self._check_load(scope)
            body = Body(receive, headers, self.limits)
        except Refused as refused:
            response = error_response(refused.status, refused.what, refused.remedy, refused.headers)
            await response(scope, receive, answer)
        else:
            scope.setdefault("state", {})[UNTIL] = body.until
            await self.app(scope, body, answer)

    def _check_load(self, scope: Scope) -> None:
        if scope["method"] == "GET" and _UNLIMITED.fullmatch(scope["path"]):
            return
        if self._in_flight > self.limits.requests:
            raise Refused(
                503, f"{self._in_flight - 1} requests are already in progress", "ask again in a moment",
                {"Retry-After": "1"},
            )  # fmt: skip
        client = scope.get("client")
        if wait := self._rate.wait(client[0] if client else ""):
            raise Refused(
                429, f"more than {self.limits.rate:g} requests per second from this address",
                f"wait {wait:.1f} s", {"Retry-After": str(int(wait) + 1)},
            )  # fmt: skip


def _method(scope: Scope) -> str:
    known = ("GET", "HEAD", "POST", "DELETE", "OPTIONS", "PUT", "PATCH")
    return scope["method"] if scope["method"] in known else "other"
