"""The limits of the app, as a client meets them: rate, time, pixels."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient

from cnn2gnn_dist.inference import inputs
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.serving import limits
from cnn2gnn_dist.serving.app import create_app
from cnn2gnn_dist.serving.limits import Limits, pixels_error
from cnn2gnn_dist.serving.service import Service
from tests.support.bombs import all_bombs
from tests.support.serving import ALLOWED, LIMITS, client_of, encoded, parts, refused, served_model
from tests.support.shards import encode_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return served_model(tmp_path / "model")


@pytest.fixture
def edited(folder: Path) -> Iterator[TestClient]:
    with client_of(folder) as found:
        yield found


def test_rate(folder: Path):
    slow = Limits(rate=0.001, burst=2)
    with client_of(folder, slow) as client:
        image = parts(encoded(1))
        assert [client.post("/predict", files=image).status_code for _ in range(3)] == [
            200,
            200,
            429,
        ]
        response = client.post("/predict", files=image)
        refused(response, 429)
        assert int(response.headers["retry-after"]) > 1
        assert client.get("/healthz").status_code == 200, "probes go on"


def test_only_cheap_requests_are_not_counted(folder: Path):
    with client_of(folder, Limits(rate=0.001, burst=2)) as client:
        for path in ("/healthz", "/metrics", "/static/page.js", "/memory/3/thumbnail"):
            assert [client.get(path).status_code for _ in range(3)] == [200] * 3
        asked = [client.get("/memory/keys?limit=10000").status_code for _ in range(3)]
        assert asked == [200, 200, 429]
        refused(client.get("/memory/keys/thumbnails"), 429)


def test_the_largest_request_that_is_allowed_is_answered(folder: Path):
    """However few images may wait."""
    with client_of(folder, replace(LIMITS, images=9, waiting=5)) as client:
        assert len(client.post("/predict", files=parts(encoded(9))).json()["answers"]) == 9


def test_a_client_that_goes_away_during_its_upload_is_no_failure_of_the_server(
    folder: Path, caplog: pytest.LogCaptureFixture
):
    service = Service.batching(Classifier.open(folder, device="cpu"))
    app = create_app(service)

    async def ask(kind: bytes) -> list[dict]:
        messages = iter([
            {"type": "http.request", "body": b"--x\r\n", "more_body": True},
            {"type": "http.disconnect"},
        ])  # fmt: skip
        sent: list[dict] = []

        async def receive() -> dict:
            return next(messages)

        async def send(message: dict) -> None:
            sent.append(message)

        headers = [(b"host", b"testserver"), (b"content-type", kind)]
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"",
                 "headers": headers, "client": None}  # fmt: skip
        await app(scope, receive, send)
        return sent

    async def both() -> list[list[dict]]:
        async with service.running():
            return [
                await ask(b"image/png"),
                await ask(b"multipart/form-data; boundary=x"),
            ]

    assert asyncio.run(both()) == [[], []]
    counted = 'cnn2gnn_requests_total{method="POST",path="/predict",status="499"} 2.0'
    assert counted in service.metrics.text().decode()
    assert "failed" not in caplog.text


def test_no_answer_in_time(folder: Path):
    service = Service.batching(Classifier.open(folder, device="cpu"), limits=Limits(seconds=0.05))
    release = _hold(service)
    with TestClient(create_app(service)) as client:
        refused(client.post("/predict", files=parts(encoded(1))), 504)
        release.set()


class Clock:
    """A module ``time`` that stands still unless it is moved."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_a_request_has_one_time_for_its_body_and_its_answer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """A body that takes all of it leaves none for the network."""
    clock = Clock()
    monkeypatch.setattr(limits, "time", clock)
    service = Service.batching(Classifier.open(folder, device="cpu"), limits=Limits(seconds=30))
    app = create_app(service)

    async def ask(seconds: float) -> int:
        async def receive() -> dict:
            clock.now += seconds
            return {"type": "http.request", "body": encoded(1, seed=5)[0], "more_body": False}

        async def send(message: dict) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        statuses: list[int] = []
        headers = [(b"host", b"testserver"), (b"content-type", b"image/png")]
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"",
                 "headers": headers, "client": None}  # fmt: skip
        await app(scope, receive, send)
        return statuses[0]

    async def both() -> list[int]:
        async with service.running():
            return [await ask(0), await ask(30)]

    assert asyncio.run(both()) == [200, 504]


def _hold(service: Service) -> threading.Event:
    release, inner = threading.Event(), service.live.current.network

    def wait(*arguments: object) -> object:
        release.wait()
        return inner(*arguments)  # type: ignore[arg-type]

    service.live.current.network = wait  # type: ignore[assignment]
    return release


def test_what_is_added_has_the_same_limits_as_what_is_classified(edited: TestClient):
    """No more pixels are decoded for the memory either; images within the limits are added all the same."""
    good = encoded(2, seed=4)
    large = encode_image(np.zeros((101, 100, 3), np.uint8))  # 100 more than are allowed
    made = edited.post("/memory?class=class 0", files=parts([*good, large]), headers=ALLOWED).json()
    assert len(made["keys"]) == 2
    assert [one["error"] for one in made["errors"]] == ["100 x 101 pixels, more than 10,000"]
    why = refused(edited.post("/memory?class=class 0", files=parts([large]), headers=ALLOWED), 409)
    assert why == "none of these 1 images can be read: 100 x 101 pixels, more than 10,000"
    assert edited.get("/memory").json()["images"] == 42


def test_bombs_are_not_decoded_for_the_memory(edited: TestClient, monkeypatch: pytest.MonkeyPatch):
    """What a bomb's header claims decides: no decoder sees more pixels than are allowed."""
    seen: list[bytes] = []
    decode = inputs.decode

    def watched(data: bytes) -> np.ndarray:
        seen.append(data)
        return decode(data)

    monkeypatch.setattr(inputs, "decode", watched)
    bombs = [data for data in all_bombs().values() if len(data) < LIMITS.body_bytes - 1000]
    for bomb in bombs:
        made = edited.post(
            "/memory?class=class 0&dry_run=true", files=parts([bomb]), headers=ALLOWED
        )
        assert made.status_code in (201, 409)
    assert len(bombs) > 20
    assert all(pixels_error(data, LIMITS) is None for data in seen)
    assert edited.get("/memory").json()["version"] == 0
