"""A small served model with calibration images, so that classes can be added to it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fastapi.testclient import TestClient

from cnn2gnn_dist.inference import scoring
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.inputs import Pixels
from cnn2gnn_dist.serving.app import create_app
from cnn2gnn_dist.serving.limits import Limits
from cnn2gnn_dist.serving.service import Service
from tests.support.models import pictures, write_model
from tests.support.shards import encode_image

TOKEN = "a-token-of-the-tests"
ALLOWED = {"Authorization": f"Bearer {TOKEN}"}
LIMITS = Limits(body_bytes=200_000, images=8, pixels=10_000, rate=0, seconds=60)


def served_model(folder: Path, scope: str = "dataset") -> Path:
    """Write the model of ``tests.support.models`` with 30 calibration images."""
    write_model(folder, scope)
    if scope == "dataset":
        model = Classifier.open(folder, device="cpu")
        made = model.outputs([Pixels("", one) for one in pictures(30, seed=7)])
        assert model.memory is not None
        near = np.maximum(made.rows, 0)
        np.savez(
            folder / artefact.CALIBRATION,
            logits=made.logits,
            self_logits=made.self_logits,
            x=made.x,
            z=made.z,
            label=np.arange(30) % 3,
            near_distance=made.distances,
            near_weight=made.weights,
            near_label=model.memory.labels[near],
        )
        scoring.write(folder)
        artefact.write_checksums(folder)
    return folder


def encoded(count: int, seed: int = 0, suffix: str = "png") -> list[bytes]:
    """Encoded images; with seed 0, the first 40 are in the memory (as JPEGs)."""
    return [encode_image(image, suffix) for image in pictures(count, seed)]


def parts(images: list[bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Images as the fields of a form."""
    return [("images", (f"{n}.png", data, "image/png")) for n, data in enumerate(images)]


def client_of(folder: Path, allowed: Limits = LIMITS, token: str | None = TOKEN) -> TestClient:
    """A client of an app that serves this model."""
    service = Service.batching(Classifier.open(folder, device="cpu"), limits=allowed, token=token)
    return TestClient(create_app(service, hosts=frozenset({"testserver"})))


def refused(response: object, status: int) -> str:
    """The error in a response, which also has a remedy."""
    assert response.status_code == status, response.text  # type: ignore[attr-defined]
    body = response.json()  # type: ignore[attr-defined]
    assert body["error"]
    assert body["remedy"]
    return str(body["error"])
