"""Limits: who may send what, how much and how often."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cnn2gnn_dist.serving import limits
from cnn2gnn_dist.serving.limits import Body, Limits, RateLimit, Refused
from tests.support.bombs import all_bombs, saved


def test_a_rate_is_kept_on_average_and_a_burst_is_let_through():
    rate = RateLimit(rate=2.0, burst=3)
    assert [rate.wait("a", now=0.0) for _ in range(3)] == [0, 0, 0]
    assert rate.wait("a", now=0.0) == pytest.approx(0.5)
    assert rate.wait("b", now=0.0) == 0, "addresses do not share"
    assert rate.wait("a", now=0.5) == 0
    assert rate.wait("a", now=0.5) > 0


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60), st.floats(0.5, 20), st.integers(1, 9))
def test_never_more_than_burst_and_rate(gaps: list[float], rate: float, burst: int):
    limit, now, passed = RateLimit(rate, burst), 0.0, 0
    for gap in gaps:
        now += gap
        passed += limit.wait("a", now) == 0
    assert passed <= burst + rate * (now - gaps[0]) + 1e-6


def test_old_addresses_are_dropped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "ADDRESSES", 3)
    rate = RateLimit(1.0, 1)
    for address in "abcd":
        rate.wait(address, now=0.0)
    assert rate.wait("a", now=0.0) == 0, "forgotten, hence with a full bucket"
    assert rate.wait("d", now=0.0) > 0


def test_unlimited():
    rate = RateLimit(0.0, 1)
    assert not any(rate.wait("a", now=0.0) for _ in range(1000))


@pytest.mark.parametrize(
    ("given_", "status"),
    [
        (None, 401),
        ("Bearer", 401),
        ("Bearer wrong", 401),
        ("Basic right-right-right", 401),
        ("Bearer rîght", 401),
        ("bearer right-right-right", None),
        ("Bearer right-right-right", None),
    ],
)
def test_tokens(given_: str | None, status: int | None):
    if status is None:
        limits.check_token(given_, "right-right-right")
        return
    with pytest.raises(Refused) as refused:
        limits.check_token(given_, "right-right-right")
    assert refused.value.status == status


def test_without_a_token_nobody_edits():
    with pytest.raises(Refused, match="without a token") as refused:
        limits.check_token("Bearer x", None)
    assert refused.value.status == 403


@pytest.mark.parametrize(
    ("host", "fine"),
    [
        (b"localhost:8000", True),
        (b"LOCALHOST", True),
        (b"127.0.0.1:1", True),
        (b"[::1]:8000", True),
        (b"[::1", False),
        (b"evil.example:8000", False),
        (b"", False),
    ],
)
def test_other_hosts_are_refused(host: bytes, fine: bool):
    allowed = frozenset({"localhost", "127.0.0.1", "[::1]"})
    if fine:
        limits.check_host(host, allowed)
    else:
        with pytest.raises(Refused) as refused:
            limits.check_host(host, allowed)
        assert refused.value.status == 421
    limits.check_host(host, None)


def test_pixels_are_counted_before_anything_is_decoded():
    assert limits.pixels_error(saved("PNG", 24, 24), Limits(pixels=576)) is None
    assert "24 x 24 pixels, more than 575" in str(
        limits.pixels_error(saved("PNG", 24, 24), Limits(pixels=575))
    )


@pytest.mark.parametrize("name", ["png, size", "webp, canvas", "jpeg, size", "gif, screen"])
def test_bombs_are_refused_by_their_header(name: str):
    assert limits.pixels_error(all_bombs()[name], Limits()) is not None


def received(messages: list[dict], allowed: Limits, declared: bytes | None = None) -> list[dict]:
    """The messages of a body that reach the app."""

    async def run() -> list[dict]:
        queue = iter(messages)

        async def receive() -> dict:
            for message in queue:
                return message
            await asyncio.Event().wait()  # no more messages
            raise AssertionError

        body = Body(receive, {b"content-length": declared} if declared else {}, allowed)
        return [await body() for _ in range(len(messages) or 1)]

    return asyncio.run(run())


def piece(size: int, more: bool) -> dict:
    return {"type": "http.request", "body": bytes(size), "more_body": more}


def test_bodies_within_the_limit_pass():
    messages = [piece(4, True), piece(6, False), {"type": "http.disconnect"}]
    assert received(messages, Limits(body_bytes=10)) == messages


def test_bodies_that_are_too_long():
    with pytest.raises(Refused) as refused:
        received([piece(6, True), piece(6, True)], Limits(body_bytes=10))
    assert refused.value.status == 413
    with pytest.raises(Refused) as refused:
        received([], Limits(body_bytes=10), declared=b"11")
    assert refused.value.status == 413


def test_bodies_that_do_not_come():
    with pytest.raises(Refused) as refused:
        received([], Limits(seconds=0.01))
    assert refused.value.status == 408
