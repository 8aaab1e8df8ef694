"""The manifest: what index reads, what saving and splitting preserve, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cnn2gnn_dist.data.index.manifest import Manifest, expand, index, split_per_class
from cnn2gnn_dist.data.index.split import split_labelled
from cnn2gnn_dist.errors import UserError
from tests.support.shards import data_dir, encode_image, make_shards, random_images, write_tar

IMAGES = random_images(20, 8, 8)
LABELS = [i % 3 for i in range(20)]


def shards_at(folder: Path) -> list[Path]:
    return make_shards(folder, IMAGES, LABELS, shard_size=8)


def built(labels: list[int], keys: list[str] | None = None) -> Manifest:
    """A manifest without files behind it."""
    n = len(labels)
    zeros = np.zeros(n, np.int32)
    names = keys or [f"k{i}" for i in range(n)]
    return Manifest(
        shards=(),
        classes=tuple(map(str, range(max(labels, default=-1) + 1))),
        shard_N=zeros,
        offset_N=np.zeros(n, np.int64),
        size_N=zeros,
        label_N=np.asarray(labels, np.int32),
        row_in_shard_N=np.arange(n, dtype=np.int32),
        keys=pa.array(names, pa.string()),
    )


def columns(manifest: Manifest) -> list[list]:
    names = ("shard", "offset", "size", "label", "row_in_shard")
    return [getattr(manifest, f"{n}_N").tolist() for n in names] + [manifest.keys.to_pylist()]


def test_rows_point_at_the_images(tmp_path: Path) -> None:
    paths = shards_at(tmp_path)
    manifest = index(paths)
    assert len(manifest) == 20
    assert manifest.shard_sizes.tolist() == [8, 8, 4]
    assert [(s.path, s.bytes, s.samples) for s in manifest.shards] == [
        (str(p), p.stat().st_size, n) for p, n in zip(paths, (8, 8, 4), strict=True)
    ]
    assert manifest.label_N.tolist() == LABELS
    assert manifest.row_in_shard_N.tolist() == [*range(8), *range(8), *range(4)]
    assert manifest.classes == ("0", "1", "2")
    assert manifest.key(9) == "shard-00009"
    for row in range(20):
        data = Path(manifest.shards[manifest.shard_N[row]].path).read_bytes()
        start = manifest.offset_N[row]
        assert data[start : start + manifest.size_N[row]] == encode_image(IMAGES[row])
    kinds = [getattr(manifest, f"{n}_N").dtype for n in ("shard", "offset", "size", "label")]
    assert kinds == [np.int32, np.int64, np.int32, np.int32]


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    manifest = index(shards_at(tmp_path / "run" / "data"))
    path = tmp_path / "run" / "manifest.arrow"
    manifest.save(path)
    loaded = Manifest.load(path)
    assert columns(loaded) == columns(manifest)
    assert (loaded.shards, loaded.classes) == (manifest.shards, manifest.classes)
    assert loaded.digest == manifest.digest
    assert not loaded.offset_N.flags.writeable  # a view of the mapped file
    assert [p.name for p in path.parent.iterdir() if p.is_file()] == ["manifest.arrow"]
    first = path.read_bytes()
    loaded.save(path)  # overwrites the file that it maps
    assert path.read_bytes() == first


def test_paths_below_the_manifest_move_with_it(tmp_path: Path) -> None:
    manifest = index(shards_at(tmp_path / "old" / "data"))
    manifest.save(tmp_path / "old" / "m.arrow")
    manifest.save(tmp_path / "beside" / "m.arrow")
    shutil.move(tmp_path / "old", tmp_path / "new")
    moved = Manifest.load(tmp_path / "new" / "m.arrow")
    moved.check_shards()
    assert moved.digest == index([s.path for s in moved.shards]).digest == manifest.digest
    with pytest.raises(UserError, match=r"No such file.*\(2 more shards are affected\)") as caught:
        Manifest.load(tmp_path / "beside" / "m.arrow").check_shards()
    assert caught.value.where == manifest.shards[0].path


def test_digest_tells_contents_apart(tmp_path: Path) -> None:
    base = index(shards_at(tmp_path / "a"))
    labels = index(make_shards(tmp_path / "b", IMAGES, LABELS[::-1], shard_size=8))
    keys = [f"key{i:07d}" for i in range(20)]
    named = index(make_shards(tmp_path / "c", IMAGES, LABELS, shard_size=8, keys=keys))
    classes = index([s.path for s in base.shards], classes=["a", "b", "c"])
    part = base.select(np.arange(19))
    digests = {m.digest for m in (base, labels, named, classes, part)}
    assert len(digests) == 5


def test_select_keeps_shards_and_rows_in_shard(tmp_path: Path) -> None:
    manifest = index(shards_at(tmp_path))
    rows = np.array([1, 7, 17, 19])
    part = manifest.select(rows)
    assert part.shard_sizes.tolist() == [2, 0, 2]
    assert part.row_in_shard_N.tolist() == [1, 7, 1, 3]
    assert part.shards == manifest.shards
    assert part.keys.to_pylist() == [manifest.key(r) for r in rows]
    part.save(tmp_path / "part.arrow")
    again = Manifest.load(tmp_path / "part.arrow").select(np.array([1, 2]))
    assert again.row_in_shard_N.tolist() == [7, 1]
    assert len(manifest.select(np.array([], np.int64))) == 0
    for wrong in ([1, 1], [2, 1], [-1], [20]):
        with pytest.raises(ValueError):
            manifest.select(np.array(wrong))


def test_class_names_come_from_json(tmp_path: Path) -> None:
    def sample(key: str, label: int, about: bytes) -> list[tuple[str, bytes]]:
        return [
            (f"{key}.jpg", b"x"),
            (f"{key}.cls", b"%d\n" % label),
            (f"{key}.json", about),
        ]

    members = [
        *sample("a", 0, b'{"class_name": "crane"}'),
        *sample("b", 1, b'{"class_name": "crane"}'),
        *sample("c", 2, b"not json"),
        *sample("d", 3, b'{"class_name": "ruff"}'),
        *sample("e", 4, b"[1]"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    assert index([path]).classes == ("crane (0)", "crane (1)", "2", "ruff", "4")
    assert index([path], classes=list("vwxyz")).classes == tuple("vwxyz")


def test_unlabelled_samples_on_request(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, IMAGES, None)
    with pytest.raises(UserError, match="sample 'shard-00000' has no label"):
        index(paths)
    manifest = index(paths, require_labels=False)
    assert set(manifest.label_N.tolist()) == {-1}
    assert manifest.num_classes == 0
    assert index(paths, require_labels=False, classes=["a", "b"]).num_classes == 2


@pytest.mark.parametrize(
    ("members", "options", "message"),
    [
        ([("k.jpg", b"x"), ("k.cls", b"3")], {"classes": ["a", "b"]}, "label of sample 'k' is 3;"),
        ([("k.jpg", b"x"), ("k.cls", b"cat")], {}, "'k' is not a class number: b'cat'"),
        ([("k.jpg", b"x"), ("k.cls", b"-1")], {}, "'k' is not a class number"),
        ([("k.jpg", b"x"), ("k.cls", b"")], {}, "'k' is not a class number"),
        ([("k.jpg", b"x"), ("k.cls", "١".encode())], {}, "'k' is not a class number"),
        ([("k.jpg", b"x")], {}, "sample 'k' has no label"),
        ([("k.cls", b"0"), ("k.json", b"{}")], {}, "'k' has no image .*: .cls, .json"),
        ([("k.seg.png", b"0"), ("k.cls", b"0")], {}, "'k' has no image"),
        ([("README", b"0")], {}, "contains no samples"),
    ],
)
def test_bad_samples_are_named(
    tmp_path: Path, members: list[tuple[str, bytes]], options: dict, message: str
) -> None:
    path = write_tar(tmp_path / "bad.tar", members)
    with pytest.raises(UserError, match=message) as caught:
        index([path], **options)
    assert str(path) in caught.value.where
    assert caught.value.remedy


def test_empty_classes_are_named(tmp_path: Path) -> None:
    paths = make_shards(tmp_path, IMAGES[:2], [0, 2])
    with pytest.raises(UserError, match="1 of 3 classes have no samples: 1"):
        index(paths)
    with pytest.raises(UserError, match=r"1 of 3 classes have no samples: 1 \('owl'\)"):
        index(paths, classes=["ant", "owl", "yak"])
    with pytest.raises(UserError, match="no samples: 3 "):
        index(make_shards(tmp_path, IMAGES[:3], [0, 1, 2]), classes=["a", "b", "c", "d"])
    assert index(paths, allow_empty_classes=True).num_classes == 3
    stray = make_shards(tmp_path / "stray", IMAGES[:2], [0, 99_999_999])
    with pytest.raises(UserError, match="highest label is 99,999,999"):
        index(stray, allow_empty_classes=True)


def test_missing_truncated_and_changed_shards(tmp_path: Path) -> None:
    paths = shards_at(tmp_path)
    manifest = index(paths)
    manifest.check_shards()
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[:3000])
    with pytest.raises(UserError, match=r"is truncated: 3,000 bytes") as caught:
        manifest.check_shards()
    assert caught.value.where == str(paths[1])
    with pytest.raises(UserError, match="truncated") as caught:
        index(paths)
    assert caught.value.where == str(paths[1])
    paths[1].write_bytes(whole + bytes(512))
    with pytest.raises(UserError, match="has changed"):
        manifest.check_shards()
    paths[1].unlink()
    with pytest.raises(UserError, match="cannot be opened"):
        index(paths)
    with pytest.raises(UserError, match="no shards were given"):
        index([])


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:200], lambda b: b"", lambda b: b"x" * 500, lambda b: b[: len(b) // 2]],
)
def test_damaged_manifest(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "m.arrow"
    index(shards_at(tmp_path)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="not a complete manifest") as caught:
        Manifest.load(path)
    assert caught.value.where == str(path)


def test_other_arrow_file_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "m.arrow"
    table = pa.table({"a": [1]})
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="not a complete manifest"):
        Manifest.load(path)
    with pytest.raises(UserError, match="there is no manifest"):
        Manifest.load(tmp_path / "none.arrow")


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 0.99])
def test_split_takes_its_share_of_every_class(fraction: float) -> None:
    labels = [0] * 40 + [1] * 7 + [2] * 2 + [3]
    rng = np.random.default_rng(0)
    manifest = built(rng.permutation(labels).tolist())
    train, held = split_per_class(manifest, fraction, seed=5)
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(50))
    assert np.all(np.diff(train) > 0)
    assert np.all(np.diff(held) > 0)
    for label, n in ((0, 40), (1, 7), (2, 2), (3, 1)):
        expected = round(fraction * n)
        if fraction > 0:
            expected = min(max(expected, 1 if n > 1 else 0), n - 1)
        assert np.sum(manifest.label_N[held] == label) == expected


def test_split_depends_on_keys_and_seed_only() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 200)
    keys = np.array([f"key{i}" for i in range(200)])

    def held_keys(order: np.ndarray, seed: int) -> set[str]:
        manifest = built(labels[order].tolist(), keys[order].tolist())
        return {manifest.key(r) for r in split_per_class(manifest, 0.2, seed)[1]}

    straight = held_keys(np.arange(200), 0)
    assert held_keys(rng.permutation(200), 0) == straight
    assert held_keys(np.arange(200), 1) != straight
    assert held_keys(np.arange(200), -1) != straight
    # Pinned: a split must not change with the version of Python or of a library.
    small = built([0] * 8)
    assert split_per_class(small, 0.25, 0)[1].tolist() == [0, 5]


def test_split_edges() -> None:
    assert [len(x) for x in split_per_class(built([]), 0.5, 0)] == [0, 0]
    same = built([0] * 10, ["same"] * 10)  # equal keys: the first rows
    assert split_per_class(same, 0.2, 0)[1].tolist() == [0, 1]
    unlabelled = built([-1] * 10)
    assert len(split_per_class(unlabelled, 0.2, 0)[1]) == 2
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="held-out fraction"):
            split_per_class(same, fraction, 0)


def test_imagenet_sample() -> None:
    shards = expand(str(data_dir("imagenet-sample") / "sample-{000000..000003}.tar"))
    with pytest.raises(UserError, match="799 of 999 classes have no samples: 0, 1, 2, 4, 5, …"):
        index(shards)
    manifest = index(shards, allow_empty_classes=True)
    assert manifest.shard_sizes.tolist() == [50] * 4
    assert manifest.classes[253] == "basenji"
    for row in (0, 77, 199):
        with open(manifest.shards[manifest.shard_N[row]].path, "rb") as file:
            about = os.pread(file.fileno(), manifest.size_N[row], manifest.offset_N[row])
        assert about[:3] == b"\xff\xd8\xff"
        assert about[-2:] == b"\xff\xd9"


def test_dotted_keys_are_what_webdataset_takes_them_for(tmp_path: Path) -> None:
    """A dot inside the name ends the key there: the sample then has no image, which is reported."""
    path = write_tar(tmp_path / "a.tar", [("n01.v2_3.jpg", b"x"), ("n01.v2_3.cls", b"0")])
    with pytest.raises(UserError, match=r"sample 'n01' has no image") as caught:
        index([path])
    assert "first dot" in caught.value.remedy
    dotted = write_tar(tmp_path / "b.tar", [("v1.0/a.jpg", b"x"), ("v1.0/a.cls", b"0")])
    assert index([dotted]).key(0) == "v1.0/a"
    assert json.dumps(index([dotted]).classes) == '["0"]'


def test_samples_without_a_label_are_not_held_out(tmp_path: Path) -> None:
    """The choice among the labeled samples is the one made if all had labels."""
    labels = [n % 3 for n in range(20)]
    manifest = index(make_shards(tmp_path, IMAGES, labels))
    label_N = np.array(manifest.label_N)
    label_N[label_N == 1] = -1
    some = dataclasses.replace(manifest, label_N=label_N)
    train, held = split_labelled(some, 0.25, 3)
    whole = split_per_class(manifest, 0.25, 3)[1]
    assert held.tolist() == [n for n in whole.tolist() if label_N[n] >= 0]
    assert sorted([*train, *held]) == list(range(20))
