"""The relabel list: read, checked, applied to a manifest, and counted in the key of ``index``."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import settings
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.index.relabel import (
    Decision,
    keys_named,
    names_of,
    overridden,
    read_relabel,
    relabelled,
    rows_named,
    unique_keys,
    write_relabel,
)
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.pipeline import keys
from cnn2gnn_dist.pipeline.registry import STAGES
from tests.support.shards import write_tar

NAMES = ("cat", "dog", "hen")


def manifest(tmp_path, folder: str, labels: dict[str, list[int]]) -> Manifest:
    shards = []
    for shard, numbers in labels.items():
        path = tmp_path / folder / f"{shard}.tar"
        path.parent.mkdir(exist_ok=True)
        members = []
        for i, label in enumerate(numbers):
            members += [(f"k{i}.jpg", b"x" * (5 + i)), (f"k{i}.cls", str(label).encode())]
        write_tar(path, members)
        shards.append(path)
    return index(shards, classes=NAMES, progress=False, allow_empty_classes=True)


@pytest.fixture
def pair(tmp_path):
    train = manifest(tmp_path, "train", {"a": [0, 0, 1, 1, 2]})
    return train, manifest(tmp_path, "held", {"b": [0, 1, 2, 0, 0, 1, 1]})


def written(tmp_path, text: str):
    path = tmp_path / "list.csv"
    path.write_text(text)
    return path


def apply(tmp_path, pair, text: str, **options):
    return relabelled(*pair, read_relabel(written(tmp_path, text)), "list.csv", **options)


def test_classes_change_and_images_are_left_out(tmp_path, pair):
    made, said = apply(tmp_path, pair, "note,key,class\nx,k0,dog\nx,k2,DROP\nx,k3,dog\nx,k4,\n")
    assert [made.key(row) for row in range(len(made))] == ["k0", "k1", "k3", "k4"]
    np.testing.assert_array_equal(made.label_N, [1, 0, 1, 2])
    np.testing.assert_array_equal(made.row_in_shard_N, [0, 1, 3, 4])
    assert said == "relabel list: 1 training images get another class, 1 are left out"
    assert made.digest != pair[0].digest
    assert apply(tmp_path, pair, "key,class\n")[0].digest == pair[0].digest


def test_what_is_written_is_read(tmp_path):
    decisions = {"a,b": Decision("x y", 2), 'c"': Decision(None, 3)}
    write_relabel(tmp_path / "out.csv", decisions)
    assert read_relabel(tmp_path / "out.csv") == decisions
    assert (tmp_path / "out.csv").read_text() == 'key,class\n"a,b",x y\n"c""",drop\n'


@pytest.mark.parametrize(
    ("text", "what", "remedy"),
    [
        ("key,class\nk0,dog\nzz,dog\n", "'zz': no training image has this key", "remove"),
        ("key,class\nk5,dog\nzz,dog\n", "'k5': held out", "remove these lines"),
        ("key,class\nk0,hne\n", "'hne': not a class", "did you mean 'hen'"),
        ("key,class\nk0,dog\nk0,cat\n", "two decisions on 'k0', in lines 2 and 3", "keep one"),
        ("name,class\nk0,dog\n", "no column key", "key,class"),
        ("", "no column class and no column key", "key,class"),
        ("key,class\nk4,-\n", "leaves no training image of 'hen'", "allow_empty_classes"),
        ("key,class\n" + "".join(f"k{i},-\n" for i in range(5)), "'cat', 'dog', 'hen'", "leave"),
    ],
)
def test_what_does_not_fit_is_named_with_its_remedy(tmp_path, pair, text, what, remedy):
    with pytest.raises(UserError) as caught:
        apply(tmp_path, pair, text)
    assert what in caught.value.what
    assert remedy in caught.value.remedy


