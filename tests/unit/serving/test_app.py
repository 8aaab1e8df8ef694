"""The app: every endpoint and every refusal, as a client sees them."""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from cnn2gnn_dist.inference.classifier import Classifier
from tests.support.bombs import all_bombs
from tests.support.models import write_model
from tests.support.serving import ALLOWED, LIMITS, client_of, encoded, parts, refused, served_model


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that tests must not edit."""
    return served_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture(scope="module")
def client(served: Path) -> Iterator[TestClient]:
    """A client of an app that serves this model."""
    with client_of(served) as found:
        yield found


@pytest.fixture
def folder(served: Path, tmp_path: Path) -> Path:
    """A copy of this model, which a test may edit."""
    shutil.copytree(served, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def edited(folder: Path) -> Iterator[TestClient]:
    with client_of(folder) as found:
        yield found


def test_three_ways_to_send_an_image(client: TestClient):
    image = encoded(1, seed=5)[0]
    form = client.post("/predict", files=parts([image])).json()
    text = base64.b64encode(image).decode()
    plain = client.post("/predict", json={"images": [text]}).json()
    named = client.post("/predict", json={"images": [{"name": "a.png", "data": text}]}).json()
    whole = client.post("/predict", content=image, headers={"Content-Type": "image/png"}).json()
    names = [made["answers"][0].pop("image") for made in (form, plain, named, whole)]
    assert names == ["0.png", "image 0", "a.png", "image"]
    assert form == plain == named == whole
    assert form["memory_version"] == 0


def test_answers_are_those_of_the_model(client: TestClient, served: Path):
    model = Classifier.open(served, device="cpu")
    images = encoded(6, seed=5)
    made = client.post("/predict?top=2&neighbours=3", files=parts(images)).json()["answers"]
    for shown, answer in zip(made, model.predict(images, top=2, neighbours=3), strict=True):
        same = answer.as_dict() | {"image": shown["image"]}
        for near in shown["neighbours"]:
            assert near.pop("row") in range(40)
        assert shown == json.loads(json.dumps(same))


def test_what_can_not_be_read_does_not_cost_the_others_their_answers(client: TestClient):
    made = client.post("/predict", files=parts([*encoded(1, seed=5), b"nothing", b""]))
    assert made.status_code == 200
    good, text, empty = made.json()["answers"]
    assert good["classes"]
    assert text["error"] == "not readable as an image: text"  # as predict says it
    assert empty["error"] == "not readable as an image: an empty file"
    made = client.post("/predict", files=parts([b"nothing"]))
    assert refused(made, 422) == "no image could be read"
    assert made.json()["remedy"].startswith("send a JPEG, PNG, ")  # the form was a good one
    assert made.json()["answers"][0]["error"]


def test_bombs(client: TestClient):
    for name, data in all_bombs().items():
        if len(data) < LIMITS.body_bytes - 1000:
            made = client.post("/predict", files=parts([data]))
            assert made.status_code in (200, 422), name


@pytest.mark.parametrize(
    ("query", "body", "status", "error"),
    [
        ("", {}, 415, "images can't be sent as nothing"),
        ("", {"data": {"a": "b"}}, 415, "x-www-form-urlencoded"),
        ("", {"json": {"images": []}}, 400, "contains no image"),
        ("", {"json": {"images": ["?"]}}, 400, "image 0 is not base64"),
        ("", {"json": {"picture": "a"}}, 400, "images: Field required"),
        ("", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "EOF"),
        ("", {"files": [("images", ("a", b"a"))] * 9}, 413, "more than 8 images in one"),
        ("", {"json": {"images": [""] * 9}}, 413, "9 images in one request, more than 8"),
        ("", {"content": b"a" * 200_001, "headers": {"Content-Type": "image/png"}}, 413, "200,000"),
        ("", {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400, "bound"),
        ("?top=0", {"files": [("images", ("a", b"a"))]}, 422, "query.top"),
        ("?top=9999999999999999999999", {"files": [("images", ("a", b"a"))]}, 422, "query.top"),
        ("?neighbours=x", {"files": [("images", ("a", b"a"))]}, 422, "query.neighbours"),
    ],
)
def test_refusals(client: TestClient, query: str, body: dict, status: int, error: str):
    assert error in refused(client.post(f"/predict{query}", **body), status)


@pytest.mark.parametrize(
    ("method", "path", "unknown", "known"),
    [
        ("POST", "/predict?tops=3&top=2&neighbors=1", "neighbors, tops", "top, neighbours, name"),
        ("GET", "/memory/keys?klass=a", "klass", "class, after, limit"),
        ("GET", "/memory/3/thumbnail?v=0", "v", "version"),
        ("POST", "/memory?class=a&dryrun=true", "dryrun", "class, old_loss, dry_run, name"),
        ("DELETE", "/memory?forget=true", "forget", None),
        ("POST", "/memory/undo?version=3", "version", None),
    ],
)
def test_unknown_query_parameters_are_named(
    client: TestClient, method: str, path: str, unknown: str, known: str | None
):
    made = client.request(method, path, headers=ALLOWED)
    assert refused(made, 422) == f"unknown query parameters: {unknown}"
    assert made.json()["remedy"] == (
        f"use {known}" if known else "this endpoint has none: see /openapi.json"
    )


def test_the_page_and_probes_may_have_any_query(client: TestClient):
    for path in ("/", "/healthz", "/metrics", "/static/page.js"):
        assert client.get(f"{path}?a=b").status_code == 200


def test_the_name_of_an_image_that_is_the_body(client: TestClient):
    made = client.post(
        "/predict?name=a.png", content=encoded(1)[0], headers={"Content-Type": "image/png"}
    )
    assert made.json()["answers"][0]["image"] == "a.png"


def test_paths_and_methods_that_do_not_exist(client: TestClient):
    refused(client.get("/nothing"), 404)
    refused(client.get("/predict"), 405)
    refused(client.get("/static/../app.py"), 404)
    refused(client.get("/memory/x/thumbnail"), 422)


def test_other_hosts_are_refused(client: TestClient):
    refused(client.get("/healthz", headers={"Host": "evil.example"}), 421)


def test_health_metrics_and_openapi(client: TestClient):
    client.post("/predict", files=parts([*encoded(2), b"x"]))
    health = client.get("/healthz").json()
    assert health["status"] == "ok"
    assert (health["model"], health["memory_version"]) == ("small", 0)
    text = client.get("/metrics").text
    assert 'cnn2gnn_requests_total{method="POST",path="/predict",status="200"}' in text
    assert "cnn2gnn_memory_images 40.0" in text
    schema = client.get("/openapi.json").json()
    assert set(schema["paths"]) == {
        "/predict", "/healthz", "/metrics", "/memory", "/memory/keys", "/memory/undo",
        "/memory/{row}/thumbnail",
    }  # fmt: skip


def test_the_page_needs_nothing_from_elsewhere(client: TestClient):
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for name in ("page.css", "page.js"):
        assert f"/static/{name}" in page.text
        text = client.get(f"/static/{name}").text
        assert "http://" not in text + page.text
        assert "https://" not in text + page.text


def test_memory_and_thumbnails(client: TestClient):
    memory = client.get("/memory").json()
    assert memory["version"] == 0
    assert memory["images"] == 40
    assert memory["editable"] is True
    assert memory["undo"] is False
    assert memory["limits"] == {"images": LIMITS.images, "bytes": LIMITS.body_bytes}
    assert [c["images"] for c in memory["classes"]] == [14, 13, 13]
    keys = client.get("/memory/keys?class=class 1&limit=2").json()["keys"]
    assert [one["key"] for one in keys] == ["img-1", "img-4"]
    assert client.get("/memory/keys?class=+class 1+&limit=2").json()["keys"] == keys
    more = client.get(f"/memory/keys?class=class 1&limit=2&after={keys[-1]['row']}").json()["keys"]
    assert [one["key"] for one in more] == ["img-7", "img-10"]
    picture = client.get("/memory/3/thumbnail")
    assert picture.headers["content-type"] == "image/jpeg"
    assert picture.content == encoded(4)[3]
    for path in ("/memory/40/thumbnail", "/memory/-1/thumbnail", f"/memory/{10**40}/thumbnail",
                 "/memory/3/thumbnail?version=7", "/memory/keys?class=none"):  # fmt: skip
        refused(client.get(path), 404)


def test_edits_need_the_token(client: TestClient, folder: Path):
    for method, path in (("POST", "/memory"), ("DELETE", "/memory"), ("POST", "/memory/undo")):
        refused(client.request(method, path), 401)
        refused(client.request(method, path, headers={"Authorization": "Bearer no"}), 401)
    with client_of(folder, token=None) as closed:
        assert closed.get("/memory").json()["editable"] is False
        refused(closed.post("/memory/undo", headers=ALLOWED), 403)


def test_add_ask_undo(edited: TestClient):
    new = encoded(6, seed=11)
    before = edited.post("/predict", files=parts(new[5:])).json()
    made = edited.post("/memory?class=a+new+one", files=parts(new[:5]), headers=ALLOWED)
    assert made.status_code == 201, made.text
    body = made.json()
    assert len(body["keys"]) == 5
    assert body["new_class"]
    assert body["trades"]
    assert body["memory"]["version"] == 1
    assert body["memory"]["classes"][-1] == {"class": "a new one", "images": 5, "trained": False}
    assert edited.post("/predict", files=parts(new[5:])).json()["memory_version"] == 1
    undone = edited.post("/memory/undo", headers=ALLOWED).json()
    assert undone["memory"]["version"] == 0
    assert edited.post("/predict", files=parts(new[5:])).json() == before


def test_a_dry_run_changes_nothing(edited: TestClient):
    made = edited.post(
        "/memory?dry_run=true", data={"class": "new"}, files=parts(encoded(4, seed=11)),
        headers=ALLOWED,
    ).json()  # fmt: skip
    assert made["trades"]
    assert made["memory"]["version"] == edited.get("/healthz").json()["memory_version"] == 0


@pytest.mark.parametrize("points", ["100", "-1", "nan", "inf", "x"])
def test_a_loss_that_is_no_share_is_a_bad_value(client: TestClient, points: str):
    path = f"/memory?class=new&old_loss={points}"
    made = client.post(path, files=parts(encoded(2, seed=11)), headers=ALLOWED)
    assert refused(made, 422).startswith("query.old_loss: ")


def test_remove_and_forget(edited: TestClient):
    def delete(**body: object) -> object:
        return edited.request("DELETE", "/memory", json=body, headers=ALLOWED)

    assert delete(keys=["img-3"]).json()["memory"]["images"] == 39  # type: ignore[attr-defined]
    refused(edited.get("/memory/3/thumbnail"), 404)
    assert "img-3" in refused(delete(keys=["img-3"]), 409)
    made = delete(keys=["img-4"], forget=True).json()["memory"]  # type: ignore[attr-defined]
    assert (made["images"], made["undo"]) == (38, False)
    assert "nothing to undo" in refused(edited.post("/memory/undo", headers=ALLOWED), 409)
    refused(delete(keys=[]), 400)
    refused(delete(forget=True), 400)


def test_edits_that_are_refused_change_nothing(edited: TestClient):
    def add(images: list[bytes], name: str = "class 0") -> object:
        return edited.post("/memory", data={"class": name}, files=parts(images), headers=ALLOWED)

    known = edited.get("/memory/0/thumbnail").content
    assert "already" in refused(add([known]), 409)
    assert "can be read" in refused(add([b"no image"]), 409)
    assert "no name" in refused(add(encoded(1, seed=4), "  "), 400)
    assert "printed" in refused(add(encoded(1, seed=4), "a\x00b"), 400)
    assert "printed" in refused(add(encoded(1, seed=4), "a" * 200), 400)
    assert edited.get("/memory").json()["version"] == 0


@pytest.mark.parametrize("scope", ["none", "batch"])
def test_models_without_a_memory(tmp_path: Path, scope: str):
    with client_of(write_model(tmp_path / "m", scope)) as client:
        made = client.post("/predict", files=parts(encoded(3, seed=5))).json()
        assert made["memory_version"] is None
        assert len(made["answers"]) == 3
        memory = client.get("/memory").json()
        assert (memory["version"], memory["editable"]) == (None, False)
        assert client.get("/memory/keys").json()["keys"] == []
        refused(client.get("/memory/0/thumbnail"), 404)
        for call in (
            lambda: client.post("/memory?class=a", files=parts(encoded(1)), headers=ALLOWED),
            lambda: client.post("/memory/undo", headers=ALLOWED),
        ):
            assert "no memory" in refused(call(), 409)


def test_damaged_uploads(client: TestClient):
    """A seeded sample of what ``benchmarks/serving.py`` does 10,000 times."""
    rng = random.Random(0)
    whole = encoded(3, seed=5) + encoded(3, seed=5, suffix="jpg")
    for _ in range(150):
        data = bytearray(rng.choice(whole))
        if rng.random() < 0.5:
            data = data[: rng.randrange(len(data))]
        for _ in range(rng.randrange(8)):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        made = client.post("/predict", files=parts([bytes(data)]))
        assert made.status_code in (200, 422)
        made = client.post("/predict", content=bytes(data), headers={
            "Content-Type": rng.choice(["application/json", "multipart/form-data; boundary=x", "image/png", "a/b"])
        })  # fmt: skip
        assert made.status_code in (200, 400, 415, 422)
