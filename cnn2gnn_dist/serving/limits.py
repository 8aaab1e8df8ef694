"""Limits for clients: sizes, pixels, rate, time, and who may edit the memory."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cnn2gnn_dist.data.images.decode import CorruptSample, image_size

ADDRESSES = 10_000
"""Number of client addresses whose rates are remembered."""


@dataclass(frozen=True)
class Limits:
    """Bounds of a request and of the server.

    Attributes:
        body_bytes: per request.
        images: per request.
        pixels: height x width of an image, to be classified or to be added to the memory.
        rate: requests per second from one client address, on average; 0 = unlimited.
        burst: requests from one address that may arrive at once.
        seconds: from the headers of a request to its answer; of an edit: to the end of its body.
        edit_seconds: from the end of its body to the answer to an edit of the memory.
        requests: number being read or answered at a time; memory is bounded by this times ``body_bytes``.
        waiting: images waiting for the network; at least ``images``, or the largest request would never be answered.
    """

    body_bytes: int = 16 << 20
    images: int = 64
    pixels: int = 50_000_000
    rate: float = 100.0
    burst: int = 200
    seconds: float = 30.0
    edit_seconds: float = 300.0
    requests: int = 128
    waiting: int = 2048

    def __post_init__(self) -> None:
        object.__setattr__(self, "waiting", max(self.waiting, self.images))


class Refused(Exception):
    """A request that is refused, for a reason that its sender can change.

    Args:
        status: of the response.
        what: what is wrong.
        remedy: what to do about it.
        headers: further headers of the response.
    """

    def __init__(
        self, status: int, what: str, remedy: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(what)
        self.status, self.what, self.remedy = status, what, remedy
        self.headers = dict(headers or {})


class RateLimit:
    """A token bucket for each client address.

    Args:
        rate: tokens per second; 0 = unlimited.
        burst: tokens in a full bucket.
    """

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, float(burst)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, address: str, now: float | None = None) -> float:
        """Take a token; returns 0, or the seconds until one is available."""
        if not self.rate:
            return 0.0
        now = time.monotonic() if now is None else now
        tokens, then = self._buckets.pop(address, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.rate)
        wait = 0.0 if tokens >= 1 else (1 - tokens) / self.rate
        self._buckets[address] = (tokens - (not wait), now)
        if len(self._buckets) > ADDRESSES:
            self._buckets.popitem(last=False)
        return wait


class Body:
    """An ASGI ``receive`` that refuses a body that is too long or too slow.

    Args:
        receive: of the server.
        headers: of the request, lower-case names.
        limits: see ``Limits``.

    Attributes:
        until: end of the request's time, for ``seconds_until``.
    """

    def __init__(self, receive: Any, headers: Mapping[bytes, bytes], limits: Limits) -> None:
        self._receive, self._limits = receive, limits
        self._left = limits.body_bytes
        self.until = time.monotonic() + limits.seconds
        self._ended = False
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limits.body_bytes:
            raise self._too_long()

    async def __call__(self) -> Any:
        """Receive the next message.

        Raises:
            Refused: too long (413) or too slow (408).
        """
        if self._ended:  # the next message is the disconnect, which may come much later
            return await self._receive()
        try:
            async with asyncio.timeout(seconds_until(self.until)):
                message = await self._receive()
        except TimeoutError:
            raise Refused(
                408,
                f"the request did not arrive within {self._limits.seconds:g} s",
                "send fewer or smaller images",
                {"Connection": "close"},
            ) from None
        self._left -= len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._left < 0:
            raise self._too_long()
        return message

    def _too_long(self) -> Refused:
        return Refused(
            413,
            f"the request has more than {self._limits.body_bytes:,} bytes",
            "send fewer or smaller images",
            {"Connection": "close"},
        )


def seconds_until(until: float) -> float:
    """Seconds that are left of a request's time, at least 0."""
    return max(0.0, until - time.monotonic())


def pixels_error(data: bytes, limits: Limits) -> str | None:
    """Why an image is not decoded (too many pixels, or none), from its header."""
    try:
        high, wide = image_size(data)
    except CorruptSample as error:
        return str(error)
    if high * wide > limits.pixels:
        return f"{wide} x {high} pixels, more than {limits.pixels:,}"
    return None


def check_token(given: str | None, token: str | None) -> None:
    """Check that a request may edit the memory.

    Args:
        given: its ``Authorization`` header.
        token: of the server; None: nobody may edit.

    Raises:
        Refused: 403 if the server has no token, 401 if the request's is missing or wrong.
    """
    if token is None:
        raise Refused(
            403,
            "this server does not allow edits of its memory: it was started without a token",
            "start it with --token-file FILE or with CNN2GNN_TOKEN set",
        )
    scheme, _, value = (given or "").partition(" ")
    right = hmac.compare_digest(value.strip().encode("utf-8", "replace"), token.encode())
    if scheme.lower() != "bearer" or not right:
        raise Refused(
            401,
            "edits need the server's token" if not given else "this token is wrong",
            "send the header `Authorization: Bearer TOKEN`",
            {"WWW-Authenticate": "Bearer"},
        )


def check_host(host: bytes, allowed: frozenset[str] | None) -> None:
    """Refuse a request sent to another name, such as from a foreign page whose name now resolves to this server.

    Args:
        host: the ``Host`` header.
        allowed: names; None: any.

    Raises:
        Refused: it is not among them.
    """
    if allowed is None:
        return
    name = host.decode("latin-1").lower()
    name = name[: name.index("]") + 1] if name.startswith("[") and "]" in name else name
    name = name if name.startswith("[") else name.partition(":")[0]
    if name not in allowed:
        raise Refused(
            421,
            "this server does not accept this host name",
            "use http://127.0.0.1, or start the server with --allow-host NAME",
        )
