"""Logits that were computed elsewhere: matched by key and class name, and checked for completeness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.stages.shared.ready_logits import read_logits
from tests.support.shards import make_shards, random_images

CLASSES = ("cat", "dog", "eel")
N = 6


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("set")
    return index(make_shards(folder, random_images(N), [0, 1, 2] * 2), classes=CLASSES)


def written(path: Path, columns: dict[str, Any], classes: tuple[str, ...] | None = None) -> Path:
    table = pa.table(columns)
    if classes is not None:
        table = table.replace_schema_metadata({b"classes": json.dumps(classes).encode()})
    pq.write_table(table, path)
    return path


def logits(rows: int = N) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, len(CLASSES))).astype(np.float32) * 3


def log_softmax(values: np.ndarray) -> np.ndarray:
    return values - np.log(np.exp(values).sum(1, keepdims=True))


def test_rows_are_found_by_key_in_any_order(manifest: Manifest, tmp_path: Path) -> None:
    """Even among rows of other images."""
    order = [3, 1, 5, 0, 4, 2]
    keys = [manifest.key(n) for n in order] + ["another"]
    values = logits(N + 1)
    path = written(tmp_path / "l.parquet", {"key": keys, "logits": values.tolist()})
    wanted = log_softmax(values[:N])[np.argsort(order)]
    np.testing.assert_allclose(read_logits(path, manifest), wanted, atol=1e-5)


def test_rows_are_found_by_id(manifest: Manifest, tmp_path: Path) -> None:
    values = logits()
    columns = {"id": list(range(N))[::-1], "logits": values.tolist()}
    found = read_logits(written(tmp_path / "l.parquet", columns), manifest)
    np.testing.assert_allclose(found, log_softmax(values)[::-1], atol=1e-5)


def test_rows_without_an_id_are_other_images(manifest: Manifest, tmp_path: Path) -> None:
    values = logits(N + 1)
    columns = {"id": [*range(N), None], "logits": values.tolist()}
    found = read_logits(written(tmp_path / "l.parquet", columns), manifest)
    np.testing.assert_allclose(found, log_softmax(values)[:N], atol=1e-5)


def test_classes_are_matched_by_name(manifest: Manifest, tmp_path: Path) -> None:
    values = logits()
    columns = {"id": list(range(N)), "logits": values.tolist()}
    path = written(tmp_path / "l.parquet", columns, ("eel", "cat", "dog"))
    np.testing.assert_allclose(
        read_logits(path, manifest), log_softmax(values)[:, [1, 2, 0]], atol=1e-5
    )


def test_two_classes_of_one_name_are_not_told_apart_by_it(tmp_path: Path) -> None:
    """ImageNet has two cranes: taken by name, both would get the first one's column."""
    classes = ("crane", "dog", "crane")
    images = index(make_shards(tmp_path, random_images(N), [0, 1, 2] * 2), classes=classes)
    values = logits()
    columns = {"id": list(range(N)), "logits": values.tolist()}
    found = read_logits(written(tmp_path / "l.parquet", columns, classes), images)
    np.testing.assert_allclose(found, log_softmax(values), atol=1e-5)
    with pytest.raises(UserError, match="two classes have the same name"):
        read_logits(written(tmp_path / "l.parquet", columns, ("dog", "crane", "crane")), images)


@pytest.mark.parametrize(
    ("columns", "classes", "says"),
    [
        ({"id": [0, 1, 2, 3, 4], "logits": logits(5).tolist()}, None, "1 of 6 training images have no"),
        ({"id": [0, 1, 2, 3, 4, 5, 5], "logits": logits(7).tolist()}, None, "more than one row"),
        ({"id": [*range(6)], "logits": logits()[:, :2].tolist()}, None, "2 logits for 3 classes"),
        ({"id": [*range(6)], "logits": logits().tolist()}, ("cat", "dog", "fox"), "eel, fox"),
        ({"id": [*range(6)], "logits": (logits() * np.inf).tolist()}, None, "not finite"),
        ({"id": [*range(2)], "logits": [[1.0], [1.0, 2.0]]}, None, "different lengths"),
        ({"id": [*range(6)], "logits": [1.0] * 6}, None, "no lists of numbers"),
        ({"id": [*range(8)], "logits": logits(8).tolist()}, None, "ids up to 7, but only 6 training images"),
        ({"id": ["x"] * 6, "logits": logits().tolist()}, None, "no integers"),
        ({"name": [*range(6)], "logits": logits().tolist()}, None, "the columns are logits, name"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    manifest: Manifest, tmp_path: Path, columns: dict, classes: tuple | None, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        read_logits(written(tmp_path / "l.parquet", columns, classes), manifest)


def test_a_file_that_is_not_parquet_is_the_users_error(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no")
    for name in ("x.parquet", "absent.parquet"):
        with pytest.raises(UserError, match="can't be read"):
            read_logits(tmp_path / name, manifest)
