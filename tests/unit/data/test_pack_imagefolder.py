"""Folders of images as shards: which files count, under what names, and what is left out."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from cnn2gnn_dist.data.index.manifest import index
from cnn2gnn_dist.data.packing.packers import (
    pack_imagefolder,
)
from cnn2gnn_dist.errors import UserError
from tests.support.shards import encode_image
from tests.unit.data.test_packers import IMAGES, contents


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
            "ant/broken.jpg": jpg[:90],  # corruption after the header is left to the reader
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
    with pytest.raises(UserError, match="7 corrupt images among 11") as caught:
        pack_imagefolder(root, tmp_path / "out", max_corrupt=0.2)
    assert "max_corrupt" not in caught.value.remedy  # it would leave a class without images
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


def test_an_image_that_cannot_be_read_to_its_end_is_named(tmp_path: Path, monkeypatch) -> None:
    """As on a bad disk, or if somebody deletes it meanwhile."""
    data = encode_image(IMAGES[0], "jpg")
    root = tree(tmp_path / "in", {f"{c}/{i}.jpg": data for c in "ab" for i in range(3)})
    real = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path.name == "1.jpg":
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    with pytest.raises(UserError, match="can't be read: Input/output error") as caught:
        pack_imagefolder(root, tmp_path / "out")
    assert caught.value.where.endswith("/1.jpg")
    assert not list((tmp_path / "out").glob("*.tar"))