def test_a_class_with_the_name_that_leaves_images_out_is_not_left_out(tmp_path):
    members = [(f"k{i}.{kind}", str(i % 2).encode()) for i in range(4) for kind in ("jpg", "cls")]
    path = write_tar(tmp_path / "t" / "a.tar", members)
    train = index([path], classes=("Drop", "hen"), progress=False)
    with pytest.raises(
        UserError, match="'drop' leaves an image out, but 'Drop' is a class"
    ) as caught:
        apply(tmp_path, (train, train), "key,class\nk1,drop\n")
    assert caught.value.where == "list.csv, line 2"
    assert "'-'" in caught.value.remedy
    text = "key,class\nk1,-\nk3,-\n"
    made, _ = apply(tmp_path, (train, train), text, allow_empty_classes=True)
    write_relabel(tmp_path / "again.csv", read_relabel(written(tmp_path, text)))
    assert (tmp_path / "again.csv").read_text() == text
    assert [made.key(row) for row in range(len(made))] == ["k0", "k2"]


def test_a_list_that_is_no_text_or_is_missing_is_named(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"key,class\n\xff\xfe,cat\n")
    for path in (tmp_path / "list.csv", tmp_path / "none.csv", tmp_path):
        with pytest.raises(UserError, match="can't be read"):
            read_relabel(path)


def test_keys_that_two_shards_have_are_told_apart(tmp_path):
    train = manifest(tmp_path, "train", {"a": [0, 1], "b": [1, 2, 2]})
    held = manifest(tmp_path, "held", {"c": [0]})
    assert unique_keys(train) == ["a/k0", "a/k1", "b/k0", "b/k1", "b/k2"]
    apart, rest = train.select(np.arange(2)), train.select(np.arange(2, 5))
    assert unique_keys(apart) == unique_keys(apart, beside=["k2"]) == ["k0", "k1"]
    assert unique_keys(apart, beside=rest.keys.to_pylist()) == ["a/k0", "a/k1"]
    made, _ = apply(tmp_path, (train, held), "key,class\nb/k0,cat\nk2,dog\n")
    np.testing.assert_array_equal(made.label_N, [0, 1, 0, 2, 1])
    for decision in ("cat", "drop?"):  # counted as missing, a forgotten image would be trained on
        with pytest.raises(UserError, match="'k0': several training images have this key"):
            apply(tmp_path, (train, held), f"key,class\nk2,dog\nk0,{decision}\n")


def test_a_forgotten_key_names_its_image_in_both_spellings_and_all_that_share_it(tmp_path):
    train = manifest(tmp_path, "train", {"a": [0, 1], "b": [1, 2, 2]})  # k0 and k1 twice
    for names, rows in (
        (["k2"], [4]),
        (["b/k2", "a/k1", "nobody"], [1, 4]),
        (["k1"], [1, 3]),  # which one was forgotten is not known
        ([], []),
    ):
        assert np.flatnonzero(rows_named(train, names)).tolist() == rows
    assert not rows_named(train, ["k1", "k2"], beside=["k1", "k2"]).any()
    assert np.flatnonzero(rows_named(train, ["b/k2"], beside=["k2"])).tolist() == [4]
    members = [(f"{key}.{kind}", b"0") for key in ("d", "a/k0") for kind in ("jpg", "cls")]
    other = write_tar(tmp_path / "c.tar", members)  # its key is the other name of an image of a
    how = {"classes": NAMES, "progress": False, "allow_empty_classes": True}
    both = index([tmp_path / "train" / "a.tar", other], **how)
    assert unique_keys(both) == ["k0", "k1", "d", "a/k0"]
    assert np.flatnonzero(rows_named(both, ["a/k0"])).tolist() == [3]


def images_of(train: Manifest) -> list[tuple[str, str]]:
    files = [Path(train.shards[shard].path).name for shard in train.shard_N.tolist()]
    return list(zip(unique_keys(train), files, strict=True))


