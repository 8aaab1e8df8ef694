"""``cnn2gnn serve`` as a process: signals, ports, tokens; and the page in a browser."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import Classifier
from tests.support.forks import Fork
from tests.support.runs import bare_environment, cnn2gnn, environment, finish
from tests.support.serving import ALLOWED, TOKEN, encoded, parts, served_model

PATIENCE_MS = 120_000
"""For the browser, on a loaded machine."""
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def serve(folder: Path, *options: str) -> list[str]:
    return ["serve", str(folder), "--port", "0", *options]


def real_process(folder: Path, env: dict[str, str], *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cnn2gnn_dist", *serve(folder, *options)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@contextmanager
def served(
    folder: Path, process: subprocess.Popen[str] | None = None
) -> Iterator[tuple[subprocess.Popen[str] | Fork, str]]:
    """A server with a token: its process (a fork, unless one is given), and its address."""
    process = process or cnn2gnn(*serve(folder), CNN2GNN_TOKEN=TOKEN)
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if found := re.search(r"http://\S+?(?=/ )", line):
                yield process, found.group()
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_asked_edited_and_stopped(folder: Path):
    real = real_process(folder, environment(CNN2GNN_TOKEN=TOKEN))
    with (
        served(folder, real) as (process, address),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        new = encoded(6, seed=11)
        assert client.post("/predict", files=parts(new)).json()["memory_version"] == 0
        made = client.post("/memory?class=new", files=parts(new[:5]), headers=ALLOWED)
        assert made.status_code == 201, made.text
        assert client.post("/predict", files=parts(new)).json()["memory_version"] == 1
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert Classifier.open(folder, device="cpu").classes_[-1] == "new", "acknowledged, hence kept"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_are_answered_before_the_end(folder: Path, number: signal.Signals):
    image = encoded(1, seed=5)[0]
    head = (
        "POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        f"Content-Length: {len(image)}\r\n\r\n"
    ).encode()
    with served(folder) as (process, address), ExitStack() as stack:
        port = int(address.rpartition(":")[2])
        asking = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
                  for _ in range(3)]  # fmt: skip
        for one in asking:
            one.sendall(head + image[:20])
        while (
            "cnn2gnn_requests_in_flight 4.0" not in httpx.get(f"{address}/metrics", timeout=60).text
        ):
            pass  # the request for the metrics is the fourth
        process.send_signal(number)
        while listens(port):
            pass
        for one in asking:
            one.sendall(image[20:])
            answer = b"".join(iter(lambda one=one: one.recv(1 << 16), b""))
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert b'"memory_version":0' in answer
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


def test_a_client_that_goes_away_during_its_upload_is_counted_as_such(folder: Path):
    head = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n"
    with served(folder) as (process, address), httpx.Client(base_url=address, timeout=60) as client:
        port = int(address.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), 60) as leaving:
            leaving.sendall(head + b"part")
            while "cnn2gnn_requests_in_flight 2.0" not in client.get("/metrics").text:
                pass
        counted = r'requests_total{method="POST",path="/predict",status="(.*)"} 1.0'
        while not (found := re.findall(counted, client.get("/metrics").text)):
            pass
        assert found == ["499"]
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert "failed" not in output


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 60).close()
    except OSError:
        return False
    return True


def test_edits_of_the_command_line_are_followed(folder: Path):
    with served(folder) as (_, address), httpx.Client(base_url=address, timeout=60) as client:
        editing.remove(Classifier.open(folder, device="cpu"), ["img-3"])
        while client.get("/healthz").json()["memory_version"] == 0:
            pass
        assert client.get("/memory").json()["images"] == 39


def fails(folder: Path, *options: str, **environ: str) -> str:
    code, said = finish(cnn2gnn(*serve(folder, *options), **environ), 120)
    assert code == 2, said
    assert "remedy:" in said
    return said


def test_what_is_refused_at_the_start(folder: Path, tmp_path: Path):
    (tmp_path / "short").write_text("abc\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"can't listen on 127.0.0.1, port {port}" in fails(folder, "--port", port)
    assert "can be reached from other machines" in fails(folder, "--host", "0.0.0.0")
    assert "at least 16" in fails(folder, "--token-file", str(tmp_path / "short"))
    assert "at least 16" in fails(folder, CNN2GNN_TOKEN="abc")
    assert "can't be read" in fails(folder, "--token-file", str(tmp_path / "none"))
    assert "not a valid limit" in fails(folder, "--max-images", "0")
    (tmp_path / "other").mkdir()  # tmp_path itself contains a model
    assert "not a model" in fails(tmp_path / "other")


def test_a_public_address_is_reported_clearly(folder: Path):
    options = ("--host", "0.0.0.0", "--public")
    process = real_process(folder, bare_environment(folder / "home"), *options)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if "anyone who can reach it" in line:
                break
        else:
            raise AssertionError("not said")
    finally:
        process.kill()
        process.communicate()


# --- the page -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as engine:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        found = engine.chromium.launch(executable_path=CHROMIUM, args=options, timeout=PATIENCE_MS)
        yield found
        found.close()


@contextmanager
def page_of(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """The page; asserts that all its requests go to the server and that no script fails."""
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    page.goto(address)
    page.wait_for_selector("#classes li")
    yield page
    away = [url for url in asked if not url.startswith((address, "blob:", "data:"))]
    context.close()
    assert not away
    assert not [text for text in wrong if not re.search("responded with a status of (4|503)", text)]


def files(images: list[bytes]) -> list[dict[str, Any]]:
    return [
        {"name": f"{n}.png", "mimeType": "image/png", "buffer": data}
        for n, data in enumerate(images)
    ]


def shows(page: Any, selector: str, text: str) -> None:
    page.locator(selector, has_text=re.compile(text)).first.wait_for()


def verdicts(page: Any) -> list[str]:
    return [one.strip() for one in page.locator(".verdict").all_inner_texts()]


@pytest.mark.parametrize(("scheme", "width", "height"), [("light", 1200, 900), ("dark", 390, 844)])
def test_the_page(browser: Any, folder: Path, scheme: str, width: int, height: int):
    new = encoded(6, seed=11)
    size = {"width": width, "height": height}
    with (
        served(folder) as (_, address),
        page_of(browser, address, color_scheme=scheme, viewport=size) as page,
    ):
        page.set_input_files("#ask-files", files([new[5], encoded(1)[0], b"no image"]))
        shows(page, "#ask-state", "3 images answered")
        before = verdicts(page)
        assert before[2].startswith("not readable as an image")
        page.locator(".near img").first.wait_for()
        assert page.locator(".near img").count() == page.locator(".near li").count() > 0
        assert all(
            image.evaluate("i => i.decode().then(() => i.naturalWidth > 0)")
            for image in page.locator(".near img").all()
        )

        page.fill("#add-name", "<b>new</b>")
        page.set_input_files("#add-files", files(new[:5]))
        page.fill("#token", "wrong-wrong-wrong")
        page.click("#add-button")
        shows(page, "#edit-state", "this token is wrong")
        page.fill("#token", TOKEN)
        page.click("#add-button")
        shows(page, "#edit-state", "5 added to <b>new</b>")
        shows(page, "#classes li", "<b>new</b>")
        assert page.locator("#classes b").count() == 0, "names are text"

        page.click("#undo")
        shows(page, "#edit-state", "Undone: answers come from version 0")
        shows(page, "#ask-state", "3 images answered")
        assert verdicts(page) == before
        assert page.locator("#undo").is_disabled()
        assert not page.evaluate("document.documentElement.scrollWidth > innerWidth")
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (max(map(int, re.findall(r"\d+", colour))) < 80) == (scheme == "dark")


def padded(images: list[bytes], size: int) -> list[bytes]:
    """The same images, as files of this size: what follows a PNG's end is ignored."""
    return [one + bytes(size - len(one)) for one in images]


