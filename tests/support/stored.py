"""A store on loopback for tests of ``run.storage``, and what they do to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from typing import Any

from cnn2gnn_dist.data.storage import transfer
from cnn2gnn_dist.data.storage.transfer import RemoteFiles
from cnn2gnn_dist.run_storage.store import Store
from tests.support.servers import s3_server

BUCKET = "runs"


def s3_access(endpoint: str) -> dict[str, str]:
    """The environment variables by which s3fs finds a server."""
    return {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
    }


@contextlib.contextmanager
def s3_bucket() -> Iterator[Any]:
    """An fsspec file system with an empty bucket, which this process and its children find by its URL."""
    import fsspec

    before = dict(os.environ)
    with s3_server() as endpoint:
        os.environ.update(s3_access(endpoint))
        transfer.opened.cache_clear()
        try:
            store = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False)
            store.mkdir(BUCKET)
            yield store
        finally:
            transfer.opened.cache_clear()
            for name in s3_access(endpoint):
                os.environ.pop(name)
            os.environ.update(before)


def sources(contents: dict[str, bytes]) -> dict[str, tuple[int, str, bytes]]:
    """Contents in the form that ``Store.put`` takes."""
    import hashlib

    return {n: (len(data), hashlib.sha256(data).hexdigest(), data) for n, data in contents.items()}


def record_files(fs: Any, url: str, unit: str) -> list[str]:
    """The files that the record of a unit names; none if there is no record."""
    try:
        text = fs.cat_file(f"{url.removeprefix('s3://')}/records/{unit}.json")
    except FileNotFoundError:
        return []
    return sorted(json.loads(text)["body"]["files"])


def put_and_die(url: str, unit: str, contents: dict[str, bytes], requests: int) -> int:
    """Write a unit into a store, in a process that sends itself SIGKILL before request number ``requests``."""
    left = iter(range(requests))
    send, remove = RemoteFiles.send, RemoteFiles.remove

    def counted(work: Any) -> Any:
        def one(self: RemoteFiles, *arguments: Any) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            work(self, *arguments)

        return one

    RemoteFiles.send, RemoteFiles.remove = counted(send), counted(remove)  # type: ignore[method-assign]
    store = Store.open(url)
    store.claim()
    store.put(unit, sources(contents), "another")
    return 0