def test_names_mean_the_same_images_without_a_manifest(tmp_path):
    """``rows_named`` is the reference; ``train`` has keys that two shards share, ``rest`` has not."""
    train = manifest(tmp_path, "train", {"a": [0, 1], "b": [1, 2, 2]})
    rest = train.select(np.arange(2, 5))
    names = ("k0", "k1", "k2", "a/k0", "a/k1", "b/k0", "b/k1", "b/k2", "c/k0", "nobody", "a/b")
    for manifest_here in (train, rest):
        keys_here = unique_keys(manifest_here)
        for pair in itertools.combinations(names, 2):
            rows = np.flatnonzero(rows_named(manifest_here, pair)).tolist()
            assert keys_named(images_of(manifest_here), pair) == {keys_here[row] for row in rows}
    # Where shards of one name are in several folders, their folder comes first; the other model's folders aren't known.
    assert keys_named(images_of(rest), ["x/b/k1", "x/a/k2"]) == {"k1"}
    assert keys_named([("x/b/k1", "b.tar"), ("y/b/k1", "b.tar")], ["b/k1"]) == {"x/b/k1", "y/b/k1"}
    assert keys_named([("k1", ""), ("k2", "")], ["b/k1", "k3"]) == {"k1"}  # from any shard


def test_a_name_does_not_mean_an_image_of_another_folder_or_shard():
    """Keys may have slashes: WebDataset's are paths. An image forgotten in another model would take others with it."""
    apart = [("cat/1", ""), ("dog/1", ""), ("b/3", ""), ("3", ""), ("b/train/4", "")]
    assert keys_named(apart, ["cow/1", "a/2"]) == set()
    assert keys_named(apart, ["a/3"]) == {"3"}
    assert keys_named(apart, ["x/dog/1", "train/4", "b/train/5"]) == {"dog/1", "b/train/4"}
    # Two folders have a shard of this name, so keys have the folder before it.
    shards = [("a/train/1", "train.tar"), ("b/train/1", "train.tar"), ("b/train/x/2", "train.tar")]
    assert keys_named(shards, ["c/train/1", "2", "y/2", "1/train"]) == set()
    assert keys_named(shards, ["x/b/train/1", "x/2"]) == {"b/train/1", "b/train/x/2"}
    assert keys_named([("cat/1", "s.tar"), ("dog/1", "s.tar")], ["1", "cow/1", "t/cat/1"]) == set()
    assert keys_named([("cat/1", "s.tar"), ("dog/1", "s.tar")], ["f/s/cat/1"]) == {"cat/1"}


def test_two_decisions_on_one_image_under_its_two_names_are_refused(tmp_path, pair):
    for first, second in (("k0", "a/k0"), ("a/k0", "k0")):
        for decision in ("hen", "drop", "drop?"):
            text = f"key,class\n{first},dog\nk1,hen\n{second},{decision}\n"
            with pytest.raises(UserError, match="are one image") as caught:
                apply(tmp_path, pair, text)
            assert "lines 2 and 4" in caught.value.what
    made, _ = apply(tmp_path, pair, "key,class\nk0,dog\na/k0,dog\n")
    assert made.label_N.tolist() == [1, 0, 1, 1, 2]


def test_a_later_list_decides_whichever_name_it_uses(pair):
    known = names_of(pair[0])
    earlier = {"a/k0": Decision("dog", 2), "k1": Decision(None, 3), "gone": Decision(None, 4)}
    later = {"k0": Decision("hen", 2), "a/k1": Decision("dog", 3)}
    assert overridden(earlier, later, known) == later | {"gone": Decision(None, 4)}
    assert overridden(later, {"gone": Decision("hen", 9)}, known) == later | {
        "gone": Decision("hen", 9)
    }


def test_the_name_of_two_classes_is_no_decision_for_an_image_of_neither(tmp_path):
    shard = tmp_path / "a.tar"
    members = [(f"k{i}.{end}", b"012"[i : i + 1]) for i in range(3) for end in ("jpg", "cls")]
    write_tar(shard, members)
    train = index([shard], classes=("hen", "crane", "crane"), progress=False)
    made, _ = apply(tmp_path, (train, train), "key,class\nk2,crane\nk1,crane\n")
    assert made.label_N.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match="'crane' is the name of two classes"):
        apply(tmp_path, (train, train), "key,class\nk0,crane\n")


