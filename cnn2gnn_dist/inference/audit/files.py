"""The audit as files: Parquet tables, the same as CSV, and the map that embedding-atlas opens.

labels.parquet      doubtful labels, most doubtful first, each with its neighbors
duplicates.parquet  exact and near-duplicates, within the training images and across to held-out ones
outliers.parquet    all images by the distance to their neighbors
hubs.parquet        all images by the number of images whose neighbor they are
bleeding.parquet    pairs of classes by the votes that they get from each other
map.parquet         one row per image: picture, z, neighbors (``embedding-atlas map.parquet --vector z``)
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnn2gnn_dist import durable
from cnn2gnn_dist.inference.audit.findings import Findings, TrainingSet

NEIGHBOURS = 6
"""Neighbors listed as evidence."""
MAP_ROWS = 1024
Pictures = Callable[[Sequence[int]], list[bytes | None]]
"""Rows → encoded images."""


def tables(
    given: TrainingSet,
    found: Findings,
    keys: Sequence[str],
    held_keys: Sequence[str],
    held_labels_Q: np.ndarray,
    exact_P: np.ndarray,
) -> dict[str, pa.Table]:
    """The tables by name; ``exact_P``: which pairs of ``found.across`` are byte-identical."""
    return {
        "labels": _labels(given, found, keys),
        "duplicates": _duplicates(given, found, keys, held_keys, held_labels_Q, exact_P),
        "outliers": _outliers(given, found, keys),
        "hubs": _hubs(given, found, keys),
        "bleeding": _bleeding(given, found),
    }


def evidence(found: Findings, row: int) -> list[tuple[int, float]]:
    """The neighbors of an image and their weights, highest first."""
    order = np.argsort(-found.weight_Nk[row], kind="stable")[:NEIGHBOURS]
    pairs = ((int(found.ids_Nk[row, slot]), float(found.weight_Nk[row, slot])) for slot in order)
    return [(other, weight) for other, weight in pairs if other >= 0 and weight > 0]


def _labels(given: TrainingSet, found: Findings, keys: Sequence[str]) -> pa.Table:
    rows = found.doubtful(given.labels_N)
    scores, names = found.labels, given.classes
    near = [evidence(found, row) for row in rows.tolist()]
    return pa.table(
        {
            "key": [keys[row] for row in rows.tolist()],
            "class": [names[int(given.labels_N[row])] for row in rows],
            "suggested": [names[int(scores.suggested_N[row])] for row in rows],
            "score": scores.score_N[rows],
            "margin": scores.margin_N[rows],
            "p_head": scores.head_N[rows],
            "p_neighbours": scores.vote_N[rows],
            "both_agree": scores.agree_N[rows],
            "neighbours": pa.array([[keys[i] for i, _ in one] for one in near], _LIST),
            "neighbour_classes": pa.array(
                [[names[int(given.labels_N[i])] for i, _ in one] for one in near], _LIST
            ),
            "neighbour_weights": pa.array([[w for _, w in one] for one in near], _WEIGHTS),
        }
    )


def _duplicates(
    given: TrainingSet,
    found: Findings,
    keys: Sequence[str],
    held_keys: Sequence[str],
    held_labels_Q: np.ndarray,
    exact_P: np.ndarray,
) -> pa.Table:
    lines: list[tuple[str, str, str, str, str, str, float, float | None]] = []
    names = given.classes

    def line(kind: str, other: str, a: int, b: int, cosine: float, pixels: float) -> None:
        held = other == "held-out"
        first = (
            (held_keys[a], names[int(held_labels_Q[a])])
            if held
            else (keys[a], names[int(given.labels_N[a])])
        )
        likeness = None if np.isnan(pixels) else pixels
        second = names[int(given.labels_N[b])]
        lines.append((kind, other, *first, keys[b], second, cosine, likeness))

    if found.across is not None:
        for a, b, cosine, _, pixels, exact in zip(*found.across[:5], exact_P, strict=True):
            line("exact" if exact else "near", "held-out", a, b, float(cosine), float(pixels))
    for b, a in found.twins_P2.tolist():
        line("exact", "train", a, b, 1.0, 1.0)
    for a, b, cosine, _, pixels in zip(*found.within[:5], strict=True):
        line("near", "train", a, b, float(cosine), float(pixels))
    # Pairs with held-out images first, since they distort results, then exact ones, then by distance.
    lines.sort(key=lambda row: (row[1] != "held-out", row[0] != "exact"))  # stable: closest first
    columns = list(zip(*lines, strict=True)) or [()] * len(_DUPLICATES.names)
    made = pa.table(
        [pa.array(column, kind) for column, kind in zip(columns, _DUPLICATES.types, strict=True)],
        schema=_DUPLICATES,
    )
    same = pc.equal(made["class"], made["other_class"])
    return made.append_column("same_class", same)


def _classes(given: TrainingSet, rows: np.ndarray) -> list[str]:
    return [given.classes[label] for label in given.labels_N[rows].tolist()]


def _outliers(given: TrainingSet, found: Findings, keys: Sequence[str]) -> pa.Table:
    rows = np.flatnonzero(np.isfinite(found.labels.score_N))
    rows = rows[np.argsort(-found.reach_N[rows], kind="stable")]
    return pa.table(
        {
            "key": [keys[row] for row in rows.tolist()],
            "class": _classes(given, rows),
            "distance": found.reach_N[rows],
            "rank": found.rank_N[rows],
        }
    )


def _hubs(given: TrainingSet, found: Findings, keys: Sequence[str]) -> pa.Table:
    rows = np.argsort(-found.degree_N, kind="stable")
    rows = rows[np.isfinite(found.labels.score_N[rows])]
    return pa.table(
        {
            "key": [keys[row] for row in rows.tolist()],
            "class": _classes(given, rows),
            "in_degree": found.degree_N[rows],
            "same_class": pa.array(found.same_N[rows], from_pandas=True),
        }
    )


def _bleeding(given: TrainingSet, found: Findings) -> pa.Table:
    one = found.bleeding
    return pa.table(
        {
            "class": [given.classes[c] for c in one.a_P],
            "other_class": [given.classes[c] for c in one.b_P],
            "votes": one.mass_P,
            "votes_from_other": one.a_to_b_P,
            "votes_to_other": one.b_to_a_P,
        }
    )


def write(folder: Path, name: str, table: pa.Table, *, as_csv: bool) -> list[Path]:
    """Write a table as Parquet, and as CSV if requested; files are replaced atomically."""
    written = [folder / f"{name}.parquet"]
    with durable.replacing(written[0]) as path:
        pq.write_table(table, path)
    if as_csv:
        written.append(folder / f"{name}.csv")
        with durable.replacing(written[1]) as path:
            _write_csv(path, table)
    return written


def write_map(
    path: Path,
    given: TrainingSet,
    found: Findings,
    keys: Sequence[str],
    pictures: Iterable[list[bytes | None]],
) -> None:
    """Write the map, in bounded memory.

    Args:
        path: file.
        given: the training images.
        found: what the audit found.
        keys: of all images.
        pictures: encoded images, in blocks of ``MAP_ROWS`` rows.
    """

    def blocks() -> Iterator[pa.RecordBatch]:
        for number, images in enumerate(pictures):
            rows = np.arange(number * MAP_ROWS, number * MAP_ROWS + len(images))
            yield _map_rows(given, found, keys, rows, images)

    with durable.replacing(path) as temporary, pq.ParquetWriter(temporary, _MAP) as writer:
        for block in blocks():
            writer.write_batch(block)


def _map_rows(
    given: TrainingSet,
    found: Findings,
    keys: Sequence[str],
    rows: np.ndarray,
    images: list[bytes | None],
) -> pa.RecordBatch:
    # Lists of equal length, as embedding-atlas requires, no longer than the longest; missing entries are -1.
    ids, far = found.ids_Nk[rows], np.sqrt(found.far_Nk[rows])
    last = np.where(np.isfinite(far), far, 0).max(1, keepdims=True)
    far = np.where(np.isfinite(far), far, last)
    near = [{"ids": i, "distances": d} for i, d in zip(ids.tolist(), far.tolist(), strict=True)]
    score = found.labels.score_N[rows]
    columns = [
        [keys[row] for row in rows.tolist()],
        [given.classes[label] if label >= 0 else None for label in given.labels_N[rows].tolist()],
        [given.classes[label] for label in found.labels.suggested_N[rows].tolist()],
        np.where(np.isfinite(score), score, 0).astype(np.float32),
        found.rank_N[rows],
        found.degree_N[rows],
        [None if data is None else {"bytes": data, "path": None} for data in images],
        list(np.asarray(given.z_Nd[rows], np.float32)),
        near,
    ]
    arrays = [pa.array(column, kind) for column, kind in zip(columns, _MAP.types, strict=True)]
    return pa.record_batch(arrays, schema=_MAP)


def _write_csv(path: Path, table: pa.Table) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(table.column_names)
        for batch in table.to_batches(max_chunksize=4096):
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                lines.writerow([_cell(value) for value in row])


def _cell(value: object) -> object:
    if isinstance(value, list):
        return ";".join(str(_cell(one)) for one in value)
    return f"{value:.5g}" if isinstance(value, float) else value


_LIST, _WEIGHTS = pa.list_(pa.string()), pa.list_(pa.float32())
_DUPLICATES = pa.schema(
    [
        ("kind", pa.string()),
        ("set", pa.string()),
        ("key", pa.string()),
        ("class", pa.string()),
        ("other_key", pa.string()),
        ("other_class", pa.string()),
        ("cosine", pa.float32()),
        ("pixels", pa.float32()),
    ]
)
_MAP = pa.schema(
    [
        ("key", pa.string()),
        ("class", pa.string()),
        ("suggested", pa.string()),
        ("doubt", pa.float32()),
        ("outlier_rank", pa.float32()),
        ("in_degree", pa.int64()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("z", pa.list_(pa.float32())),
        (
            "neighbors",
            pa.struct([("ids", pa.list_(pa.int64())), ("distances", pa.list_(pa.float32()))]),
        ),
    ]
)
