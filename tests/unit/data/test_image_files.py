"""The search for images below a folder: links, loops, names without a suffix, and files left out."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from cnn2gnn_dist.data.images import image_files
from cnn2gnn_dist.data.images.image_files import find_images, read_file, unreadable
from cnn2gnn_dist.errors import UserError
from tests.support.shards import encode_image, random_images

PNG = encode_image(random_images(1)[0])


def tree(root: Path, *names: str, data: bytes = PNG) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_links_are_followed_and_each_folder_is_read_once(tmp_path):
    store = tree(tmp_path / "store", "s1.png", "deep/s2.png")
    root = tree(tmp_path / "in", "a/1.png", "b/2.png", "b/sub/3.png")
    for name, target in {
        "a/again": root / "b" / "sub",  # its images are b's
        "a/loop": root / "a",
        "a/more": store,
        "a/up": tmp_path,  # contains the root itself
        "b/deep": store / "deep",  # read as part of a/more
        "c": tmp_path / "elsewhere",
    }.items():
        (root / name).symlink_to(target)
    tree(tmp_path / "elsewhere", "4.png")
    (root / "b" / "one.png").symlink_to(store / "s1.png")
    found = find_images(root, classes=True)
    assert found.folders == ["a", "b", "c"]
    assert found.images == [
        *["a/1.png", "a/more/deep/s2.png", "a/more/s1.png"],
        *["b/2.png", "b/one.png", "b/sub/3.png", "c/4.png"],
    ]
    assert found.left_out == {
        "link to a folder that was already read": ["a/again", "a/loop", "a/up", "b/deep"]
    }


def test_a_link_into_a_folder_that_is_read_later_is_no_second_copy(tmp_path):
    store = tree(tmp_path / "store", "s1.png", "deep/s2.png")
    root = tree(tmp_path / "in", "a/1.png")
    (root / "a" / "deep").symlink_to(store / "deep")  # sorts before the folder that contains it
    (root / "a" / "whole").symlink_to(store)
    found = find_images(root)
    assert found.images == ["a/1.png", "a/deep/s2.png", "a/whole/s1.png"]
    assert found.left_out == {"link to a folder that was already read": ["a/whole/deep"]}


def test_a_class_that_is_another_one_under_a_second_name_has_no_images(tmp_path):
    root = tree(tmp_path / "in", "b/1.png")
    (root / "a").symlink_to(root / "b")
    found = find_images(root, classes=True)
    assert (found.folders, found.images) == (["a", "b"], ["b/1.png"])


def test_what_is_no_image_is_counted_by_its_reason(tmp_path):
    root = tree(tmp_path / "in", "a/1.png", "a/2", "a/x.png/3.png", "a/4.2024", "a/5.HEIC", "6.png")
    tree(root, "a/._1.png", "a/.hid/7.png", "__MACOSX/8.png", "a/Thumbs.db", "a/9.jpg.part", "a/8~")
    tree(root, "a/10.HEIC", "a/list.csv", "a/nothing", "n.txt", data=b"words")
    os.mkfifo(root / "a" / "pipe.png")  # reading it would block forever
    (root / "a" / "sock").symlink_to(root / "a" / "pipe.png")
    (root / "a" / "gone").symlink_to("/nowhere")
    found = find_images(root, classes=True)
    assert found.folders == ["a"]
    # A .heic file that contains a PNG is an image: some phones name them that way.
    assert found.images == ["a/1.png", "a/2", "a/4.2024", "a/5.HEIC", "a/x.png/3.png"]
    assert found.left_out == {
        "hidden": ["__MACOSX", "a/._1.png", "a/.hid", "a/Thumbs.db"],
        "loose file beside the class folders": ["6.png"],
        "broken link": ["a/gone"],
        "special file": ["a/pipe.png", "a/sock"],
        "unfinished copy": ["a/8~", "a/9.jpg.part"],
        "without a suffix, not an image by its bytes": ["a/nothing"],
        ".heic": ["a/10.HEIC"],
        ".csv": ["a/list.csv"],
        ".txt": ["n.txt"],
    }
    assert find_images(root).images == ["6.png", *found.images]


def test_a_class_whose_link_is_broken_is_not_passed_over(tmp_path):
    root = tree(tmp_path / "in", "a/1.png")
    (root / "b").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="'b' is a broken link") as caught:
        find_images(root, classes=True)
    assert caught.value.where == str(root / "b")
    assert find_images(root).left_out == {"broken link": ["b"]}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path):
    root = tree(tmp_path / "in", "a/sub/1.png")
    (root / "a" / "sub").chmod(0)
    with pytest.raises(UserError, match="can't be read: Permission denied"):
        find_images(root)
    (root / "a" / "sub").chmod(0o755)


def test_unreadable_says_what_a_file_is_instead(tmp_path):
    tree(tmp_path, "1.png", "2.jpg")
    tree(tmp_path, "3.jpg", data=b"")
    tree(tmp_path, "4.jpg", data=b"  <html>")
    names = ["1.png", "2.jpg", "3.jpg", "4.jpg", "5.jpg"]
    assert unreadable(tmp_path, names) == {
        "3.jpg": "an empty file",
        "4.jpg": "an HTML page",
        "5.jpg": "No such file or directory",
    }


def test_a_pipe_gives_all_that_is_written_to_it(tmp_path):
    pipe, data = tmp_path / "pipe.png", bytes(range(251)) * 1000  # more than a pipe buffers
    os.mkfifo(pipe)

    def write_late():
        time.sleep(0.2)  # the reader opens it first
        with open(pipe, "wb", buffering=0) as file:
            time.sleep(0.2)  # open, but still empty
            file.write(data[:70])
            time.sleep(0.2)
            file.write(data[70:])

    writer = threading.Thread(target=write_late)
    writer.start()
    assert read_file(pipe) == data
    writer.join()
    (tmp_path / "file").write_bytes(data)
    assert read_file(tmp_path / "file") == data


def test_a_pipe_that_nobody_writes_to_is_not_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "WRITER_S", 0.25)
    monkeypatch.setattr(image_files, "BYTES_S", 0.5)
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(TimeoutError, match=r"nothing is writing to the pipe \(waited 0.25 seconds"):
        read_file(pipe)
    held = os.open(pipe, os.O_RDWR)  # a writer that writes nothing
    with pytest.raises(TimeoutError, match=r"waited 0.5 seconds"):
        read_file(pipe)
    monkeypatch.setattr(image_files, "BYTES_S", 60.0)
    read_all = image_files._all_of_pipe

    def opened(handle: int) -> bytes:
        threading.Thread(target=os.close, args=(held,)).start()
        return read_all(handle)

    monkeypatch.setattr(image_files, "_all_of_pipe", opened)
    assert read_file(pipe) == b""  # the writer has closed it
