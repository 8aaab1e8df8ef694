"""Packers: pixels and bytes survive, the same input gives the same shards, bad input is reported."""

from __future__ import annotations

import base64
import io
import json
import os
import types
import urllib.error
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cnn2gnn_dist.data.images.formats import image_suffix
from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.index.manifest_pair import index_data_set
from cnn2gnn_dist.data.packing.packers import (
    pack_digits,
    pack_imagefolder,
    pack_parquet,
    pack_torchvision,
)
from cnn2gnn_dist.data.packing.shard_writer import NewSample, write_shards
from cnn2gnn_dist.data.tar import samples
from cnn2gnn_dist.errors import UserError
from tests.support.shards import data_dir, encode_image, random_images

IMAGES = random_images(6, 8, 8)


def contents(paths: list[Path]) -> list[tuple[str, dict[str, bytes]]]:
    found = []
    for path in paths:
        data = path.read_bytes()
        for sample in samples.samples(path):
            fields = {s: data[m.offset : m.offset + m.size] for s, m in sample.fields.items()}
            found.append((sample.key, fields))
    return found


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


def test_digits(tmp_path: Path) -> None:
    paths = pack_digits(tmp_path / "a", shard_size=1000)
    manifest = index(paths)
    assert [p.name for p in paths] == ["digits-000000.tar", "digits-000001.tar"]
    assert manifest.shard_sizes.tolist() == [1000, 797]
    assert manifest.classes == tuple("0123456789")
    assert json.loads((tmp_path / "a" / "digits-classes.json").read_text()) == list("0123456789")

    from sklearn.datasets import load_digits

    digits = load_digits()
    assert manifest.label_N.tolist() == digits.target.tolist()
    for row in (0, 999):
        sample = contents(paths[:1])[row][1]
        image = np.asarray(Image.open(io.BytesIO(sample["png"])))
        assert image.shape == (32, 32, 3)
        assert np.array_equal(image[..., 0], image[..., 2])
        # Smooth upsampling: downsampled again, it is close to the original.
        back = image[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
        assert np.corrcoef(back.ravel(), digits.images[row].ravel())[0, 1] > 0.98


def test_same_input_same_bytes_and_rerun_replaces(tmp_path: Path) -> None:
    first = pack_digits(tmp_path / "a", shard_size=16, limit=40)
    second = pack_digits(tmp_path / "b", shard_size=16, limit=40)
    bytes_of = [p.read_bytes() for p in first]
    assert bytes_of == [p.read_bytes() for p in second]
    assert bytes_of == [
        p.read_bytes() for p in pack_digits(tmp_path / "a", shard_size=16, limit=40)
    ]
    assert len(list((tmp_path / "a").iterdir())) == 4  # three shards and the class names
    with pytest.raises(UserError, match="1 shards of an earlier, larger run") as caught:
        pack_digits(tmp_path / "a", shard_size=16, limit=32)
    assert caught.value.where.endswith("digits-000002.tar")
    pack_digits(tmp_path / "a", shard_size=16, limit=32, prefix="other")


def test_interrupted_pack_leaves_whole_shards_only(tmp_path: Path) -> None:
    def sources() -> Any:
        for i in range(3):
            yield NewSample(f"k{i}", b"x", "jpg", 0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(
            sources(), 6, tmp_path, prefix="p", shard_size=2, classes=["a"], progress=False
        )
    assert [p.name for p in tmp_path.iterdir()] == ["p-000000.tar"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix": "a.b"}, "prefix 'a.b'"),
        ({"prefix": ""}, "prefix ''"),
        ({"shard_size": 0}, "shard size is 0"),
        ({"limit": 0}, "no images to pack"),
    ],
)
def test_arguments(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack_digits(tmp_path, **options)


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
    """Sorted, and the same classes however they are spread over the files."""
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
def test_a_column_that_stands_twice_is_refused(tmp_path: Path, names: list[str]) -> None:
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


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def test_imagefolder(tmp_path: Path) -> None:
    jpg, png = encode_image(IMAGES[0], "jpg"), encode_image(IMAGES[1])
    root = tree(
        tmp_path / "in",
        {
            "zebra/1.JPEG": jpg,
            "zebra/1.png": png,
            "zebra/sub.x/a.b.jpeg": jpg,
            "zebra/sub_x/a_b.jpg": png,  # a PNG by its bytes
            "ant/é.jpg": jpg,
            "ant/broken.jpg": jpg[:90],  # a corrupt middle is left to the reader
            "ant/._é.jpg": b"",
            "ant/notes.txt": b"",
            ".cache/x.jpg": jpg,
            "README.md": b"",
        },
    )
    paths = pack_imagefolder(root, tmp_path / "out", shard_size=4)
    found = dict(contents(paths))
    assert index(paths).classes == ("ant", "zebra")
    assert {k: (set(f) - {"cls", "json"}).pop() for k, f in found.items()} == {
        "zebra_1": "jpg",
        "zebra_1_2": "png",
        "zebra_sub_x_a_b": "jpg",
        "zebra_sub_x_a_b_2": "png",
        "ant_é": "jpg",
        "ant_broken": "jpg",
    }
    assert found["zebra_1"]["jpg"] == jpg
    assert found["zebra_sub_x_a_b_2"]["png"] == png
    assert json.loads(found["ant_é"]["json"]) == {
        "class_name": "ant",
        "filename": "ant/é.jpg",
        "label": 0,
    }
    again = pack_imagefolder(root, tmp_path / "again", shard_size=4)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]
    other = pack_imagefolder(root, tmp_path / "other", shard_size=4, seed=1)
    assert [k for k, _ in contents(other)] != [k for k, _ in contents(paths)]  # shuffled
    assert dict(contents(other)) == found


def test_imagefolder_that_does_not_fit(tmp_path: Path) -> None:
    files = {"ant/1.jpg": b"\xff\xd8\xff", "bee/a.heic": bytes(99), "bee/read me": b""}
    root = tree(tmp_path / "in", files)
    message = r"class 'bee' has no images, only 1 \.heic .*, 1 without a suffix"
    with pytest.raises(UserError, match=message) as caught:
        pack_imagefolder(root, tmp_path / "out")
    assert caught.value.where == str(root / "bee")
    assert "jfif" in caught.value.remedy
    with pytest.raises(UserError, match=r"no class folders.*1 loose file beside the class folders"):
        pack_imagefolder(root / "ant", tmp_path / "out")
    with pytest.raises(UserError, match="no such folder"):
        pack_imagefolder(tmp_path / "none", tmp_path / "out")


def test_imagefolder_says_what_it_leaves_out(
    tmp_path: Path, console: None, capsys: pytest.CaptureFixture[str]
) -> None:
    jpg = encode_image(IMAGES[0], "jpg")
    root = tree(
        tmp_path / "in",
        {
            **{f"ant/{n}.png": encode_image(IMAGES[n]) for n in range(4)},
            **{f"ant/x{suffix}": jpg for suffix in (".jpe", ".JFIF", ".pjpeg", "", ".jpg?size=2")},
            "bee/1.png": jpg,
            "bee/2.avif": bytes(60),
            "bee/3.avif": bytes(60),
            "bee/.4.png": jpg,
            "loose.png": jpg,
            "README.md": b"words",
        },
    )
    (root / "bee" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    paths = pack_imagefolder(root, tmp_path / "out", prefix="some")
    assert len(index(paths)) == 10
    assert capsys.readouterr().err.strip() == (
        "note: some: 10 images; left out: 2 .avif (not read; first: bee/2.avif), "
        "1 .md (not read; first: README.md), 1 broken link (first: bee/gone.png), "
        "1 hidden (first: bee/.4.png), 1 loose file beside the class folders (first: loose.png)"
    )
    kept = json.loads((tmp_path / "out" / "some-left-out.json").read_text())
    assert kept["images"] == 10
    assert kept["left_out"][".avif"] == {"count": 2, "first": ["bee/2.avif", "bee/3.avif"]}
    assert sum(reason["count"] for reason in kept["left_out"].values()) == 6


def test_imagefolder_leaves_out_what_is_no_image_up_to_the_limit(
    tmp_path: Path, console: None, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{c}/{n}.png": encode_image(IMAGES[n]) for c in ("ant", "bee") for n in range(4)}
    page, avif = b"<!DOCTYPE html>404", b"\0\0\0\x1cftypavif" + bytes(50)
    root = tree(tmp_path / "in", {**files, "ant/7.jpg": page, "bee/8.jpg": b"", "bee/9.jpeg": avif})
    with pytest.raises(UserError, match="3 corrupt images among 11, more than") as caught:
        pack_imagefolder(root, tmp_path / "out", max_corrupt=0.2)
    for part in ("ant/7.jpg: an HTML page", "bee/8.jpg: an empty file", "bee/9.jpeg: AVIF"):
        assert part in caught.value.what
    assert not list((tmp_path / "out").glob("*"))
    limit = caught.value.remedy.split("data.max_corrupt=")[1].split()[0]
    paths = pack_imagefolder(root, tmp_path / "out", max_corrupt=float(limit))
    assert sorted(key for key, _ in contents(paths)) == sorted(
        n[:5].replace("/", "_") for n in files
    )
    assert "left out: 3 corrupt (first: ant/7.jpg: an HTML page" in capsys.readouterr().err
    for name in files:
        if name.startswith("ant"):
            (root / name).write_bytes(b"")
    with pytest.raises(UserError, match="class 'ant' has no images, only 5 corrupt"):
        pack_imagefolder(root, tmp_path / "out", max_corrupt=1)


def test_names_that_are_not_utf8(
    tmp_path: Path, console: None, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "in", {"ant/1.png": encode_image(IMAGES[0])})
    other = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(other)
    for name in (b"a\xe9.png", b"a\xe8.png", b"b\xe9.txt"):
        with open(other + b"/" + name, "wb") as file:
            file.write(encode_image(IMAGES[1]) if name.endswith(b"png") else b"words")
    paths = pack_imagefolder(root, tmp_path / "out")
    manifest = index(paths)
    assert manifest.classes == ("ant", "caf\\xe9")
    assert manifest.label_N.sum() == 2
    about = [json.loads(fields["json"])["filename"] for _, fields in contents(paths)]
    assert sorted(about) == ["ant/1.png", "caf\\xe9/a\\xe8.png", "caf\\xe9/a\\xe9.png"]
    assert "1 .txt (not read; first: caf\\xe9/b\\xe9.txt)" in capsys.readouterr().err
    (root / "caf\\xe9").mkdir()
    (root / "caf\\xe9" / "1.png").write_bytes(encode_image(IMAGES[2]))
    with pytest.raises(UserError, match="same name when encoded as UTF-8"):
        pack_imagefolder(root, tmp_path / "again")


def stub_torchvision(monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> None:
    class CIFAR10:
        url = "https://example.invalid/cifar-10.tar.gz"

        def __init__(self, root: str, train: bool, download: bool) -> None:
            if failure is not None:
                raise failure
            self.data = IMAGES if train else IMAGES[::-1]
            self.targets = [0, 1, 2, 0, 1, 2]
            self.classes = ["ant", "owl", "yak"]

    module = types.SimpleNamespace(datasets=types.SimpleNamespace(CIFAR10=CIFAR10))
    monkeypatch.setattr("cnn2gnn_dist.compat.import_torchvision", lambda: module)


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_torchvision(monkeypatch, None)
    train = pack_torchvision("cifar10", tmp_path, True, tmp_path / "out", shard_size=4)
    test = pack_torchvision("cifar10", tmp_path, False, tmp_path / "out", limit=3)
    assert [p.name for p in train + test] == [
        *["train-000000.tar", "train-000001.tar", "test-000000.tar"]
    ]
    assert index(train).classes == ("ant", "owl", "yak")
    pixels = [np.asarray(Image.open(io.BytesIO(f["png"]))) for _, f in contents(train)]
    assert np.array_equal(pixels, IMAGES)
    with pytest.raises(UserError, match="'mnist' cannot be packed"):
        pack_torchvision("mnist", tmp_path, True, tmp_path / "out")


@pytest.mark.parametrize(
    "failure", [urllib.error.URLError("unreachable"), RuntimeError("File not found or corrupted.")]
)
def test_torchvision_out_of_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    stub_torchvision(monkeypatch, failure)
    with pytest.raises(UserError, match="CIFAR10 is missing and cannot be downloaded") as caught:
        pack_torchvision("cifar10", tmp_path / "cifar", True, tmp_path / "out")
    assert caught.value.where == str(tmp_path / "cifar")
    assert "https://example.invalid" in caught.value.remedy


def test_torchvision_names_what_we_use() -> None:
    from cnn2gnn_dist.compat import import_torchvision

    for name in ("CIFAR10", "CIFAR100"):
        kind = getattr(import_torchvision().datasets, name)
        assert kind.url.startswith("https://")


def test_magic_bytes() -> None:
    for suffix, form in [
        *[("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("gif", "GIF"), ("bmp", "BMP")],
        *[("tif", "TIFF"), ("ppm", "PPM")],
    ]:
        file = io.BytesIO()
        Image.fromarray(IMAGES[0]).save(file, form)
        assert image_suffix(file.getvalue()) == suffix
    assert image_suffix(b"") is None
    assert image_suffix(b"<html>") is None


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


@pytest.mark.parametrize("kind", [pa.string(), pa.int64()])
def test_rows_without_a_label_are_packed_if_asked(tmp_path: Path, kind: pa.DataType) -> None:
    """Without .cls; the classes are those of the other rows."""
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
