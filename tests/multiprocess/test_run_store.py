"""A run in an object store: whenever its writer is killed, the store has either the old state or the new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.data.storage.transfer import FileInfo, RemoteFiles
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.run_storage.store import Damaged, Store, TakenOver
from tests.support import REPOSITORY
from tests.support.forks import Fork
from tests.support.ports import free_port
from tests.support.runs import environment
from tests.support.servers import http_server
from tests.support.stored import put_and_die, s3_access, s3_bucket, sources

OLD = {"begin.json": b"begun", "checkpoints/latest": b"step 1", "checkpoints/step-1/w": b"x" * 5000}
NEW = {"begin.json": b"begun", "checkpoints/latest": b"step 2", "checkpoints/step-2/w": b"y" * 5000}


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    with s3_bucket() as store:
        yield store


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(urls, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(urls, "LONGEST_PAUSE", 0.02)


def contents(url: str, folder: Path) -> dict[str, bytes]:
    """Everything that a store has of the teacher, as a new reader sees it."""
    store = Store.open(url)
    assert store.get("teacher", store.records["teacher"].files, folder) == {}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def objects(fs: Any, url: str) -> list[str]:
    return fs.find(f"{url.removeprefix('s3://')}/files")


def test_a_writer_killed_before_any_request_leaves_the_old_state_or_the_new(bucket, tmp_path):
    """The requests of the new state are the claim, two files, the record and two removals."""
    seen = []
    for requests in range(7):
        url = f"s3://runs/killed-{requests}"
        first = Store.open(url)
        first.claim()
        first.put("teacher", sources(OLD), "one")
        job = Fork(put_and_die, (url, "teacher", NEW, requests), environment(), REPOSITORY)
        assert job.wait(120) == (0 if requests == 6 else -signal.SIGKILL)
        found = contents(url, tmp_path / str(requests))
        assert found in (OLD, NEW)
        seen.append(found == NEW)

        again = Store.open(url)  # the next writer removes what was left behind
        again.claim()
        assert len(objects(bucket, url)) == 3
        again.put("teacher", sources(NEW), "two")
        assert contents(url, tmp_path / f"{requests} again") == NEW
        assert len(objects(bucket, url)) == 3
    assert seen == [False] * 4 + [True] * 3


def test_what_was_set_aside_keeps_its_files(bucket, tmp_path):
    store = Store.open("s3://runs/aside")
    store.claim()
    store.put("teacher", sources(OLD), "one")
    store.replace({"teacher.old-1": store.records["teacher"], "teacher": None})
    store.put("teacher", sources(NEW), "one")
    found = Store.open("s3://runs/aside")
    assert sorted(found.records) == ["teacher", "teacher.old-1"]
    assert len(objects(bucket, "s3://runs/aside")) == 5  # begin.json is the same in both
    assert contents("s3://runs/aside", tmp_path) == NEW


@pytest.mark.parametrize("harm", ["flipped", "truncated", "removed"])
def test_a_damaged_object_is_named_and_not_delivered(bucket, tmp_path, harm):
    url = f"s3://runs/{harm}"
    store = Store.open(url)
    store.claim()
    store.put("teacher", sources(OLD), "one")
    [victim] = [name for name in objects(bucket, url) if "step-1" in name]
    data = bucket.cat_file(victim)
    if harm == "removed":
        bucket.rm_file(victim)
    else:
        bucket.pipe_file(victim, data[:-7] if harm == "truncated" else data[:-1] + b"?")
    damaged = Store.open(url).get("teacher", OLD, tmp_path)
    assert list(damaged) == ["checkpoints/step-1/w"]
    [error] = damaged.values()
    assert error.where == f"s3://{victim}"
    assert "restore it" in error.remedy
    assert not (tmp_path / "checkpoints" / "step-1" / "w").exists()
    assert (tmp_path / "begin.json").read_bytes() == OLD["begin.json"]


def test_a_damaged_record_is_named(bucket):
    store = Store.open("s3://runs/record")
    store.claim()
    store.put("teacher", sources(OLD), "one")
    name = "runs/record/records/teacher.json"
    bucket.pipe_file(name, bucket.cat_file(name).replace(b"5000", b"5001"))
    with pytest.raises(Damaged, match="a record of the run's storage is damaged") as caught:
        Store.open("s3://runs/record")
    assert caught.value.where == f"s3://{name}"


def test_the_run_that_was_started_last_writes(bucket):
    first, second = Store.open("s3://runs/two"), Store.open("s3://runs/two")
    first.claim()
    second.claim()
    second.put("teacher", sources(NEW), "two")
    with pytest.raises(TakenOver, match=f"on .*, process {os.getpid()}"):
        first.put("teacher", sources(OLD), "one")
    assert Store.open("s3://runs/two").records["teacher"].writer == "two"


def test_what_the_one_before_writes_until_the_claim_is_kept(bucket, tmp_path):
    """A run that is being stopped stores a last checkpoint while its successor starts."""
    first = Store.open("s3://runs/late")
    first.claim()
    first.put("teacher", sources(OLD), "one")
    second = Store.open("s3://runs/late")
    first.put("teacher", sources(NEW), "one")
    second.claim()
    assert sorted(second.records["teacher"].files) == sorted(NEW)
    assert contents("s3://runs/late", tmp_path) == NEW


def test_a_record_written_during_the_claim_takes_no_file_from_the_successor(
    bucket, tmp_path, monkeypatch
):
    url = "s3://runs/crossing"
    first = Store.open(url)
    first.claim()
    first.put("teacher", sources(OLD), "one")
    second, check = Store.open(url), Store._check_owner

    def crossed(store: Store) -> None:
        check(store)
        monkeypatch.setattr(Store, "_check_owner", check)
        second.claim()

    monkeypatch.setattr(Store, "_check_owner", crossed)
    with pytest.raises(TakenOver):
        first.put("teacher", sources(NEW), "one")
    assert second.get("teacher", OLD, tmp_path) == {}
    second.put("teacher", sources(OLD), "two")
    assert contents(url, tmp_path) == OLD


def test_a_record_that_is_replaced_while_it_is_read_is_read_again(bucket, monkeypatch):
    url = "s3://runs/replaced"
    first, info = Store.open(url), RemoteFiles.file_info
    first.claim()
    first.put("teacher", sources(OLD), "one")

    def replaced(files: RemoteFiles, where: str) -> FileInfo:
        found = info(files, where)
        if where.endswith("teacher.json"):
            monkeypatch.setattr(RemoteFiles, "file_info", info)
            first.put("teacher", sources(OLD | NEW), "one")
        return found

    monkeypatch.setattr(RemoteFiles, "file_info", replaced)
    assert sorted(Store.open(url).records["teacher"].files) == sorted(OLD | NEW)


def test_another_thing_than_a_run_is_not_written_into(bucket):
    bucket.pipe_file("runs/other/picture.png", b"a picture")
    with pytest.raises(UserError, match="something other than a run") as caught:
        Store.open("s3://runs/other")
    assert caught.value.where == "run.storage=s3://runs/other"


def test_what_cannot_be_used_is_refused_within_seconds(bucket, tmp_path, monkeypatch):
    def refused(url: str) -> UserError:
        urls._opened.cache_clear()
        with pytest.raises(UserError) as caught:
            Store.open(url).claim()
        return caught.value

    assert "not the URL of a store" in refused("/some/folder").what
    missing = refused("s3://no-such-bucket/run")
    assert "does not exist (404)" in missing.what
    assert missing.where.startswith("run.storage=s3://no-such-bucket/run")
    with http_server(tmp_path) as web:
        web.fault = lambda number, path: "403"
        web.head_fault = lambda path: "403"
        for name, value in s3_access(web.url).items():
            monkeypatch.setenv(name, value)
        assert "permission denied (403)" in refused("s3://runs/run").what
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert "s of retries" in refused("s3://runs/run").what
    urls._opened.cache_clear()


def test_a_process_that_fails_does_not_stay_for_its_uploads():
    """Otherwise a rank that has raised would keep the others waiting until it gives up on a silent store."""
    code = (
        "import threading\n"
        "from cnn2gnn_dist.runtime import in_threads\n"
        "from cnn2gnn_dist.run_storage.background import Uploads\n"
        "from cnn2gnn_dist.run_storage.contents import Contents\n"
        "begun = threading.Event()\n"
        "def silent(name):\n"
        "    begun.set()\n"
        "    threading.Event().wait()\n"
        "uploads = Uploads(lambda found: in_threads.each(silent, ['a', 'b']))\n"
        "uploads.start(Contents())\n"
        "begun.wait()\n"
        "raise SystemExit(7)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 7
