"""What the endpoints do: decode, ask, edit; independent of HTTP and of Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cnn2gnn_dist.data.images.decode import CorruptSample, image_size
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.answers import Answer
from cnn2gnn_dist.inference.classifier import DECODERS, Classifier
from cnn2gnn_dist.inference.inputs import Input, Pixels, to_pixels
from cnn2gnn_dist.inference.memory import store
from cnn2gnn_dist.serving.batching import Answered, Batcher
from cnn2gnn_dist.serving.limits import Limits, Refused, pixels_error, seconds_until
from cnn2gnn_dist.serving.live import PINNED, UNPIN, LiveModel
from cnn2gnn_dist.serving.metrics import Metrics

_log = logging.getLogger(__name__)

T = TypeVar("T")
Ask = Callable[[list[Pixels], int, int], Awaitable[Answered]]

TOGETHER = 8
"""Number of images that a decoding thread takes at a time."""
AT_ONCE, AT_ONCE_BYTES, AT_ONCE_PIXELS = 4, 32 << 10, 128 * 128
"""At most this many JPEGs and PNGs of at most this size are decoded where their request was read: they take
less time than handing them to a thread and back, for which a lone request would wait. In other formats the
header does not bound what is decoded."""
THUMBNAILS = 2048
"""Number of cached thumbnails."""
FOLLOW_SECONDS = 1.0
EDITS = 8
"""Edits that may run and wait at a time: each keeps its upload in memory."""


@dataclass
class Service:
    """A model being served.

    Attributes:
        live: the model.
        ask: answers decoded images from one version of the memory.
        limits, metrics: see there.
        token: that edits need; None: nobody may edit.
        alive: whether requests are accepted.
        closing: run when the server stops, after the last answer.
    """

    live: LiveModel
    ask: Ask
    limits: Limits = field(default_factory=Limits)
    metrics: Metrics = field(default_factory=Metrics)
    token: str | None = None
    alive: Callable[[], bool] = lambda: True
    closing: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self._edits = ThreadPoolExecutor(1, thread_name_prefix="edit")
        self._editing = 0
        self._thumbnails: OrderedDict[tuple[int, int], bytes | None] = OrderedDict()

    @classmethod
    def batching(
        cls, model: Classifier, *, limits: Limits | None = None, token: str | None = None
    ) -> Service:
        """Serve a model in this process: one thread runs the network over the waiting images."""
        limits, metrics = limits or Limits(), Metrics()
        live = LiveModel(model, metrics.swapped)
        batcher = Batcher(lambda: live.current, limits.waiting, metrics.batch)
        metrics.waiting.set_function(lambda: batcher.waiting)

        async def ask(images: list[Pixels], top: int, neighbours: int) -> Answered:
            future = batcher.submit(images, top=top, neighbours=neighbours)
            return await asyncio.wrap_future(future)

        return cls(
            live, ask, limits, metrics, token, lambda: batcher.alive, batcher.close,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Follow the memory on disk, looking every second; afterwards end the threads, once everything is answered.

        An edit that still waits then is not made: nobody would learn of it.
        """
        following = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self.closing()
        self._edits.shutdown(cancel_futures=True)
        self._decoders.shutdown()

    async def predict(
        self, images: list[Input], *, top: int, neighbours: int, until: float | None = None
    ) -> Answered:
        """Answer encoded images, in their order; one that can't be read has an error.

        Args:
            images: as they were sent.
            top: classes in an answer.
            neighbours: neighbors in an answer.
            until: end of the request's time (``limits.Body``); None: it begins now.

        Raises:
            Refused: not answered in time, the queue is full, or the server stops.
        """
        seconds = self.limits.seconds if until is None else seconds_until(until)
        try:
            async with asyncio.timeout(seconds):
                decoded = await self._decode(images)
                good = [one for one in decoded if one.pixels is not None]
                if good:
                    made = await self.ask(good, top, neighbours)
                else:
                    made = Answered([], self.live.version)
        except TimeoutError:
            raise Refused(
                504, f"no answer within {self.limits.seconds:g} s", "send fewer images, or later",
                {"Retry-After": "5"},
            ) from None  # fmt: skip
        self.metrics.images.labels("answered").inc(len(good))
        self.metrics.images.labels("unreadable").inc(len(decoded) - len(good))
        answers = iter(made.answers)
        return Answered(
            [
                Answer(one.name, error=one.error) if one.pixels is None else next(answers)
                for one in decoded
            ],
            made.version,
        )

    async def edit(self, action: str, change: Callable[[Classifier], T]) -> T:
        """Edit the memory; returns once the result is being served.

        Raises:
            UserError: as the edit raises it; nothing is changed.
            Refused: it takes too long (and continues), others are waiting, or the version is pinned.
        """
        if self.live.pinned:
            raise Refused(409, PINNED, UNPIN)
        if self._editing >= EDITS:
            self.metrics.edits.labels(action, "refused").inc()
            raise Refused(
                503, f"{self._editing} edits of the memory are already waiting", "ask again later",
                {"Retry-After": "10"},
            )  # fmt: skip
        loop = asyncio.get_running_loop()
        task = loop.run_in_executor(self._edits, self.live.edit, change)
        self._editing += 1
        task.add_done_callback(self._edited)
        try:
            async with asyncio.timeout(self.limits.edit_seconds):
                made = await asyncio.shield(task)
        except TimeoutError:
            self.metrics.edits.labels(action, "slow").inc()
            raise Refused(
                504, f"the edit is not done after {self.limits.edit_seconds:g} s; it continues",
                "GET /memory shows when its version is served",
            ) from None  # fmt: skip
        except UserError:
            self.metrics.edits.labels(action, "refused").inc()
            raise
        except Exception:
            self.metrics.edits.labels(action, "failed").inc()
            raise
        self.metrics.edits.labels(action, "done").inc()
        return made

    def _edited(self, _: object) -> None:
        self._editing -= 1

    def memory(self) -> dict[str, Any]:
        """The version being served, and its classes with their numbers of images."""
        model = self.live.current
        memory = model.memory
        if memory is None:
            classes = [{"class": name, "trained": True} for name in model.spec.label_names]
            return {"version": None, "images": 0, "classes": classes, "undo": False}
        version = memory.version
        return {
            "version": version.number,
            "made": version.made,
            "action": version.action,
            "images": len(memory),
            "undo": version.parent is not None and version.parent in store.numbers(memory.root),
            "classes": [
                {"class": entry.name, "images": int(count), "trained": entry.trained}
                for entry, count in zip(version.classes, memory.counts(), strict=True)
            ],
        }

    async def thumbnail(self, row: int, version: int | None) -> bytes:
        """The JPEG of a row of the version being served.

        Raises:
            Refused: no such row, removed, without a thumbnail, or of another version.
        """
        memory = self.live.current.memory
        if memory is None or not 0 <= row < memory.rows or not memory.live[row]:
            raise Refused(404, "the memory has no such image", "GET /memory/keys lists them")
        now = memory.version.number
        if version is not None and version != now:
            raise Refused(404, "the memory has changed since that answer", "ask again")
        if (now, row) not in self._thumbnails:
            try:
                found = await asyncio.to_thread(memory.thumbnail, row)
            except OSError:  # compacted, or the image forgotten, a moment ago
                found = None
            self._thumbnails[now, row] = found
            while len(self._thumbnails) > THUMBNAILS or next(iter(self._thumbnails))[0] != now:
                self._thumbnails.popitem(last=False)
        found = self._thumbnails[now, row]
        if found is None:
            raise Refused(404, "this image has no thumbnail", "export with model.thumbnails=64")
        return found

    async def _decode(self, images: list[Input]) -> list[Pixels]:
        if len(images) <= AT_ONCE and all(is_small(one.value) for one in images):
            return self._decoded(images)
        loop = asyncio.get_running_loop()
        parts = [images[at : at + TOGETHER] for at in range(0, len(images), TOGETHER)]
        made = await asyncio.gather(
            *(loop.run_in_executor(self._decoders, self._decoded, part) for part in parts)
        )
        return [one for part in made for one in part]

    def _decoded(self, images: list[Input]) -> list[Pixels]:
        views = self.live.current.spec.views.spec()
        return [to_pixels(one, views) for one in self.within_limits(images)]

    def within_limits(self, images: list[Input]) -> list[Input]:
        """The same images; one with too many pixels, by its header, is replaced by the reason why it isn't decoded."""
        found = []
        for one in images:
            error = pixels_error(one.value, self.limits)
            found.append(Input(one.name, CorruptSample(error)) if error else one)
        return found

    async def _follow(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            if self.live.pinned:
                continue
            try:
                await asyncio.to_thread(self.live.follow)
                said = ""
            except Exception as error:  # whatever it is, later versions are still followed
                why = error.what if isinstance(error, UserError) else repr(error)
                if why != said:  # once, not every second
                    _log.warning("the memory on disk can't be loaded: %s", why)
                said = why


def is_small(data: bytes) -> bool:
    """Whether an encoded image takes well under a millisecond to decode, judged by its bytes and header."""
    if len(data) > AT_ONCE_BYTES or not data.startswith((b"\xff\xd8", b"\x89PNG")):
        return False
    try:
        high, wide = image_size(data)
    except CorruptSample:
        return False
    return high * wide <= AT_ONCE_PIXELS
