"""Build the columns of a manifest shard by shard; memory grows only with the columns."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from cnn2gnn_dist import log
from cnn2gnn_dist.data.index import class_names
from cnn2gnn_dist.data.index.class_matching import ClassInfo, check_count
from cnn2gnn_dist.data.index.class_names import NamedClass
from cnn2gnn_dist.data.index.manifest_file import Shard
from cnn2gnn_dist.data.index.shard_rows import COLUMNS, ReadOptions, ShardRows, read_shard
from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.data.tar.tar_file import SkippedMembers

_DOWNLOADS = 4  # concurrent downloads of remote shards
SHORT = 1 << 31  # bytes addressable with 32-bit offsets
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class IndexedShards:
    """All rows of the shards.

    Columns ``NAME_N`` are as in the manifest. With them come the keys, the checksums (or None), the class names
    and count, and the members that were left out.
    """

    shards: tuple[Shard, ...]
    class_info: ClassInfo
    columns: dict[str, np.ndarray]
    keys: pa.Array
    crc_N: np.ndarray | None
    skipped: SkippedMembers


def gather(
    shards: Sequence[Path | str],
    *,
    num_classes: int | None = None,
    names: bool = True,
    require_labels: bool = True,
    checksums: bool = False,
    workers: int | None = None,
    progress: bool = True,
) -> IndexedShards:
    """Read the shards in order; see :func:`cnn2gnn_dist.data.index.manifest.index`.

    ``num_classes`` bounds the labels; ``names`` enables reading of class names.
    """
    given = [os.fspath(shard) for shard in shards]
    paths = [name if urls.is_remote(name) else os.path.abspath(name) for name in given]
    far = any(map(urls.is_remote, paths))
    checksums = checksums or far  # data read over a network is verified against them
    workers = workers or (_DOWNLOADS if far else 1)
    options = ReadOptions(num_classes, require_labels, checksums, names)
    found: dict[int, NamedClass] = {}
    declared = 0
    if names:
        found, declared = class_names.lists_beside(paths)

    def read(path: str) -> ShardRows:
        if not urls.is_remote(path):
            return read_shard(path, options, found)
        with urls.local_copy(path) as local:
            return read_shard(os.fspath(local), options, found, where=path)

    parts: list[ShardRows] = []
    skipped = SkippedMembers()
    bar = log.progress(total=len(paths), desc="index", unit="shard", disable=not progress)
    with bar:
        for rows in in_order(read, paths, workers):
            class_names.merge(found, rows.names)
            skipped.merge(rows.skipped)
            parts.append(rows)
            bar.update()
    label_N = np.concatenate([rows.label_n for rows in parts])
    highest = int(label_N.max(initial=-1))
    if num_classes is None:
        check_count(highest + 1, len(label_N), paths[0])
    class_info = ClassInfo(
        {label: n.name for label, n in found.items()}, max(declared, highest + 1)
    )
    return IndexedShards(
        tuple(Shard(p, rows.bytes, len(rows)) for p, rows in zip(paths, parts, strict=True)),
        class_info,
        _columns(parts),
        joined([rows.keys_n for rows in parts]),
        np.concatenate([rows.crc_n for rows in parts]) if checksums else None,
        skipped,
    )


def _columns(parts: list[ShardRows]) -> dict[str, np.ndarray]:
    counts = [len(rows) for rows in parts]
    return {
        "shard_N": np.repeat(np.arange(len(parts), dtype=COLUMNS["shard"]), counts),
        "offset_N": np.concatenate([rows.offset_n for rows in parts]),
        "size_N": np.concatenate([rows.size_n for rows in parts]),
        "label_N": np.concatenate([rows.label_n for rows in parts]),
        "row_in_shard_N": np.concatenate([np.arange(n, dtype=np.int32) for n in counts]),
    }


def joined(keys: list[pa.Array]) -> pa.Array:
    """Concatenate Arrow arrays, with 32-bit offsets if the result is below 2 GiB."""
    whole = pa.concat_arrays(keys)
    return whole.cast(pa.string()) if whole.nbytes < SHORT else whole


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Map ``work`` over the items in order, a few items ahead in threads when ``workers`` > 1.

    Threads pay off where reads have latency: network file systems and remote shards.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    ahead: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="index")
    try:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
