"""Transfers under network faults."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.errors import UserError
from tests.support.servers import Served, http_server

BYTES = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a.tar").write_bytes(BYTES)
    monkeypatch.setattr(urls, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(urls, "LONGEST_PAUSE", 0.002)
    with http_server(tmp_path / "w") as served:
        yield served


def downloaded(url: str) -> bytes:
    file = io.BytesIO()
    urls.download(url, len(BYTES), file)
    return file.getvalue()


def first_times(count: int, fault: str) -> Callable[..., str | None]:
    left = [fault] * count
    return lambda *_: left.pop() if left else None


def test_a_length_is_asked_for_again(web):
    web.head_fault = first_times(2, "500")
    web.fault = first_times(2, "500")
    assert urls.size(f"{web.url}/a.tar") == len(BYTES)


@pytest.mark.parametrize("status", ["403", "404"])
def test_a_refusal_counts_at_once(web, status):
    web.head_fault = lambda path: status
    web.fault = lambda number, path: status
    with pytest.raises(UserError, match=rf"can't be read.*\({status}\)") as caught:
        urls.size(f"{web.url}/a.tar")
    assert caught.value.where == f"{web.url}/a.tar"
    assert caught.value.remedy
    assert web.requests.total() == 1


@pytest.mark.parametrize("ask", [urls.size, lambda url: urls.read_range(url, 0, 9)])
def test_a_redirect_loop_is_named(web, ask):
    web.head_fault = lambda path: "loop"
    web.fault = lambda number, path: "loop"
    with pytest.raises(UserError, match="redirects in a loop") as caught:
        ask(f"{web.url}/a.tar")
    assert caught.value.where == f"{web.url}/a.tar"


def test_a_server_without_ranges_sends_the_whole_once(web):
    web.fault = lambda number, path: "whole"
    assert downloaded(f"{web.url}/a.tar") == BYTES
    assert web.requests.total() == 1
    web.sent = 0
    assert urls.read_range(f"{web.url}/a.tar", 70_000, 500) == BYTES[70_000:70_500]


def test_nothing_is_asked_for_where_there_are_no_bytes(web):
    """Servers refuse a range that ends before it begins: an image in a shard may be empty, or a shard."""
    file = io.BytesIO()
    urls.download(f"{web.url}/a.tar", 0, file)
    assert file.getvalue() == urls.read_range(f"{web.url}/a.tar", 70_000, 0) == b""
    assert web.requests.total() == 0


@pytest.mark.parametrize("fault", ["short", "drop", "500"])
def test_what_has_come_is_not_asked_for_again(web, fault):
    web.fault = first_times(2, fault)
    assert downloaded(f"{web.url}/a.tar") == BYTES
    assert web.sent == len(BYTES)
    assert web.requests.total() == 3


def test_a_server_that_drips_is_given_up(web, monkeypatch):
    monkeypatch.setattr(urls, "SECONDS", 1.0)
    monkeypatch.setattr(urls, "SLOWEST", 1e9)
    web.fault = lambda number, path: "drip"
    with pytest.raises(UserError, match="can't be read"):
        urls.read_range(f"{web.url}/a.tar", 0, 100_000)


def test_s3_is_asked_as_often_as_we_say(web, monkeypatch, tmp_path):
    """Otherwise the store's client would multiply our retries by its own."""
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": web.url,
    }.items():
        monkeypatch.setenv(name, value)
    urls._opened.cache_clear()
    web.fault = lambda number, path: "500"
    with pytest.raises(UserError, match="can't be read"):
        urls.read_range("s3://some-bucket/a.tar", 0, 10)
    assert web.requests.total() == urls.ATTEMPTS
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    urls._opened.cache_clear()
    web.requests.clear()
    with pytest.raises(UserError, match=r"can't be read.*permission denied") as caught:
        urls.read_range("s3://some-bucket/a.tar", 0, 10)
    assert "AWS_" in caught.value.remedy
    assert web.requests.total() == 0
    urls._opened.cache_clear()


def test_any_file_system_that_fsspec_knows():
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe_file("/d/b.tar", BYTES)
    store.pipe_file("/d/a.tar", b"a")
    try:
        assert urls.matches("memory://d/") == ["memory:///d/a.tar", "memory:///d/b.tar"]
        assert urls.size("memory://d/b.tar") == len(BYTES)
        assert downloaded("memory://d/b.tar") == BYTES
        assert urls.read_range("memory://d/b.tar", 5, 9) == BYTES[5:14]
        with pytest.raises(UserError, match="does not exist"):
            urls.size("memory://d/c.tar")
    finally:
        store.rm("/d", recursive=True)


def test_a_full_disk_does_not_count_as_a_network_fault(web):
    class Full(io.BytesIO):
        def write(self, data: object, /) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        urls.download(f"{web.url}/a.tar", len(BYTES), Full())
    assert web.requests.total() == 1


def test_a_copy_leaves_nothing_behind(web, tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(urls.local_copy(f"{web.url}/a.tar"))
        assert Path(path).read_bytes() == BYTES
        assert list((tmp_path / "t").iterdir()) == []  # not even if this process were killed now
