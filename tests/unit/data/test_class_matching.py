"""Two data sets that number their classes differently are matched by class name, or the run is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.data.index.class_matching import ClassInfo, case_note, class_names, match, notes
from cnn2gnn_dist.data.index.class_names import unused_lists
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.index.manifest_pair import index_data_set, index_pair
from cnn2gnn_dist.data.index.repeated_images import copies_note
from cnn2gnn_dist.errors import UserError
from tests.support.shards import encode_image, make_shards, random_images, write_tar

IMAGE = encode_image(random_images(1, 8, 8)[0])


def info(*names: str | None) -> ClassInfo:
    return ClassInfo({n: name for n, name in enumerate(names) if name is not None}, len(names))


def shard(path: Path, *samples: tuple[int, str | None]) -> Path:
    """A shard of (label, class name) samples."""
    members = []
    for number, (label, name) in enumerate(samples):
        key = f"{path.stem}{number}"
        members += [(f"{key}.cls", b"%d" % label), (f"{key}.png", IMAGE)]
        if name is not None:
            members.append((f"{key}.json", json.dumps({"class_name": name}).encode()))
    return write_tar(path, members)


@pytest.mark.parametrize(
    ("train", "held", "present", "expected"),
    [
        # identical, a permutation, a subset renumbered from 0
        (info("ant", "bee", "cow"), info("ant", "bee", "cow"), [0, 1, 2], [0, 1, 2]),
        (info("ant", "bee", "cow"), info("cow", "ant", "bee"), [0, 1, 2], [2, 0, 1]),
        (info("ant", "bee", "cow"), info("bee", "cow"), [0, 1], [1, 2]),
        # an unknown class without images is ignored
        (info("ant", "bee"), info("fox", "bee"), [1], [-1, 1]),
        # names that are numbers, sorted as text like folders
        (info("0", "1", "10", "2"), info("0", "2"), [0, 1], [0, 3]),
        # no names at all, only numbers
        (info(None, None, None), info(None, None), [0, 1], [0, 1]),
        # names equal to the numbers on one side, only numbers on the other
        (info("0", "1", "2"), info(None, None), [0, 1], [0, 1]),
        (info(None, None, None), info("0", "1"), [0, 1], [0, 1]),
        # ImageNet's two cranes: matched by number, because all other names agree with the numbering
        (info("crane", "bee", "crane"), info("crane", "bee", "crane"), [0, 1, 2], [0, 1, 2]),
        (info("crane", "bee", "crane"), info("crane", "bee", "crane"), [2, 1], [-1, 1, 2]),
        (info("crane", "crane"), info("crane", "crane"), [0, 1], [0, 1]),
        # some without a name, while the others agree with the numbering
        (info("ant", None, "cow"), info("ant", "bee", None), [0, 1, 2], [0, 1, 2]),
        # é as one code point or as two
        (info("bee", "caf\u00e9"), info("cafe\u0301", "bee"), [0, 1], [1, 0]),
        (info("ant", "bee"), info(), [], []),
    ],
)
def test_classes_are_matched_by_name(train, held, present, expected):
    assert match(train, held, present).tolist() == expected


@pytest.mark.parametrize(
    ("train", "held", "present", "message"),
    [
        (info("ant", "bee"), info("fox", "owl"), [0, 1], "2 held-out classes .*'fox', 'owl'"),
        (info("ant", "bee"), info("ant", "bee", "fox"), [0, 1, 2], "1 held-out classes .*'fox'"),
        (info(None, None), info(None, None, None), [0, 2], "not among the 2 training classes: 2"),
        (info("ant", "bee"), info(None, None), [0, 1], "training images name .* only number"),
        (info(None, None), info("ant", "bee"), [0, 1], "held-out images name .* only number"),
        (info("1", "2", "3"), info(None, None, None), [1, 2], "only number"),
        # with a different numbering, no name can tell the cranes apart
        (
            info("crane", "bee", "crane"),
            info("bee", "crane"),
            [0, 1],
            "several classes share a name",
        ),
        (
            info("crane", "bee"),
            info("crane", "crane", "bee"),
            [0, 1, 2],
            "several classes share a name",
        ),
        # a different numbering, and a class without a name: it could be any
        (info("ant", "bee", "cow"), info("bee", "ant", None), [0, 1, 2], "1 held-out classes have"),
        (info("ant", None, "cow"), info("cow", "bee", "ant"), [0, 1, 2], "'bee'"),
    ],
)
def test_what_does_not_match_is_refused(train, held, present, message):
    with pytest.raises(UserError, match=message) as caught:
        match(train, held, present)
    assert caught.value.where in ("data.test", "data.match_classes")
    assert caught.value.remedy


def test_a_likely_misspelling_is_named():
    with pytest.raises(UserError, match="'Aeroplane'") as caught:
        match(info("airplane", "bird"), info("Aeroplane", "bird"), [0, 1])
    assert "'airplane'" in caught.value.remedy


@pytest.mark.parametrize(
    ("names", "offered"), [(("ant", "bee", "cow", "dog"), True), (("0", "1", "10", "2"), False)]
)
def test_numbers_are_offered_only_where_they_can_be_meant(names, offered):
    """Text labels sort '10' before '2': their positions are not class numbers."""
    for sides in ((info(*names), info(None, None)), (info(None, None, None), info(*names))):
        with pytest.raises(UserError) as caught:
            match(*sides, [0, 1, 2][: sides[1].count])
        assert ("data.match_classes=number" in caught.value.remedy) == offered


def test_numbers_are_trusted_when_told_so():
    for held in (info(None, None), info("x", "y")):
        assert match(info("ant", "bee"), held, [0, 1], "number").tolist() == [0, 1]
    with pytest.raises(UserError, match="not among the 2 training classes: 2"):
        match(info("ant", "bee"), info(None, None, None), [2], "number")


def test_notes_say_what_the_table_does_not():
    names = info("ant", "bee", "cow", "dog")
    said = notes(names, np.array([0, 0, 1, 2]), np.array([0, 3, 3]), moved=True)
    assert len(said) == 3
    assert "matched by name" in said[0]
    assert said[1].startswith("2 held-out images belong to classes without training images")
    assert "3 ('dog')" in said[1]
    assert said[2].startswith("2 of 4 classes have no held-out image")
    assert "1 ('bee'), 2 ('cow')" in said[2]
    assert notes(names, np.arange(4), np.arange(4), moved=False) == []


def test_names_of_one_class_that_disagree_are_refused(tmp_path: Path) -> None:
    """Within a shard and between shards, at any position."""
    a = shard(tmp_path / "a.tar", (0, "ant"), (1, "bee"), (0, "ant"))
    within = shard(tmp_path / "b.tar", (0, "ant"), (1, "bee"), (0, "ant"), (1, "ant"))
    with pytest.raises(UserError, match="class 1 is 'ant' here but 'bee' in") as caught:
        index([within])
    assert caught.value.where == f"{within}, member 'b3.json'"
    for other in (
        shard(tmp_path / "c.tar", (0, "bee"), (1, "ant")),
        shard(tmp_path / "d.tar", (0, "ant"), (1, "bee"), (1, "cow")),
    ):
        for workers in (1, 3):
            with pytest.raises(UserError, match="number their classes differently") as caught:
                index([a, other], workers=workers)
            assert str(other) in caught.value.where
            assert str(a) in caught.value.what or str(other) in caught.value.what


def test_a_json_in_any_writing_is_compared(tmp_path: Path) -> None:
    """The fast byte comparison must not take another encoding of a name for another name."""
    writings = [
        b'{"class_name": "caf\\u00e9"}',
        '{"class_name":"café"}'.encode(),
        '{"x": [1], "class_name" : "café", "class_nam": "tea"}'.encode(),
        b'{"class\\u005fname": "tea"}',  # an escaped key is not searched for: counts as no name
        b'{"caption": "tea"}',
        b'{"class_name": null}',
    ]
    members = []
    for number, text in enumerate([*writings, *writings[::-1]]):
        members += [(f"{number}.cls", b"0"), (f"{number}.jpg", b"x"), (f"{number}.json", text)]
    path = write_tar(tmp_path / "a.tar", members)
    assert index([path]).classes == ("café",)
    for odd in (b'{"class_name":"cafe"}', b'{"class_name": "caf"}'):
        more = [("x.cls", b"0"), ("x.jpg", b"x"), ("x.json", odd)]
        with pytest.raises(UserError, match="class 0 is 'caf"):
            index([write_tar(tmp_path / "b.tar", members + more)])


def test_names_that_come_late_count(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", (0, None), (1, "bee"), (0, "ant"))
    assert index([path]).classes == ("ant", "bee")


def test_a_list_beside_packed_shards_names_all_classes(tmp_path: Path) -> None:
    path = shard(tmp_path / "train-000000.tar", (0, "ant"), (1, None))
    names = tmp_path / "train-classes.json"
    names.write_text(json.dumps(["ant", "bee", "cow"]))
    with pytest.raises(UserError, match=r"no samples: 2 \('cow'\)"):
        index([path])
    assert index([path], allow_empty_classes=True).classes == ("ant", "bee", "cow")
    names.write_text(json.dumps(["bee", "ant"]))
    with pytest.raises(UserError, match=r"class 0 is 'ant' here but 'bee' in .*classes\.json"):
        index([path])
    names.write_text('["ant"')
    with pytest.raises(UserError, match="class list") as caught:
        index([path])
    assert caught.value.where == str(names)
    names.write_text('{"ant": 0}')  # an unrelated file
    assert index([path]).classes == ("ant", "1")


@pytest.mark.parametrize("number", ["0", "0000", "000000", "1234567"])
def test_a_list_counts_however_many_digits_the_shards_have(tmp_path: Path, number: str) -> None:
    path = shard(tmp_path / f"train-{number}.tar", (0, None), (1, None))
    (tmp_path / "train-classes.json").write_text('["ant", "bee"]')
    assert index([path]).classes == ("ant", "bee")


def test_a_list_that_names_nothing_is_reported(tmp_path: Path) -> None:
    path = str(shard(tmp_path / "train-00.tar", (0, None)))
    shard(tmp_path / "test-00.tar", (0, None))
    for name in ("train", "test"):
        (tmp_path / f"{name}-classes.json").write_text('["ant"]')
    assert unused_lists([path]) is None  # the other list belongs to the other shards
    (tmp_path / "all-classes.json").write_text('["ant"]')
    found = unused_lists([path])
    assert found is not None
    assert found.startswith(f"{tmp_path}/all-classes.json is not read: class names belong")
    (tmp_path / "train-classes.json").write_text('{"ant": 0}')
    assert "(nor is 1 other)" in str(unused_lists([path]))


def test_held_out_labels_are_put_in_the_numbering_of_the_training_images(tmp_path: Path) -> None:
    train = shard(tmp_path / "a.tar", (0, "ant"), (1, "bee"), (2, "cow"), (2, "cow"))
    held = shard(tmp_path / "b.tar", (1, "cow"), (0, "bee"), (1, "cow"))
    pair = index_pair([train], [held])
    assert pair.held.classes == pair.train.classes == ("ant", "bee", "cow")
    assert pair.held.label_N.tolist() == [2, 1, 2]
    assert pair.held.label_N.dtype == np.int32
    assert pair.train.label_N.tolist() == [0, 1, 2, 2]
    assert "matched by name" in pair.notes[0]
    assert "0 ('ant')" in pair.notes[1]
    # ... also on disk
    pair.held.save(tmp_path / "m.arrow")
    assert type(pair.held).load(tmp_path / "m.arrow").label_N.tolist() == [2, 1, 2]


def test_a_number_of_classes_checks_and_does_not_rename(tmp_path: Path) -> None:
    train = shard(tmp_path / "a.tar", (0, "ant"), (1, "bee"))
    assert index_data_set([train], num_classes=2).manifest.classes == ("ant", "bee")
    with pytest.raises(UserError, match=r"no samples: 2, 3\n") as caught:
        index_data_set([train], num_classes=4)
    assert "data.allow_empty_classes=true" in caught.value.remedy
    whole = index_data_set([train], num_classes=4, allow_empty_classes=True)
    assert whole.manifest.classes == ("ant", "bee", "2", "3")
    more = shard(tmp_path / "b.tar", (0, "ant"), (1, "bee"), (2, "cow"))
    with pytest.raises(UserError, match=r"label of sample .* is 2; there are 2 classes"):
        index_data_set([more], num_classes=2)
    (tmp_path / "c-classes.json").write_text('["ant", "bee", "cow"]')
    listed = shard(tmp_path / "c-000000.tar", (0, "ant"), (1, "bee"))
    with pytest.raises(UserError, match=r"3 classes, but data\.num_classes is 2"):
        index_data_set([listed], num_classes=2, allow_empty_classes=True)


def test_labels_that_are_ids_or_begin_at_one(tmp_path: Path) -> None:
    """Refused with the reason, before memory is allocated for that many classes."""
    for label in (40_000_000, 999_999_999, 10**12, 10**30):
        path = shard(tmp_path / "a.tar", (0, None), (label, None))
        with pytest.raises(UserError, match="id"):
            index([path], allow_empty_classes=True)
    one = shard(tmp_path / "a.tar", (1, None), (2, None))
    with pytest.raises(UserError, match=r"no samples: 0; the labels start at 1"):
        index([one])
    assert index([one], allow_empty_classes=True).num_classes == 3
    with pytest.raises(UserError, match="look like ids"):
        index_data_set([one], num_classes=10**9, allow_empty_classes=True)


def test_two_classes_of_one_name_get_their_numbers():
    assert class_names(info("crane", "crane", None, "ruff")) == (
        *("crane (0)", "crane (1)"),
        *("2", "ruff"),
    )


def test_a_set_of_copies_is_reported(tmp_path: Path) -> None:
    """Also by recorded checksums, and in sets larger than the sample; a few copies are fine."""
    images = random_images(400, 8, 8)
    few = images[np.arange(400) % 3]
    for name, made, expected in (
        ("all", few[:30], "27 of 30 checked images are byte-identical copies"),
        ("many", few, "253 of 256 checked images are byte-identical copies"),
        ("some", np.concatenate([images[:300], images[:100]]), None),
    ):
        paths = make_shards(tmp_path / name, made, np.arange(len(made)) % 2, shard_size=100)
        for checksums in (False, True):
            said = copies_note(index(paths, checksums=checksums))
            assert said.startswith(expected) if expected else said is None


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (("caf\u00e9", "cafe\u0301"), r"0 \('caf\\xe9'\), 1 \('cafe\\u0301'\)"),
        (("cat", "cat "), r"0 \('cat'\), 1 \('cat '\)"),
    ],
)
def test_one_class_in_two_spellings_is_refused(tmp_path: Path, names, listed) -> None:
    two = shard(tmp_path / "two.tar", *enumerate(names))
    one = shard(tmp_path / "one.tar", (0, names[0]))
    with pytest.raises(UserError, match=rf"1 class names appear in .*: classes {listed}") as e:
        index_data_set([two])
    assert e.value.where == "data.train"
    with pytest.raises(UserError, match="spellings") as e:
        index_pair([one], [two])
    assert e.value.where == "data.test"
    other = shard(
        tmp_path / "other.tar", (0, names[1])
    )  # between two data sets they are the same class
    assert index_pair([one], [other]).held.label_N.tolist() == [0]


def test_names_of_another_case_are_reported(tmp_path: Path) -> None:
    two = shard(tmp_path / "two.tar", (0, "Cat"), (1, "cat"), (2, "dog"))
    pair = index_pair([two], [two])
    assert pair.notes == [
        "1 class names differ from others only in case and count as separate classes: 'Cat', 'cat'"
    ]
    assert pair.held.label_N.tolist() == [0, 1, 2]
    same = shard(tmp_path / "same.tar", (0, "crane"), (1, "crane"), (2, "dog"))
    assert case_note(index_data_set([same]).class_info) is None


def test_classes_matched_by_number_although_one_side_has_names_are_reported(tmp_path: Path) -> None:
    train = shard(tmp_path / "a.tar", (0, "cat"), (1, None), (2, None), (3, None))
    held = shard(tmp_path / "b.tar", (0, "cat"), (1, "horse"), (2, "dog"), (3, None))
    pair = index_pair([train], [held])
    assert pair.held.label_N.tolist() == [0, 1, 2, 3]
    words = (
        "2 classes are matched by number because only one side names them: 1 ('horse'), 2 ('dog')"
    )
    assert pair.notes == [words]
    assert index_pair([held], [train]).notes == [words]
    assert index_pair([held], [held]).notes == []
    bare = shard(tmp_path / "c.tar", (0, None), (1, None))
    two = shard(tmp_path / "d.tar", (0, "cat"), (1, "dog"))
    assert index_pair([two], [bare], match_classes="number").notes == [
        "2 classes are matched by number because only one side names them: 0 ('cat'), 1 ('dog')"
    ]
    digits = shard(tmp_path / "e.tar", (0, "0"), (1, "1"))
    assert index_pair([digits], [bare]).notes == []


def test_an_empty_name_among_others_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "train-0.tar", (0, None), (1, None))
    names = tmp_path / "train-classes.json"
    names.write_text('["", "1"]')
    with pytest.raises(UserError, match="class 0 has an empty name, unlike the other 1") as caught:
        index([path])
    assert caught.value.where == str(names)
    names.write_text('[null, "1"]')  # named by its number
    assert index([path]).classes == ("0", "1")