def test_shards_of_one_name_in_two_folders_are_told_apart(tmp_path):
    """Two data sets packed in the same way: the same shard names, the same keys."""
    for folder in ("one", "two"):
        manifest(tmp_path, folder, {"t": [0, 1], "u": [2]})
    shards = [tmp_path / folder / f"{name}.tar" for folder in ("one", "two") for name in "tu"]
    both = index(shards, classes=NAMES, progress=False)
    named = [f"{f}/{n}" for f in ("one", "two") for n in ("t/k0", "t/k1", "u/k0")]
    assert unique_keys(both) == named
    assert names_of(both) == {name: row for row, name in enumerate(named)}
    made, _ = relabelled(
        both, both, {"one/t/k0": Decision("hen", 1), "two/t/k1": Decision(None, 2)}, "list"
    )
    assert made.label_N.tolist() == [2, 1, 2, 0, 2]


def test_a_key_that_is_the_other_name_of_another_image_means_the_one_of_the_list(tmp_path):
    def shard(name: str, *keys: str):
        members = [(f"{key}.{kind}", b"0") for key in keys for kind in ("jpg", "cls")]
        return write_tar(tmp_path / f"{name}.tar", members)

    how = {"classes": NAMES, "progress": False, "allow_empty_classes": True}
    shards = [shard("a", "b"), shard("c", "d", "a/b"), shard("e", "b", "f")]
    for repeated in (False, True):  # "b", in a and e
        train = index(shards[: 2 + repeated], **how)
        names = unique_keys(train)
        assert names[:3] == (["a/b", "c/d", "c/a/b"] if repeated else ["b", "d", "a/b"])
        assert [names_of(train)[name] for name in names] == list(range(len(train)))


def test_a_quote_that_is_not_closed_swallows_no_decisions(tmp_path):
    with pytest.raises(UserError, match="this relabel list can't be read"):
        read_relabel(written(tmp_path, 'key,class\nk0,cat\n"k1,cat\nk2,hen\n'))


def test_a_forgotten_image_need_not_be_there(tmp_path, pair):
    made, said = apply(tmp_path, pair, "key,class\nk0,drop?\nelsewhere,drop?\n")
    assert len(made) == 4
    assert said.endswith("1 are left out, 1 are missing")
    found = read_relabel(written(tmp_path, "key,class\na,drop?\nb,drop\n"))
    write_relabel(tmp_path / "again.csv", found)
    assert read_relabel(tmp_path / "again.csv") == found


def test_a_class_may_be_emptied_where_that_is_allowed(tmp_path, pair):
    made, _ = apply(tmp_path, pair, "key,class\nk4,cat\n", allow_empty_classes=True)
    assert made.classes == NAMES
    assert 2 not in made.label_N


def test_the_content_of_the_list_is_in_the_key_of_index_and_not_its_path(tmp_path):
    def part(*overrides: str):
        config = settings.load("demo", [f"run.dir={tmp_path}/run", *overrides])
        found = keys.parts(config, STAGES["index"], {})
        if not overrides:  # runs from before the field existed stay complete
            older = {name: value for name, value in found.items() if name != "data.relabel"}
            assert keys.key_of(STAGES["index"], found, {}) == keys.key_of(
                STAGES["index"], older, {}
            )
        return found["data.relabel"], keys.key_of(STAGES["index"], found, {})

    none, plain = part()
    assert none is None
    path = written(tmp_path, "key,class\nk0,dog\n")
    first = part(f"data.relabel={path}")
    assert first[1] != plain
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "other.csv").write_text(path.read_text())
    assert part(f"data.relabel={tmp_path}/sub/other.csv") == first
    path.write_text("key,class\nk0,hen\n")
    assert part(f"data.relabel={path}") != first
    path.unlink()
    assert part(f"data.relabel={path}")[0] == "list.csv is missing"
