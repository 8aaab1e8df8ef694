"""Uploads in a thread: nobody waits for them, and of several pending ones only the newest is made."""

from __future__ import annotations

import threading

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.run_storage.background import Uploads
from cnn2gnn_dist.run_storage.contents import Contents


def contents(name: str) -> Contents:
    made = Contents()
    made.sources[name] = (0, "", b"")
    return made


def test_the_newest_of_those_that_wait_follows_one_that_is_under_way():
    begun, release, seen = threading.Event(), threading.Event(), []

    def upload(found: Contents) -> None:
        begun.set()
        assert release.wait(60)
        seen.extend(found.sources)

    uploads = Uploads(upload)
    for name in ("first", "second", "third"):
        uploads.start(contents(name))  # returns although the first is held up
        assert begun.wait(60)
    assert uploads.outcomes() == []
    release.set()
    assert uploads.wait() is None
    assert seen == ["first", "third"]
    assert uploads.outcomes() == [None, None]
    assert uploads.outcomes() == []


def test_failures_are_kept_in_order_and_the_last_one_counts():
    failures = iter([UserError("refused", where="s3://x"), RuntimeError("broken"), None])

    def upload(found: Contents) -> None:
        if (error := next(failures)) is not None:
            raise error

    uploads = Uploads(upload)
    texts = []
    for _ in range(3):
        uploads.start(contents("one"))
        last = uploads.wait()
        texts.append(last and last.what)
    assert texts == ["refused", "the upload failed: RuntimeError: broken", None]
    assert [one and one.what for one in uploads.outcomes()] == texts


def test_files_are_let_go_when_they_are_uploaded_or_overtaken(tmp_path):
    (tmp_path / "weights").write_bytes(b"weights")
    made = Contents()
    made.add_open("checkpoints/step-1/w", tmp_path / "weights", 7, "sum")
    (tmp_path / "weights").unlink()  # pruned meanwhile
    _, _, source = made.sources["checkpoints/step-1/w"]
    assert not isinstance(source, bytes)
    seen = []
    uploads = Uploads(lambda found: seen.append(source.read_bytes()))
    uploads.start(made)
    assert uploads.wait() is None
    assert seen == [b"weights"]
    assert not source.exists()
