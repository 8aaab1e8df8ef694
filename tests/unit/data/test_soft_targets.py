"""Soft targets on disk: they round-trip, and corruption is detected."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist.data import soft_targets as targets_module
from cnn2gnn_dist.data.soft_targets import Targets, corrupt_samples, is_complete, write_shard
from cnn2gnn_dist.errors import UserError

META = {"key": "abc", "views": [0, 1]}


def teacher(views: int, n: int, classes: int, seed: int = 0) -> np.ndarray:
    """Log-probabilities [V, n, C] float64."""
    logits = np.random.default_rng(seed).normal(0, 3, (views, n, classes))
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def top(log_VNC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    classes = np.argsort(-log_VNC, axis=-1)[..., :k]
    values = np.take_along_axis(log_VNC, classes, -1)
    return classes.astype(np.int32), values.astype(np.float16)


def write_all(
    folder: Path,
    log_VNC: np.ndarray,
    k: int,
    *,
    shard_size: int = 7,
    meta: dict = META,
    places: np.ndarray | None = None,
) -> list[Path]:
    """Files of ``shard_size`` samples each, in the order of ``places``."""
    views, n, _ = log_VNC.shape
    places, files = np.arange(n) if places is None else places, []
    for first in range(0, n, shard_size):
        ids = places[first : min(first + shard_size, n)]
        indices, values = top(log_VNC[:, ids], k)
        files.append(folder / f"{first:06d}.parquet")
        write_shard(
            files[-1], ids=ids, view_count=views, indices=indices, log_probs=values, meta=meta
        )
    return files


def dense(log_NC: np.ndarray, k: int) -> np.ndarray:
    """Probabilities [N, C] that a lookup should give, row by row."""
    made = np.empty(log_NC.shape)
    for row, log_C in enumerate(log_NC):
        kept = np.argsort(-log_C)[:k]
        values = np.exp(log_C[kept].astype(np.float16).astype(np.float64))
        made[row] = max(1 - values.sum(), 1e-6) / max(len(log_C) - k, 1)
        made[row, kept] = values
    return made / made.sum(1, keepdims=True)


@pytest.mark.parametrize(("views", "classes", "k"), [(1, 10, 3), (3, 10, 10), (2, 5, 1), (2, 2, 1)])
def test_round_trip(tmp_path, views, classes, k):
    log_VNC = teacher(views, 25, classes)
    files = write_all(tmp_path, log_VNC, k)
    for source in (tmp_path, str(tmp_path), files, iter(files[::-1])):
        targets = Targets.load(source, 25, classes, META)
        assert targets.views == views
        ids = np.random.default_rng(1).permutation(25)[:9]
        for view in (0, views - 1, views + 1, 5 * views):
            found = targets.lookup(ids, view)
            assert found.shape == (9, classes)
            assert found.dtype == np.float32
            wanted = dense(log_VNC[view % views, ids], k)
            np.testing.assert_allclose(np.exp(found), wanted, rtol=2e-5, atol=1e-7)
            np.testing.assert_allclose(np.exp(found).sum(1), 1, atol=2e-6)


def test_the_mean_is_that_of_all_looked_up(tmp_path, monkeypatch):
    """Over more rows than are read at a time."""
    monkeypatch.setattr(targets_module, "MEAN_ROWS", 4)
    log_VNC = teacher(2, 11, 6)
    for k in (6, 3):
        folder = tmp_path / str(k)
        folder.mkdir()
        write_all(folder, log_VNC, k)
        targets = Targets.load(folder, 11, 6)
        wanted = np.exp(targets.lookup(np.arange(11), 0).astype(np.float64)).mean(0)
        np.testing.assert_allclose(targets.mean(), wanted, rtol=1e-6)


@pytest.mark.parametrize("k", [7, 3, 1])
def test_the_mean_is_without_corrupt_images(tmp_path, monkeypatch, k):
    """Their targets are uniform, as the stage writes them: with a twentieth of them the rarest class of a long tail
    had twice its share."""
    monkeypatch.setattr(targets_module, "MEAN_ROWS", 4)
    log_VNC = teacher(2, 11, 7)
    log_VNC[:, [2, 9]] = -np.log(7)
    write_all(tmp_path, log_VNC, k)
    targets = Targets.load(tmp_path, 11, 7)
    np.testing.assert_array_equal(np.flatnonzero(targets.uniform()), [2, 9])
    kept = np.setdiff1d(np.arange(11), [2, 9])
    wanted = np.exp(targets.lookup(kept, 0).astype(np.float64)).mean(0)
    np.testing.assert_allclose(targets.mean(), wanted, rtol=1e-6)
    nothing = Targets(None, np.full((1, 9, 7), -np.log(7), np.float16), 7)
    assert not nothing.uniform().any()
    np.testing.assert_allclose(nothing.mean(), 1 / 7, rtol=1e-3)


def test_the_rest_is_spread_evenly(tmp_path):
    log_VNC = np.log(np.array([[[0.5, 0.02, 0.3, 0.1, 0.08]]]))
    write_all(tmp_path, log_VNC, 2)
    found = np.exp(Targets.load(tmp_path, 1, 5).lookup(np.array([0]), 0))[0]
    np.testing.assert_allclose(found, [0.5, 0.2 / 3, 0.3, 0.2 / 3, 0.2 / 3], atol=3e-4)


def test_a_sure_teacher_leaves_no_class_impossible(tmp_path):
    """With all mass in the top k, in float16 even more than 1, logarithms stay finite."""
    classes, values = np.array([[[2, 0]]], np.int32), np.array([[[0.0, -9.0]]], np.float16)
    path = tmp_path / "a.parquet"
    write_shard(path, ids=np.array([0]), view_count=1, indices=classes, log_probs=values, meta=META)
    found = Targets.load(tmp_path, 1, 4).lookup(np.array([0]), 0)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found).sum(), 1, atol=1e-6)
    assert found[0, 2] > -1e-3


def test_all_classes_are_exact_far_into_the_tail(tmp_path):
    """Nothing is clipped: the ratios of unlikely classes are those written."""
    log_VNC = teacher(2, 8, 12)
    log_VNC[..., 5] = -60.0
    write_all(tmp_path, log_VNC, 12)
    targets = Targets.load(tmp_path, 8, 12)
    assert targets.indices_VNK is None  # classes in order need no indices
    half = log_VNC.astype(np.float16).astype(np.float64)
    wanted = half - np.log(np.exp(half).sum(-1, keepdims=True))
    for view in (0, 1):
        found = targets.lookup(np.arange(8), view)
        np.testing.assert_allclose(found, wanted[view], rtol=1e-6, atol=1e-6)


def test_memory_is_dense_and_small(tmp_path):
    write_all(tmp_path, teacher(2, 25, 10), 3)
    targets = Targets.load(tmp_path, 25, 10)
    assert targets.indices_VNK.dtype == np.uint8
    assert targets.log_probs_VNK.dtype == np.float16
    assert targets.indices_VNK.shape == targets.log_probs_VNK.shape == (2, 25, 3)


def test_a_file_is_complete_or_not(tmp_path):
    path = write_all(tmp_path, teacher(2, 6, 5), 2)[0]
    assert is_complete(path, META)
    assert is_complete(path, dict(reversed(META.items())))  # the order of keys doesn't matter
    assert not is_complete(path, {**META, "key": "abd"})
    assert not is_complete(tmp_path / "none.parquet", META)
    assert list(tmp_path.glob("*.tmp")) == []
    data = path.read_bytes()
    for size in (0, 3, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        assert not is_complete(path, META)


def test_no_flipped_byte_changes_what_is_read(tmp_path):
    """For any byte of the file: either the corruption is detected, or the contents are as written."""
    log_VNC = teacher(2, 40, 6)
    path = write_all(tmp_path, log_VNC, 3, shard_size=40)[0]
    wanted = Targets.load(tmp_path, 40, 6, META)
    data = path.read_bytes()
    noticed = 0
    for place in range(0, len(data), 5):
        damaged = bytearray(data)
        damaged[place] ^= 0x15
        path.write_bytes(damaged)
        if not is_complete(path, META):
            noticed += 1
            continue
        found = Targets.load(tmp_path, 40, 6, META)
        np.testing.assert_array_equal(found.indices_VNK, wanted.indices_VNK)
        np.testing.assert_array_equal(found.log_probs_VNK, wanted.log_probs_VNK)
    assert noticed > 100


def test_a_changed_value_is_noticed_by_the_checksum(tmp_path):
    """A valid Parquet file with one number changed."""
    path = write_all(tmp_path, teacher(1, 6, 5), 2)[0]
    table = pq.read_table(path)
    ids = table["id"].to_numpy().copy()
    ids[2] = 3
    pq.write_table(table.set_column(0, table.schema.field(0), [ids]), path)
    assert not is_complete(path, META)
    with pytest.raises(UserError, match="checksum") as caught:
        Targets.load([path], 6, 5)
    assert caught.value.where == str(path)


def refused(match: str, where: Path | str, *arguments) -> None:
    with pytest.raises(UserError, match=match) as caught:
        Targets.load(*arguments)
    assert caught.value.where == str(where)
    assert "run `cnn2gnn targets` again" in caught.value.remedy


def test_what_is_wrong_is_named(tmp_path):
    files = write_all(tmp_path, teacher(2, 20, 5), 2)
    refused("4 of 24 samples have no soft targets", "targets", tmp_path, 24, 5)
    refused("sample ids up to 19, but there are 19", files[2], tmp_path, 19, 5)
    refused("but there are 3 classes", files[0], tmp_path, 20, 3)
    refused("different targets", files[0], tmp_path, 20, 5, {"key": "x"})
    refused("missing", tmp_path / "x.parquet", [*files, tmp_path / "x.parquet"], 20, 5)
    refused("20 of 20 samples", "targets", tmp_path / "no folder", 20, 5)
    files[1].write_bytes(files[1].read_bytes()[:-50])
    refused("can't be used", files[1], tmp_path, 20, 5)
    files[1].unlink()
    refused("7 of 20 samples have no soft targets", "targets", tmp_path, 20, 5)


def test_negative_ids_and_views_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    indices, values = top(teacher(1, 4, 5), 2)
    how = {"view_count": 1, "indices": indices, "log_probs": values, "meta": META}
    write_shard(path, ids=np.array([0, 1, -1, -2]), **how)
    refused("can't be used", path, tmp_path, 4, 5)
    write_shard(path, ids=np.arange(4), **how)
    with_other_columns(path, view=pa.array([0, -1, 0, 0], pa.int32()))
    refused("can't be used", path, tmp_path, 4, 5)


def with_other_columns(path: Path, **columns: pa.Array) -> None:
    """Replace columns of a file, under a valid checksum."""
    table = pq.read_table(path)
    note = dict(table.schema.metadata)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, values)
    pq.write_table(table, path)
    _, found = targets_module._read(path)
    note[targets_module.CHECKSUM] = targets_module._checksum(found)
    pq.write_table(table.replace_schema_metadata(note), path)


def test_a_class_that_occurs_twice_is_refused(tmp_path):
    """With all classes in every row their order is implied, so a repeated class would go unnoticed."""
    path = write_all(tmp_path, teacher(1, 2, 3), 3)[0]
    classes = pa.FixedSizeListArray.from_arrays(pa.array([0, 1, 2, 2, 1, 2], pa.int32()), 3)
    with_other_columns(path, indices=classes)
    assert is_complete(path, META)
    refused("a class occurs twice", path, tmp_path, 2, 3)


def test_corrupt_samples_and_their_reasons_are_kept(tmp_path):
    indices, values = top(teacher(1, 4, 5), 2)
    path = tmp_path / "made" / "with its folders" / "a.parquet"
    how = {"view_count": 1, "indices": indices, "log_probs": values, "meta": META}
    write_shard(path, ids=np.arange(4), **how, corrupt={2: "b.png: cut off"})
    assert corrupt_samples(path) == {2: "b.png: cut off"}
    assert is_complete(path, META)
    write_shard(path, ids=np.arange(4), **how)
    assert corrupt_samples(path) == {}


def test_a_sample_without_one_of_its_views(tmp_path):
    """A file with rows that ``write_shard`` never produces, but with a valid checksum."""
    path = write_all(tmp_path, teacher(2, 6, 5), 2)[0]
    table = pq.read_table(path).filter([True] * 8 + [False] + [True] * 3)
    pq.write_table(table, path)
    _, columns = targets_module._read(path)
    note = {**table.schema.metadata, targets_module.CHECKSUM: targets_module._checksum(columns)}
    pq.write_table(table.replace_schema_metadata(note), path)
    assert is_complete(path, META)
    refused("1 of 6 samples have no soft targets", "targets", tmp_path, 6, 5)


@pytest.mark.parametrize(("views", "k"), [(1, 2), (2, 3), (3, 2)])
def test_files_of_other_views_or_k_do_not_mix(tmp_path, views, k):
    write_all(tmp_path, teacher(2, 7, 5), 2)
    path = tmp_path / "z.parquet"
    indices, values = top(teacher(views, 3, 5), k)
    write_shard(
        path,
        ids=np.arange(7, 10),
        view_count=views,
        indices=indices,
        log_probs=values,
        meta=META,
    )
    refused("its views or its k differ", path, tmp_path, 10, 5)


def test_an_empty_shard_and_one_of_another_kind(tmp_path):
    write_all(tmp_path, teacher(2, 7, 5), 2)
    none = np.empty((2, 0, 2))
    write_shard(
        tmp_path / "empty.parquet",
        ids=np.empty(0, np.int64),
        view_count=2,
        indices=none.astype(np.int32),
        log_probs=none.astype(np.float16),
        meta=META,
    )
    assert is_complete(tmp_path / "empty.parquet", META)
    assert Targets.load(tmp_path, 7, 5).views == 2
    pq.write_table(pq.read_table(tmp_path / "empty.parquet").select(["id"]), tmp_path / "f.parquet")
    assert not is_complete(tmp_path / "f.parquet", META)
    refused("can't be used", tmp_path / "f.parquet", tmp_path, 7, 5)


def test_shapes_must_fit(tmp_path):
    indices, values = top(teacher(2, 4, 5), 2)
    for change in ({"ids": np.arange(3)}, {"view_count": 1}, {"log_probs": values[:, :, :1]}):
        how = {"ids": np.arange(4), "view_count": 2, "indices": indices, "log_probs": values}
        with pytest.raises(ValueError, match="shapes"):
            write_shard(tmp_path / "a.parquet", **{**how, **change}, meta=META)
    assert not list(tmp_path.iterdir())


def test_written_again_it_is_replaced_whole(tmp_path):
    path = write_all(tmp_path, teacher(1, 5, 4), 2)[0]
    first = path.read_bytes()
    (tmp_path / "000000.parquet.tmp").write_bytes(b"left by a kill")
    write_all(tmp_path, teacher(1, 5, 4), 2)
    assert path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["000000.parquet"]