def test_the_page_keeps_to_the_limits_of_the_server(browser: Any, folder: Path):
    """Parts have as many images and bytes as the server takes; one that fails costs the others nothing."""
    options = ("--max-images", "3", "--max-upload-mb", "0.1")
    process = cnn2gnn(*serve(folder, *options), CNN2GNN_TOKEN=TOKEN)
    with served(folder, process) as (_, address), page_of(browser, address) as page:
        sent: list[int] = []
        page.on("request", lambda one: "/predict" in one.url and sent.append(one.url))
        page.set_input_files("#ask-files", files(encoded(7, seed=5)))
        shows(page, "#ask-state", "^7 images answered")
        assert len(sent) == 3
        page.click("#clear")
        page.set_input_files("#ask-files", files(padded(encoded(5, seed=5), 40_000)))
        shows(page, "#ask-state", "^5 images answered")
        assert len(sent) == 6, "two of 40 kB in each"
        page.click("#clear")
        small, large = encoded(2, seed=5), padded(encoded(1, seed=6), 100_000)
        page.set_input_files("#ask-files", files([small[0], *large, small[1]]))
        shows(
            page,
            "#ask-state",
            "^2 of 3 images answered: an image of 0.1 MB is too large: .* 0.1 MB",
        )
        said = verdicts(page)
        assert [one.startswith("class") for one in said] == [True, False, True]
        assert said[1].startswith("not answered: an image of 0.1 MB is too large")
        assert len(sent) == 8

        page.fill("#add-name", "new")
        page.fill("#token", TOKEN)
        page.set_input_files("#add-files", files(encoded(4, seed=11)))
        page.click("#add-button")
        shows(page, "#edit-state", "^4 images of .* are too many at once: .* 3 images and 0.1 MB")
        page.set_input_files("#add-files", files(encoded(3, seed=11)))
        page.click("#add-button")
        shows(page, "#edit-state", "^3 added to new")


