"""From shards to the columns of a manifest, shard by shard: memory grows with the columns alone."""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from cnn2gnn_dist.data import urls
from cnn2gnn_dist.data.rows import COLUMNS, ShardRows, Wanted, read_shard
from cnn2gnn_dist.data.stored import Shard
from cnn2gnn_dist.errors import UserError

_DOWNLOADS = 4  # remote shards at a time
SHORT = 1 << 31  # bytes that 32-bit offsets reach
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Gathered:
    """All rows: columns ``NAME_N`` as in the manifest, keys, checksums or None, class names."""

    shards: tuple[Shard, ...]
    classes: tuple[str, ...]
    columns: dict[str, np.ndarray]
    keys: pa.Array
    crc_N: np.ndarray | None


def gather(
    shards: Sequence[Path | str],
    *,
    classes: Sequence[str] | None,
    require_labels: bool,
    checksums: bool,
    workers: int | None,
    progress: bool,
) -> Gathered:
    """Read the shards in their order; see :func:`cnn2gnn_dist.data.manifest.index`."""
    from tqdm import tqdm

    names = [os.fspath(shard) for shard in shards]
    paths = [name if urls.is_remote(name) else os.path.abspath(name) for name in names]
    far = any(map(urls.is_remote, paths))
    checksums = checksums or far  # what comes over a network is verified when it is read
    workers = workers or (_DOWNLOADS if far else 1)
    wanted = Wanted(None if classes is None else len(classes), require_labels, checksums)
    found: dict[int, str | None] = {}

    def read(path: str) -> ShardRows:
        if not urls.is_remote(path):
            return read_shard(path, wanted, found)
        with urls.local_copy(path) as local:
            return read_shard(os.fspath(local), wanted, found, where=path)

    parts: list[ShardRows] = []
    bar = tqdm(total=len(paths), desc="index", unit="shard", disable=None if progress else True)
    with bar:
        for rows in in_order(read, paths, workers):
            for label, name in rows.names.items():
                found.setdefault(label, name)
            parts.append(rows)
            bar.update()
    label_N = np.concatenate([rows.label_n for rows in parts])
    named = tuple(classes) if classes is not None else class_names(label_N, found)
    return Gathered(
        tuple(Shard(p, rows.bytes, len(rows)) for p, rows in zip(paths, parts, strict=True)),
        named,
        _columns(parts),
        joined([rows.keys_n for rows in parts]),
        np.concatenate([rows.crc_n for rows in parts]) if checksums else None,
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
    """One Arrow array of several, with 32-bit offsets where 2 GiB suffice."""
    whole = pa.concat_arrays(keys)
    return whole.cast(pa.string()) if whole.nbytes < SHORT else whole


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Result]:
    """Map in the order of the items, in threads when ``workers`` > 1, a few items ahead.

    Threads pay where reading waits: network file systems and remote shards.
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


def class_names(label_N: np.ndarray, found: dict[int, str | None]) -> tuple[str, ...]:
    """Name the classes 0..max; two of one name (ImageNet has two cranes) get their number added."""
    count = int(label_N.max(initial=-1)) + 1
    if count > max(1 << 20, len(label_N)):  # a stray 999999999 should not make that many names
        raise UserError(
            f"The highest label is {count - 1:,}, with {len(label_N):,} samples.",
            remedy="Number the classes from 0 without gaps, or give the class names.",
        )
    names = [found.get(label) or str(label) for label in range(count)]
    repeated = {name for name, times in Counter(names).items() if times > 1}
    return tuple(
        f"{name} ({label})" if name in repeated else name for label, name in enumerate(names)
    )


def refuse_empty_classes(label_N: np.ndarray, names: tuple[str, ...]) -> None:
    """Raise a UserError when labelled samples leave a class without any."""
    count_C = np.bincount(label_N[label_N >= 0], minlength=len(names))
    empty = np.flatnonzero(count_C == 0)
    if not len(empty) or not np.any(label_N >= 0):
        return
    listed = ", ".join(
        f"{label} ('{names[label]}')" if names[label] != str(label) else str(label)
        for label in empty[:5]
    )
    raise UserError(
        f"{len(empty)} of {len(names)} classes have no sample: {listed}"
        f"{', …' if len(empty) > 5 else ''}.",
        remedy="Add samples of them, number the classes without gaps, or allow empty classes "
        "if this is meant to be a part of a larger data set.",
    )
