"""Parquet tables as shards: bytes pass unchanged, labels and names are understood, the rest is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.index.manifest_pair import index_data_set
from cnn2gnn_dist.data.packing.packers import (
    pack_parquet,
)
from cnn2gnn_dist.errors import UserError
from tests.support.shards import data_dir, encode_image, random_images
from tests.unit.data.test_packers import IMAGES, contents


def write_parquet(
    path: Path,
    images: list[Any],
    labels: list[Any],
    names: list[str] | dict[str, str] | None = None,
    columns: tuple[str, str] = ("image", "label"),
) -> Path:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({columns[0]: pa.array(images, kind), columns[1]: pa.array(labels, pa.int64())})
    if names is not None:
        about = {"info": {"features": {columns[1]: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    pq.write_table(table, path, row_group_size=2)
    return path


def test_parquet_bytes_pass_untouched(tmp_path: Path) -> None:
    encoded = [encode_image(IMAGES[i], s) for i, s in enumerate(["jpg", "png", "webp", "gif"])]
    rows = [{"bytes": data, "path": f"{i}.JPEG"} for i, data in enumerate(encoded)]
    a = write_parquet(tmp_path / "a.parquet", rows[:3], [2, 0, 1], ["ant", "owl", "yak"])
    b = write_parquet(tmp_path / "b.parquet", rows[3:], [2], ["ant", "owl", "yak"])
    found = contents(pack_parquet([a, b], tmp_path / "out", shard_size=3, prefix="val"))
    assert [key for key, _ in found] == [f"val-{i:08d}" for i in range(4)]
    suffixes = ["jpg", "png", "webp", "gif"]  # by the bytes, not by the name
    for (_, fields), data, suffix in zip(found, encoded, suffixes, strict=True):
        assert set(fields) == {"cls", "json", suffix}
        assert fields[suffix] == data
    assert [f["cls"] for _, f in found] == [b"2", b"0", b"1", b"2"]
    assert json.loads(found[0][1]["json"]) == {
        "class_name": "yak",
        "filename": "0.JPEG",
        "label": 2,
    }
    manifest = index(sorted((tmp_path / "out").glob("*.tar")))
    assert manifest.classes == ("ant", "owl", "yak")


def test_parquet_variants(tmp_path: Path) -> None:
    data = encode_image(IMAGES[0])
    row = {"bytes": data, "path": None}
    names = {str(i): f"c{i}" for i in range(12)}
    a = write_parquet(tmp_path / "a.parquet", [row], [11], names, ("img", "fine_label"))
    paths = pack_parquet(
        a, tmp_path / "a", image_column="img", label_column="fine_label", progress=False
    )
    assert json.loads(contents(paths)[0][1]["json"]) == {"class_name": "c11", "label": 11}
    # plain binary, no names
    plain = pa.table({"image": pa.array([data, data], pa.binary()), "label": pa.array([1, 0])})
    pq.write_table(plain, tmp_path / "b.parquet")
    paths = pack_parquet(str(tmp_path / "b.parquet"), tmp_path / "b")
    assert index(paths).classes == ("0", "1")


def test_parquet_that_does_not_fit(tmp_path: Path) -> None:
    good = {"bytes": encode_image(IMAGES[0]), "path": "a.png"}
    out = tmp_path / "out"
    write = write_parquet

    def refuses(files: Any, message: str, where: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            pack_parquet(files, out)
        assert where in caught.value.where
        assert caught.value.remedy
        assert not list(out.glob("*.tar"))
        out.mkdir(exist_ok=True)

    a = write(tmp_path / "a.parquet", [good], [0], ["x", "y"])
    b = write(tmp_path / "b.parquet", [good], [0], ["x", "z"])
    refuses([a, b], "class names differ", "b.parquet")
    b = write(tmp_path / "b.parquet", [good], [0], None, ("img", "label"))
    refuses([a, b], "no column 'image', only: img, label", "b.parquet")
    b = write(tmp_path / "b.parquet", [good], [0], None, ("image", "target"))
    refuses(b, "no column 'label', only: image, target", "b.parquet")
    refuses(write(tmp_path / "b.parquet", [good, good], [0, 2], ["x", "y"]), "row 1 has", "b.pa")
    refuses(write(tmp_path / "b.parquet", [good, good], [-1, 0], ["x", "y"]), "label -1", "b.pa")
    refuses(write(tmp_path / "b.parquet", [good, good], [0, None]), "row 1 has", "b.parquet")
    none = {"bytes": None, "path": "cat.jpg"}
    b = write(tmp_path / "b.parquet", [good, good, none], [0, 0, 0])
    refuses(b, "row 2 has no image bytes, only the path 'cat.jpg'", "b.parquet")
    b = write(tmp_path / "b.parquet", [good, {"bytes": b"text", "path": "a.txt"}], [0, 0])
    refuses(b, "not a supported image: text", "row 1")
    pq.write_table(pa.table({"image": ["a"], "label": [0]}), b)
    refuses(b, "is string, not encoded images", "b.parquet")
    b.write_bytes(a.read_bytes()[:-9])
    refuses([a, b], "cannot be read", "b.parquet")
    refuses([a, tmp_path / "none.parquet"], "cannot be read", "none.parquet")
    with pytest.raises(UserError, match="no rows"):
        pack_parquet([], out)


def labelled(path: Path, labels: pa.Array, column: str = "label") -> Path:
    """A Parquet file of valid images with these labels."""
    image = encode_image(IMAGES[0])
    pq.write_table(pa.table({"image": [image] * len(labels), column: labels}), path)
    return path


def test_files_that_number_the_same_names_differently_are_renumbered(tmp_path: Path) -> None:
    row = {"bytes": encode_image(IMAGES[0]), "path": "a.png"}
    a = write_parquet(tmp_path / "a.parquet", [row] * 3, [0, 1, 2], ["ant", "bee", "cow"])
    b = write_parquet(tmp_path / "b.parquet", [row] * 3, [0, 1, 2], ["cow", "ant", "bee"])
    found = [f for _, f in contents(pack_parquet([a, b], tmp_path / "out"))]
    names = [json.loads(f["json"])["class_name"] for f in found]
    assert names == ["ant", "bee", "cow", "cow", "ant", "bee"]
    assert [f["cls"] for f in found] == [b"0", b"1", b"2", b"2", b"0", b"1"]
    twice = write_parquet(tmp_path / "c.parquet", [row], [0], ["ant", "ant", "bee"])
    other = write_parquet(tmp_path / "d.parquet", [row], [0], ["bee", "ant", "ant"])
    for files, message in (
        (
            [a, write_parquet(tmp_path / "e.parquet", [row], [0], ["ant", "bee"])],
            "is missing 'cow'",
        ),
        ([a, write_parquet(tmp_path / "f.parquet", [row], [0])], "only numbers its classes"),
        ([twice, other], "some of them twice"),
    ):
        with pytest.raises(UserError, match=message):
            pack_parquet(files, tmp_path / "none")
    assert index(pack_parquet(twice, tmp_path / "twice"), allow_empty_classes=True).classes == (
        *("ant (0)", "ant (1)"),
        "bee",
    )


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_labels_that_are_text_are_names(tmp_path: Path, kind: pa.DataType) -> None:
    """Sorted, and the same classes however they are distributed over the files."""
    a = labelled(tmp_path / "a.parquet", pa.array(["owl", "ant", "owl"]).cast(kind))
    b = labelled(tmp_path / "b.parquet", pa.array(["bee", "10"]).cast(kind))
    paths = pack_parquet([a, b], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "train-classes.json").read_text()) == [
        *("10", "ant", "bee", "owl")
    ]
    assert [f["cls"] for _, f in contents(paths)] == [b"3", b"1", b"3", b"2", b"0"]
    with pytest.raises(UserError, match="row 1 has no label"):
        pack_parquet(labelled(tmp_path / "c.parquet", pa.array(["owl", None])), tmp_path / "c")
    number = labelled(tmp_path / "d.parquet", pa.array([0]))
    with pytest.raises(UserError, match="numbers without names") as caught:
        pack_parquet([a, number], tmp_path / "d")
    assert caught.value.where == str(number)


@pytest.mark.parametrize("blank", ["", "  ", "\t", "\u00a0"])
@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int8(), pa.string())])
def test_a_blank_label_is_refused_with_its_row(
    tmp_path: Path, blank: str, kind: pa.DataType
) -> None:
    labels = pa.array(["owl", blank, "ant", blank]).cast(kind)
    file = labelled(tmp_path / "a.parquet", labels)
    with pytest.raises(UserError) as caught:
        pack_parquet([labelled(tmp_path / "b.parquet", pa.array(["owl"])), file], tmp_path / "out")
    said = blank if blank.isprintable() else ascii(blank)[1:-1]
    assert caught.value.what == (
        f"row 1 has the label '{said}', which is not a class name; 2 of 4 rows have an empty or blank label"
    )
    assert caught.value.where == str(file)
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("names", [["image", "label", "label"], ["image", "image", "label"]])
def test_a_column_that_occurs_twice_is_refused(tmp_path: Path, names: list[str]) -> None:
    image, file = pa.array([encode_image(IMAGES[0])]), tmp_path / "a.parquet"
    columns = [image if name == "image" else pa.array([0]) for name in names]
    pq.write_table(pa.Table.from_arrays(columns, names=names), file)
    with pytest.raises(UserError) as caught:
        pack_parquet(file, tmp_path / "out")
    assert caught.value.what == f"the Parquet file has 2 columns named '{names[1]}'"
    assert caught.value.where == str(file)
    more = [
        *columns[::2],
        pa.array([1]),
        pa.array([2]),
    ]  # a column that is not read may be duplicated
    pq.write_table(pa.Table.from_arrays(more, names=["image", "label", "x", "x"]), file)
    assert [f["cls"] for _, f in contents(pack_parquet(file, tmp_path / "out"))] == [b"0"]


@pytest.mark.parametrize(
    "kind", [pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(), pa.int8(), pa.bool_()]
)
def test_any_whole_numbers_are_labels(tmp_path: Path, kind: pa.DataType) -> None:
    file = labelled(tmp_path / "a.parquet", pa.array([1, 0, 1]).cast(kind))
    paths = pack_parquet(file, tmp_path / "out")
    assert [f["cls"] for _, f in contents(paths)] == [b"1", b"0", b"1"]
    assert index(paths).classes == ("0", "1")


@pytest.mark.parametrize(
    ("labels", "what", "remedy"),
    [
        (
            pa.array([0.0, 1.0]),
            "double, not a column of class labels",
            "save the column as integers",
        ),
        (pa.array([[0, 1], [1, 0]]), r"one-hot\?", "argmax"),
        (pa.array([[1, 2], [1]]), "several labels per row", "one label"),
        (pa.array([None, None]), "all rows are null", "data.label_column=NAME"),
        (pa.array([10**12, 0]), "1,000,000,000,000, .* look like ids", "from 0"),
        (pa.array([2**64 - 1, 0], pa.uint64()), "look like ids", "from 0"),
        (pa.array([40_000_000, 0]), "look like ids", "from 0"),
    ],
)
def test_other_labels_are_refused_by_what_they_are(
    tmp_path: Path, labels: pa.Array, what: str, remedy: str
) -> None:
    file = labelled(tmp_path / "a.parquet", labels)
    with pytest.raises(UserError, match=what) as caught:
        pack_parquet(file, tmp_path / "out")
    assert caught.value.where == str(file)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("images", "what"),
    [
        (pa.array(["/data/0.png"]), "such as file paths .'/data/0.png'"),
        (pa.array(["https://x.org/0.png"]), "it contains URLs"),
        (pa.array([base64.b64encode(encode_image(IMAGES[0])).decode()]), "base64 text"),
        (pa.array([[1, 2, 3]], pa.list_(pa.uint8())), "lists of numbers"),
        (pa.array([[b"a"]]), "several images per row"),
        (pa.array([b"abc"], pa.binary(3)), "raw pixels"),
    ],
)
def test_other_images_are_refused_by_what_they_are(
    tmp_path: Path, images: pa.Array, what: str
) -> None:
    pq.write_table(pa.table({"image": images, "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=what) as caught:
        pack_parquet(tmp_path / "a.parquet", tmp_path / "out")
    assert "struct<bytes" in caught.value.remedy


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [
        (("Image", "label"), "did you mean data.image_column=Image?"),
        (("img", "label"), "did you mean data.image_column=img?"),
        (("image", "Label"), "did you mean data.label_column=Label?"),
        (("image", "fine_label"), "did you mean data.label_column=fine_label?"),
    ],
)
def test_the_likely_column_is_named(tmp_path: Path, columns: tuple[str, str], remedy: str) -> None:
    row = {"bytes": encode_image(IMAGES[0]), "path": "a.png"}
    file = write_parquet(tmp_path / "a.parquet", [row], [0], None, columns)
    with pytest.raises(UserError, match="has no column") as caught:
        pack_parquet(file, tmp_path / "out")
    assert caught.value.remedy == remedy


@pytest.mark.parametrize(
    ("data", "what", "remedy"),
    [
        (b"image,label\na.png,0\n", "it is text .CSV.*image,label", "data.source=imagefolder"),
        (b"<!DOCTYPE html><html>log in", "it is an HTML page", "login page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer", "git lfs pull"),
        (b"", "empty", "again"),
        (b"PAR1" + bytes(300), "truncated or corrupt", "again"),
    ],
)
def test_what_is_no_parquet_is_called_what_it_is(
    tmp_path: Path, data: bytes, what: str, remedy: str
) -> None:
    file = tmp_path / "a.parquet"
    file.write_bytes(data)
    with pytest.raises(UserError, match=what) as caught:
        pack_parquet(file, tmp_path / "out")
    assert caught.value.where == str(file)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("name", "file", "classes", "first"),
    [
        ("cifar10", "test-00000-of-00001.parquet", 10, "airplane"),
        ("mini-imagenet", "val-00000-of-00001.parquet", 100, "n01532829"),
    ],
)
def test_real_parquet(tmp_path: Path, name: str, file: str, classes: int, first: str) -> None:
    source = data_dir(name) / file
    paths = pack_parquet(source, tmp_path, shard_size=300, prefix="val", limit=500)
    manifest = index(paths, allow_empty_classes=True)
    names = json.loads((tmp_path / "val-classes.json").read_text())
    assert (len(names), names[0]) == (classes, first)
    assert manifest.classes == tuple(names)
    table = next(pq.ParquetFile(source).iter_batches(500))
    assert manifest.label_N.tolist() == table.column("label").to_pylist()
    images = table.column("image").to_pylist()
    assert [f["jpg"] for _, f in contents(paths)] == [image["bytes"] for image in images]


def test_an_empty_name_among_others_is_refused_before_a_shard_is_written(tmp_path: Path) -> None:
    rows = [encode_image(image) for image in random_images(2, 8, 8)]
    one = tmp_path / "a.parquet"
    names = {"info": {"features": {"label": {"names": ["", "owl"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": rows, "label": [0, 1]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(names)}), one)
    with pytest.raises(UserError, match="class 0 has an empty name") as caught:
        pack_parquet([one], tmp_path / "out", prefix="train")
    assert caught.value.where == "the classes of train"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ({"1": "ant", "2": "owl", "3": "fox"}, "name the classes 1, 2, 3, which are not 0 to 2"),
        ({"0": "ant", "2": "owl"}, "name the classes 0, 2, which are not 0 to 1"),
        (["ant", None, "owl"], "no name for class 1"),
    ],
)
def test_names_that_skip_a_number_are_refused(tmp_path: Path, names: Any, what: str) -> None:
    """Taken by position, label 1 would be packed as 'owl', and a null as the class 'None'."""
    rows = [{"bytes": encode_image(IMAGES[n % 2]), "path": None} for n in range(4)]
    one = write_parquet(tmp_path / "a.parquet", rows, [0, 1, 0, 1], names)
    with pytest.raises(UserError, match=what) as caught:
        pack_parquet([one], tmp_path / "out")
    assert caught.value.where == str(one)
    # The remedy works as written.
    bare = pq.read_table(one).replace_schema_metadata(None)
    pq.write_table(bare, one)
    assert index(pack_parquet([one], tmp_path / "out")).classes == ("0", "1")


@pytest.mark.parametrize("kind", [pa.string(), pa.int64()])
def test_rows_without_a_label_are_packed_if_asked(tmp_path: Path, kind: pa.DataType) -> None:
    """They get no .cls; the classes are those of the other rows."""
    text = kind == pa.string()
    labels = ["owl", None, "ant", None] if text else [1, None, 0, -1]
    path = labelled(tmp_path / "a.parquet", pa.array(labels).cast(kind))
    with pytest.raises(UserError, match="row 1 has no label") as caught:
        pack_parquet(path, tmp_path / "no")
    assert "data.unlabelled=true" in caught.value.remedy
    paths = pack_parquet(path, tmp_path / "out", unlabelled=True)
    assert [f.get("cls") for _, f in contents(paths)] == [b"1", None, b"0", None]
    assert "class_name" not in json.loads(contents(paths)[1][1]["json"])
    with pytest.raises(UserError, match="has no label"):
        index(paths)
    found = index_data_set(paths, unlabelled=True).manifest
    assert found.label_N.tolist() == [1, -1, 0, -1]
    assert found.classes == (("ant", "owl") if text else ("0", "1"))


def test_a_damaged_page_is_named(tmp_path: Path) -> None:
    """The footer and the labels are intact."""
    rows = [{"bytes": encode_image(image), "path": None} for image in random_images(6)]
    path = write_parquet(tmp_path / "a.parquet", rows, [0, 1, 0, 1, 0, 1])
    group = pq.read_metadata(path).row_group(1)
    images = next(
        group.column(i)
        for i in range(group.num_columns)
        if group.column(i).path_in_schema == "image.bytes"
    )
    with open(path, "r+b") as file:
        file.seek(images.dictionary_page_offset or images.data_page_offset)
        file.write(b"\xff" * 64)
    with pytest.raises(UserError, match="truncated or corrupt") as caught:
        pack_parquet(path, tmp_path / "out", prefix="train")
    assert caught.value.where == str(path)
    assert not list((tmp_path / "out").glob("*.tar"))
