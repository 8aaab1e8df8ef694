"""Where images are decoded: a few small ones on the spot, others in threads, with the same answers."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference import editing
from cnn2gnn_dist.inference.classifier import load
from cnn2gnn_dist.inference.inputs import Input
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.serving import service
from cnn2gnn_dist.serving.limits import Refused
from cnn2gnn_dist.serving.service import Service, is_small
from tests.support.bombs import saved
from tests.support.models import write_model
from tests.support.shards import encode_image


def noise(side: int) -> bytes:
    return encode_image(np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8))


def test_small_is_by_bytes_and_by_pixels():
    assert is_small(noise(64))
    assert not is_small(b"no image")
    assert is_small(saved("JPEG"))
    assert not any(map(is_small, map(saved, ("GIF", "TIFF", "WEBP", "BMP"))))
    assert not is_small(noise(128))  # 49 KB
    flat = encode_image(np.zeros((200, 200, 3), np.uint8))
    assert len(flat) < service.AT_ONCE_BYTES
    assert not is_small(flat)


@pytest.mark.parametrize(
    ("side", "count", "at_once"), [(64, 1, True), (64, 5, False), (160, 1, False)]
)
def test_answers_do_not_depend_on_where_images_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, count: int, at_once: bool
):
    served = Service.batching(load(write_model(tmp_path / "m"), device="cpu"))
    threads: list[str] = []
    decoded = service.to_pixels

    def watched(one, views):
        threads.append(threading.current_thread().name)
        return decoded(one, views)

    monkeypatch.setattr(service, "to_pixels", watched)

    async def ask():
        async with served.running():
            images = [Input(f"{n}", noise(side)) for n in range(count)]
            return await served.predict(images, top=3, neighbours=3)

    made = asyncio.run(ask())
    assert len(threads) == count
    assert all(name.startswith("decode") != at_once for name in threads)
    right = load(tmp_path / "m", device="cpu").predict([noise(side)], top=3, neighbours=3)[0]
    for one in made.answers:
        assert one.classes == right.classes
        assert [near.key for near in one.neighbours] == [near.key for near in right.neighbours]


def test_edits_are_counted_by_outcome_and_versions_by_change(tmp_path: Path):
    served = Service.batching(load(write_model(tmp_path / "m"), device="cpu"))

    def broken(_: object) -> None:
        raise OSError(5, "Input/output error")

    def counted(name: str) -> float:
        return float(
            re.search(rf"^{re.escape(name)} (.*)$", served.metrics.text().decode(), re.M)[1]
        )

    async def edits() -> None:
        async with served.running():
            assert counted("cnn2gnn_memory_swaps_total") == 0  # the first version replaces none
            await served.edit("remove", lambda model: editing.remove(model, ["img-1"]))
            with pytest.raises(UserError):
                await served.edit("remove", lambda model: editing.remove(model, ["img-1"]))
            with pytest.raises(OSError, match="Input/output"):
                await served.edit("remove", broken)

    asyncio.run(edits())
    for outcome in ("done", "refused", "failed"):
        assert counted(f'cnn2gnn_memory_edits_total{{action="remove",outcome="{outcome}"}}') == 1
    assert counted("cnn2gnn_memory_swaps_total") == counted("cnn2gnn_memory_version") == 1
    assert counted("cnn2gnn_memory_images") == 39


def test_edits_that_wait_are_few_and_end_with_the_server(tmp_path: Path):
    """Each keeps its upload; one that is made after the end is one whose client believes it was not."""
    served = Service.batching(load(write_model(tmp_path / "m"), device="cpu"))
    began, go = threading.Event(), threading.Event()
    made: list[int] = []

    def edit(number: int) -> None:
        made.append(number)
        began.set()
        assert go.wait(60)

    async def edits() -> None:
        running = served.running()
        await running.__aenter__()
        tasks = [
            asyncio.create_task(served.edit("add", lambda _, n=number: edit(n)))
            for number in range(service.EDITS)
        ]
        await asyncio.to_thread(began.wait, 60)
        with pytest.raises(Refused, match="edits of the memory are already waiting") as refused:
            await served.edit("add", lambda _: edit(99))
        assert refused.value.status == 503
        closing = asyncio.create_task(running.__aexit__(None, None, None))
        ended, _ = await asyncio.wait(tasks[1:], timeout=20)  # those that wait, before the first
        go.set()
        await closing
        assert len(ended) == service.EDITS - 1
        await tasks[0]

    asyncio.run(edits())
    assert made == [0]


def test_edits_are_possible_again_once_others_are_done(tmp_path: Path):
    served = Service.batching(load(write_model(tmp_path / "m"), device="cpu"))

    async def edits() -> None:
        async with served.running():
            for number in range(service.EDITS + 2):
                await served.edit(
                    "remove", lambda model, n=number: editing.remove(model, [f"img-{n}"])
                )

    asyncio.run(edits())
    assert served.live.version == service.EDITS + 2


def test_a_version_that_cannot_be_served_does_not_end_the_following(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Another release may write what this one can't read; the versions after that one are served again."""
    folder = write_model(tmp_path / "m")
    served, other = Service.batching(load(folder, device="cpu")), load(folder, device="cpu")
    root = served.live.current.memory.root
    strange = replace(
        store.read_version(root, 0), number=1, parent=0, heads={"old": {}, "new": {}}, files={}
    )
    monkeypatch.setattr(service, "FOLLOW_SECONDS", 0.01)

    async def until(true):
        async with asyncio.timeout(60):
            while not true():
                await asyncio.sleep(0.01)

    async def follow():
        async with served.running():
            store.write_version(root, strange, {})
            await until(lambda: "memory on disk can't be loaded" in caplog.text)
            assert served.live.version == 0
            store.set_head(root, 0)
            editing.remove(other, ["img-1"])
            await until(lambda: served.live.version == 2)

    with caplog.at_level(logging.WARNING):
        asyncio.run(follow())
    assert caplog.text.count("memory on disk can't be loaded") == 1