def test_the_page_goes_on_after_a_request_that_failed(browser: Any, folder: Path):
    with served(folder) as (_, address), page_of(browser, address) as page:
        broken = {"status": 503, "json": {"error": "images are waiting", "remedy": "ask again"}}
        page.route("**/predict*", lambda route: route.fulfill(**broken), times=1)
        page.set_input_files("#ask-files", files(encoded(20, seed=5)))
        shows(page, "#ask-state", "^4 of 20 images answered: images are waiting – ask again")
        page.click("#again")
        shows(page, "#ask-state", "^20 images answered")


def test_the_page_by_keyboard(browser: Any, folder: Path):
    with served(folder) as (_, address), page_of(browser, address) as page:
        page.set_input_files("#ask-files", files(encoded(1, seed=5)))
        shows(page, "#ask-state", "1 image answered")
        reached = []
        page.locator("body").focus()
        for _ in range(9):
            page.keyboard.press("Tab")
            reached.append(page.evaluate("document.activeElement.id"))
            assert page.evaluate(
                "e => { const s = getComputedStyle(document.activeElement.closest('.drop') ??"
                " document.activeElement); return s.outlineStyle; }"
            ) not in ("none", ""), f"no focus ring on {reached[-1]}"
            if reached[-1] == "add-button":
                break
        assert reached == [
            "ask-files", "again", "clear", "add-name", "add-files", "token", "add-button",
        ]  # fmt: skip
        page.focus("#clear")
        page.keyboard.press("Enter")
        assert page.locator(".answer").count() == 0


def test_the_page_of_a_model_that_can_not_be_edited(browser: Any, tmp_path: Path):
    folder = served_model(tmp_path / "plain", scope="none")
    with served(folder) as (_, address), page_of(browser, address) as page:
        page.set_input_files("#ask-files", files(encoded(2, seed=5)))
        shows(page, "#ask-state", "2 images answered")
        assert page.locator("#add").is_hidden()
        shows(page, "#memory", "has no memory")
