"""The stream for anybody's training script: exact global batches, resumed by a cursor.

::

    stream = Stream("shards/train-{0000..0063}.tar", global_batch=256, views=ViewSpec("crop_flip", 32))
    for epoch in range(stream.epoch, 10):
        for batch in stream:                      # this rank's rows of each global batch
            images, labels, valid = batch.tensors(device)
            ...
        torch.save({"stream": stream.state_dict(), ...}, "last.pt")
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.order import Order, sequential_batch
from cnn2gnn_dist.data.reading.corrupt import CorruptSamples
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Batch, ReaderSpec, Request
from cnn2gnn_dist.data.reading.shard_files import CacheSpec
from cnn2gnn_dist.data.storage.shard_paths import expand
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.ranks import Ranks

_VERSION = 1


class Stream:
    """This rank's rows of the global batches of a data set, epoch after epoch.

    ``for batch in stream`` gives what is left of the current epoch and moves on to the next one.
    The order depends on the data, ``seed``, ``global_batch`` and ``window`` only: never on ranks,
    readers or backend. The whole state is a cursor (epoch, batch), so it may be loaded at another
    world size, and nothing before it is read again.

    Args:
        data: WebDataset tar shards (path, glob, ``{0000..1023}``, folder, or several of them), or
            a saved manifest (``.arrow``). Shards are indexed once and the manifest kept in the
            user's cache folder ($XDG_CACHE_HOME).
        global_batch: G, samples of a step over all ranks; a multiple of the world size.
        views: what is made of an image; every epoch shows another view.
        seed: of the order (``views.seed`` is that of the views).
        window: shards shuffled together (see docs/order.md).
        backend: "local" (threads), "ray" (actors; Ray must run), "auto" (ray where it runs).
        workers, prefetch: readers of this rank, and most requests in flight.
        rank, world_size: who we are; from the launcher's environment when not given.
        num_views: show view (epoch mod num_views); None: a new view each epoch.
        train: False: all samples in order, clean, without dropping any; what pads the last
            batch has ``valid`` False.
        max_corrupt: share of corrupt images among this rank's above which reading stops.
        decoded_bytes: most bytes of the node's cache of decoded images (small images; 0: none).
        cache_bytes: most bytes of whole copies of remote shards in the user's cache folder (0:
            their samples are read one by one).

    Raises:
        UserError: no such data, sizes that can't be shared, an unknown backend.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Sequence[str | Path],
        *,
        global_batch: int,
        views: ViewSpec,
        seed: int = 0,
        window: int = 16,
        backend: str = "auto",
        workers: int = 1,
        prefetch: int = 4,
        rank: int | None = None,
        world_size: int | None = None,
        num_views: int | None = None,
        train: bool = True,
        max_corrupt: float = 0.001,
        decoded_bytes: int = 0,
        cache_bytes: int = 20 << 30,
    ) -> None:
        ranks = Ranks.from_environment()
        self.rank = ranks.rank if rank is None else rank
        self.world_size = ranks.world_size if world_size is None else world_size
        self.manifest_path = _manifest_of(data)
        self.manifest = Manifest.load(self.manifest_path)
        self.seed, self.window, self.num_views, self.train = seed, window, num_views, train
        self.global_batch, self.views = global_batch, views
        self.epoch = 0
        self.batch = 0
        self._order = Order(
            self.manifest.shard_sizes, seed=seed, global_batch=global_batch, window=window
        )
        self._order.check_ranks(self.world_size)
        self._corrupt = CorruptSamples(max_corrupt, len(self.manifest) / self.world_size)
        self._pool = ReaderPool(
            ReaderSpec(
                str(self.manifest_path),
                views,
                decoded_bytes,
                CacheSpec(str(_cache_folder() / "shards"), cache_bytes),
            ),
            backend=backend,
            workers=workers,
            prefetch=prefetch,
        )

    def __len__(self) -> int:
        """Batches of a whole epoch, the same on every rank."""
        if self.train:
            return self._order.batches_per_epoch
        return -(-len(self.manifest) // self.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch. The cursor moves before a batch is handed over.

        Raises:
            UserError: a shard is missing or changed; too many corrupt images.
        """
        first = self.batch
        batches = self._pool.batches(self._request(index) for index in range(first, len(self)))
        for number, batch in enumerate(batches, first):
            self._count_corrupt(batch)
            if not self.train:
                batch.valid &= self._in_order(number)[1]
            self.batch = number + 1
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch (0 is the first)."""
        self.epoch, self.batch = epoch, 0

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the last batch handed over, and what it is a cursor of."""
        return {"version": _VERSION, "epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another stream of the same data stood, at whatever world size.

        Raises:
            UserError: the data, the order or the views are not those of the state (the field is
                named), so the cursor would mean other samples.
        """
        mine = {"version": _VERSION, **self._identity()}
        for name, value in mine.items():
            if state.get(name) != value:
                raise UserError(
                    f"this state belongs to another stream: {name} is {state.get(name)!r} there "
                    f"and {value!r} here",
                    where=name,
                    remedy="the same data and settings, or a new start without the state",
                )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 0 or not 0 <= batch <= len(self):
            raise UserError(
                f"epoch {epoch}, batch {batch} lies outside an epoch of {len(self)} batches",
                where="state",
                remedy="a state that state_dict() gave",
            )
        self.epoch, self.batch = (epoch + 1, 0) if batch == len(self) else (epoch, batch)

    def close(self) -> None:
        """End the readers."""
        self._pool.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        views = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self.views).items()
        }
        return {
            "data": self.manifest.digest,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window": self.window,
            "num_views": self.num_views,
            "train": self.train,
            "views": views,
        }

    def _request(self, index: int) -> Request:
        if not self.train:
            return Request(self._in_order(index)[0], CLEAN)
        ids = self._order.rank_batch(self.epoch, index, self.rank, self.world_size)
        view = self.epoch if self.num_views is None else self.epoch % self.num_views
        return Request(ids, view)

    def _in_order(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's ids of a batch in the order of the data; False where it is padding."""
        share = self.global_batch // self.world_size
        return sequential_batch(len(self.manifest), share, index, self.rank, self.world_size)

    def _count_corrupt(self, batch: Batch) -> None:
        corrupt = self._corrupt
        corrupt.note(batch)
        if batch.problems and corrupt.exceeds(len(corrupt.seen)):
            some = "; ".join(list(corrupt.seen.values())[:3])
            raise UserError(
                f"{len(corrupt.seen)} corrupt images among about {corrupt.total:.0f} of this rank, "
                f"more than the limit of {corrupt.limit:.2%}: {some}",
                where="max_corrupt",
                remedy="mend or drop these samples, or raise max_corrupt",
            )


def _manifest_of(data: str | os.PathLike[str] | Sequence[str | Path]) -> Path:
    """A manifest as it is, or that of the shards, made once on this node."""
    if isinstance(data, str | os.PathLike) and str(data).endswith(".arrow"):
        return Path(data)
    shards = expand(data)  # type: ignore[arg-type]
    what = repr([_as_it_is_now(shard) for shard in shards])
    path = _cache_folder() / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):  # ranks of a node start together: one of them indexes
        if not path.exists():
            index(shards, allow_empty_classes=True).save(path)
    return path


def _as_it_is_now(shard: str) -> tuple[str, int, int]:
    if is_remote(shard):  # without asking for each: a reader refuses one of another length
        return shard, 0, 0
    stat = os.stat(shard)
    return os.path.abspath(shard), stat.st_size, stat.st_mtime_ns


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cnn2gnn"
