"""A data stream for any training script: exact global batches, resumable from a cursor.

::

    stream = Stream("shards/train-{0000..0063}.tar", global_batch=256, views=ViewSpec("crop_flip", 32))
    for epoch in range(stream.epoch, 10):
        for batch in stream:                      # this rank's rows of each global batch
            images, labels, valid = batch.tensors(device)
            ...
        torch.save({"stream": stream.state_dict(), ...}, "last.pt")
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.images.crops import Crops, Views, crops_of, identity, identity_today
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.class_names import lists_of
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.mixing import partners
from cnn2gnn_dist.data.order import Order, sequential_batch
from cnn2gnn_dist.data.reading.corrupt import CorruptSamples
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Batch, ReaderSpec, Request
from cnn2gnn_dist.data.reading.shard_files import CacheSpec
from cnn2gnn_dist.data.storage.shard_paths import expand
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import ShardChanged, UserError
from cnn2gnn_dist.runtime.ranks import Ranks

_VERSION = 1
_NOT_YET = {"pairs": False}
"""Fields missing in older states, and the values that they imply."""


class Stream:
    """This rank's rows of the global batches of a data set, epoch after epoch.

    ``for batch in stream`` yields the rest of the current epoch and then advances to the next one.
    The order depends only on the data, ``seed``, ``global_batch`` and ``window``, never on ranks,
    readers or backend. The only state is a cursor (epoch, batch), so it can be loaded at another world
    size, and no earlier data is read again.

    Args:
        data: WebDataset tar shards (path, glob, ``{0000..1023}``, folder, or several of them), or
            a saved manifest (``.arrow``). Shards are indexed once, and the manifest is cached in the
            user's cache folder ($XDG_CACHE_HOME).
        global_batch: G, samples per step over all ranks; a multiple of the world size.
        views: view specification; every epoch uses a new view. Or groups of several views of each sample,
            which is decoded once: ``[Crops(ViewSpec(...), 2), ...]``, ``multi_crop()``.
        seed: seed of the order (``views.seed`` is that of the views).
        window: number of shards shuffled together (see docs/order.md).
        backend: "local" (threads), "processes" (children of this process; small images), "ray" (actors; Ray
            must be initialized), "auto" (ray if initialized, else local). Views with a hook: processes
            instead of threads.
        workers, prefetch: number of readers of this rank, and maximum requests in flight.
        rank, world_size: this rank and the number of ranks; default: from the launcher's environment.
        num_views: use view (epoch mod num_views); None: a new view each epoch.
        train: False: all samples in order, without augmentation and without skipping any; padding of
            the last batch has ``valid`` False.
        max_corrupt: maximum fraction of corrupt images among this rank's of an epoch before reading stops.
        decoded_bytes: maximum bytes of the host's cache of decoded images (small images; 0: none).
        cache_bytes: maximum bytes of complete remote shards in the user's cache folder (0: their samples
            are read in ranges).
        pairs: in training, read another sample to mix with each one (``batch.partners``, ``mix_pairs``).

    Raises:
        UserError: the data is missing, the sizes can't be divided over the ranks, the backend is unknown, or the
            cache folder can't be written to.
    """

    def __init__(
        self,
        data: str | os.PathLike[str] | Sequence[str | Path],
        *,
        global_batch: int,
        views: ViewSpec | Sequence[Crops],
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
        pairs: bool = False,
    ) -> None:
        ranks = Ranks.from_environment()
        self.rank = ranks.rank if rank is None else rank
        self.world_size = ranks.world_size if world_size is None else world_size
        self.manifest_path = _manifest_of(data)
        self.manifest = Manifest.load(self.manifest_path)
        self.seed, self.window, self.num_views, self.train = seed, window, num_views, train
        self.global_batch, self.pairs = global_batch, pairs
        self.views: Views = views if isinstance(views, ViewSpec) else crops_of(views)
        self.epoch = 0
        self.batch = 0
        self._order = Order(
            self.manifest.shard_sizes, seed=seed, global_batch=global_batch, window=window
        )
        self._order.check_ranks(self.world_size)
        read = share = len(self.manifest) / self.world_size
        if train and pairs:  # as many partners, drawn from all with replacement
            read += (len(self.manifest) - share) * -math.expm1(-1 / self.world_size)
        self._corrupt = CorruptSamples(max_corrupt, read)  # of an epoch: the next reads others
        self._pool = ReaderPool(
            ReaderSpec(
                str(self.manifest_path),
                self.views,
                decoded_bytes,
                CacheSpec(str(_cache_folder() / "shards"), cache_bytes),
            ),
            backend=backend,
            workers=workers,
            prefetch=prefetch,
        )

    def __len__(self) -> int:
        """Number of batches in a full epoch, the same on every rank."""
        if self.train:
            return self._order.batches_per_epoch
        return -(-len(self.manifest) // self.global_batch)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch. The cursor advances before each batch is yielded.

        Raises:
            UserError: a shard is missing or changed; too many corrupt images.
        """
        first = self.batch
        batches = self._read(self._request(index) for index in range(first, len(self)))
        for number, batch in enumerate(batches, first):
            self._count_corrupt(batch)
            if not self.train:
                batch.valid &= self._in_order(number)[1]
            elif self.pairs:
                batch, others = batch.halves()
                batch.partners = others
            self.batch = number + 1
            yield batch
        self.set_epoch(self.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Move to the start of an epoch (0 is the first)."""
        self.epoch, self.batch = epoch, 0
        self._corrupt.seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor after the last yielded batch, and the identity of the stream it belongs to."""
        return {"version": _VERSION, "epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume where another stream of the same data stopped, at any world size.

        Raises:
            UserError: the data, the order or the views differ from those of the state (the message
                names the field), so the cursor would refer to other samples.
        """
        mine = {"version": _VERSION, **self._identity()}
        state = {**state, "views": identity_today(state.get("views"))}
        for name, value in mine.items():
            if state.get(name, _NOT_YET.get(name)) != value:
                raise UserError(
                    f"this state belongs to a different stream: {name} is {state.get(name)!r} "
                    f"there and {value!r} here",
                    where=name,
                    remedy="use the same data and settings, or start over without the state",
                )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 0 or not 0 <= batch <= len(self):
            raise UserError(
                f"epoch {epoch}, batch {batch} is outside an epoch of {len(self)} batches",
                where="state",
                remedy="load a state returned by state_dict()",
            )
        self.set_epoch(epoch + (batch == len(self)))
        self.batch = batch % len(self)

    def close(self) -> None:
        """Stop the readers."""
        self._pool.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "data": self.manifest.digest,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "window": self.window,
            "num_views": self.num_views,
            "train": self.train,
            "views": identity(self.views),
            "pairs": self.pairs,
        }

    def _read(self, requests: Iterator[Request]) -> Iterator[Batch]:
        try:
            yield from self._pool.batches(requests)
        except ShardChanged as error:  # a stream has no command to run again
            raise UserError(
                error.what,
                where=error.where,
                remedy=f"restore the shard or, if the change is intended, remove {self.manifest_path} and"
                " index the shards again (a new Stream of the shards does)",
            ) from None

    def _request(self, index: int) -> Request:
        if not self.train:
            return Request(self._in_order(index)[0], CLEAN)
        ids = self._order.rank_batch(self.epoch, index, self.rank, self.world_size)
        view = self.epoch if self.num_views is None else self.epoch % self.num_views
        if self.pairs:
            seed = crops_of(self.views)[0].views.seed
            ids = np.concatenate([ids, partners(seed, ids, view, len(self.manifest))])
        return Request(ids, view)

    def _in_order(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this rank's ids of a batch in data order, and a mask that is False for padding."""
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
                remedy="fix or drop these samples, or raise max_corrupt",
            )


def _manifest_of(data: str | os.PathLike[str] | Sequence[str | Path]) -> Path:
    """Return a given manifest, or the manifest of the shards, built once per host."""
    if isinstance(data, str | os.PathLike) and str(data).endswith(".arrow"):
        return Path(data)
    shards = expand(data)  # type: ignore[arg-type]
    near = [os.path.abspath(shard) for shard in shards if not is_remote(shard)]
    what = repr([_as_it_is_now(path) for path in [*shards, *lists_of(near)]])
    path = _cache_folder() / f"{hashlib.sha256(what.encode()).hexdigest()[:24]}.arrow"
    if path.exists():  # complete, and the folder may be read-only
        return path
    try:
        durable.create_folder(path.parent)
    except UserError as error:
        raise UserError(
            error.what,
            where=error.where,
            remedy="set XDG_CACHE_HOME to a folder that you can write to, or give a saved manifest",
        ) from None
    with FileLock(f"{path}.lock"):  # ranks of a host start together: only one indexes
        if not path.exists():
            index(shards, allow_empty_classes=True).save(path)
    return path


def _as_it_is_now(shard: str) -> tuple[str, int, int]:
    if is_remote(shard):  # no request per shard: a reader refuses one of a different length
        return shard, 0, 0
    stat = os.stat(shard)
    return os.path.abspath(shard), stat.st_size, stat.st_mtime_ns


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cnn2gnn"
