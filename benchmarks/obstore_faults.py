"""What obstore does where our transfers have a promise to keep, and what 64 concurrent ranges cost each.

    pip install --no-deps --target rivals obstore==0.12.1
    PYTHONPATH=.:rivals python benchmarks/obstore_faults.py     # half a minute

Each line is the situation of a fault test (tests/unit/data/test_transfer.py, tests/multiprocess/test_remote.py), on
the same servers, for our transfers and for obstore with the same number of tries and the same time limits. Prints
a Markdown table, then the processor time of reading from an S3 server (moto) on the loopback.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.errors import UserError
from tests.support.servers import Served, http_server, s3_server

BYTES = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
START, END = 70_000, 170_000
RANGES, LENGTH, OBJECT = 1024, 110_000, 64 << 20
AT_ONCE = 64
Read = Callable[[str, int, int], bytes]


def by_ours(url: str, start: int, end: int) -> bytes:
    return urls.read_range(url, start, end - start)


def by_obstore(url: str, start: int, end: int) -> bytes:
    import obstore

    store, path = opened(url)
    found = obstore.get(store, path, options={"range": (start, end)})
    return b"".join(bytes(part) for part in found.stream(min_chunk_size=1 << 18))


def opened(url: str) -> tuple[Any, str]:
    """A store with our retries and limits, and the path in it."""
    from obstore.store import from_url

    root, _, path = url.rpartition("/")
    pause = timedelta(seconds=urls.FIRST_PAUSE)
    backoff = {"init_backoff": pause, "max_backoff": 2 * pause, "base": 2}
    retry = {
        "max_retries": urls.ATTEMPTS - 1,
        "retry_timeout": timedelta(seconds=urls.SECONDS),
        "backoff": backoff,
    }
    client = {"allow_http": True, "timeout": timedelta(seconds=urls.SECONDS)}
    client["read_timeout"] = timedelta(seconds=urls.READ_SECONDS)
    return from_url(root, client_options=client, retry_config=retry), path


def faults(name: str, times: int | None) -> Callable[[int, str], str | None]:
    """A fault of the server, on the first GETs or (None) on all."""
    return lambda number, path: name if times is None or number < times else None


FAULTS: dict[str, tuple[str, int | None]] = {
    "no fault": ("", 0),
    "status 500 twice": ("500", 2),
    "no answer, connection closed, twice": ("drop", 2),
    "body ends early, twice": ("short", 2),
    "the same, on a server that sends ETags": ("short", 2),
    "body stalls once": ("stall", 1),
    "server without ranges": ("whole", None),
    "a byte now and then": ("drip", None),
    "status 500 for ever": ("500", None),
    "status 404": ("404", None),
}


def outcome(read: Read, web: Served) -> str:
    """What came of reading a range: its bytes, or the error; the requests, and the seconds."""
    began = time.monotonic()
    try:
        data = read(f"{web.url}/a.tar", START, END)
        found = "read" if data == BYTES[START:END] else "**wrong bytes**"
    except UserError as error:
        found = f"refused: {error.what[:70]}"
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"
    took = time.monotonic() - began
    repeated = max(0, web.sent - (END - START))
    more = f", {repeated:,} bytes more than asked for" if found == "read" and repeated else ""
    return f"{found}; {web.requests.total()} requests, {took:.1f} s{more}".replace("|", "/")


def after_fork(read: Read, web: Served) -> str:
    """What a forked child reads of a store that its parent has read from."""
    web.fault = lambda *_: None
    url = f"{web.url}/a.tar"
    read(url, START, END)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=lambda: os._exit(read(url, START, END) != BYTES[START:END]))
    child.start()
    child.join(20)
    if child.exitcode is None:
        child.kill()
        child.join()
        return "**hangs**"
    return "read" if child.exitcode == 0 else f"exit code {child.exitcode}"


def no_credentials(read: Read) -> str:
    """How a bucket is refused without credentials."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_refused, args=(read, theirs))
    child.start()
    found = ours.recv() if ours.poll(60) else "still trying after a minute"
    child.kill()
    child.join()
    return str(found)


def _refused(read: Read, report: Any) -> None:
    urls.FIRST_PAUSE, urls.LONGEST_PAUSE, urls.SECONDS = 0.01, 0.02, 8.0
    began = time.monotonic()
    try:
        read("s3://some-bucket/a.tar", 0, 10)
        report.send("read")
    except Exception as error:
        text = error.what if isinstance(error, UserError) else " ".join(str(error).split())
        report.send(f"{text[:110]}; {time.monotonic() - began:.1f} s".replace("|", "/"))


def other_stores(read: Read) -> str:
    """Whether a file system that only fsspec knows can be read."""
    import fsspec

    fsspec.filesystem("memory").pipe_file("/d/a.tar", BYTES)
    try:
        return "read" if read("memory://d/a.tar", START, END) == BYTES[START:END] else "wrong"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:90]}".replace("|", "/")


def speed(ranges: list[tuple[int, int]]) -> None:
    """Print the processor time of many ranges at once from S3."""
    import fsspec
    import obstore

    with s3_server() as endpoint:
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ENDPOINT": endpoint,
            "AWS_ALLOW_HTTP": "true",
        }
        urls._opened.cache_clear()
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("bench")
        body = np.random.default_rng(1).integers(0, 256, OBJECT, dtype=np.uint8).tobytes()
        files.pipe_file("bench/a.tar", body)
        store, path = opened("s3://bench/a.tar")

        def threads(read: Callable[[int, int], Any]) -> list[Any]:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                return list(pool.map(lambda pair: read(*pair), ranges))

        ways: dict[str, Callable[[], list[Any]]] = {
            "ours, 64 threads": lambda: threads(lambda s, e: by_ours("s3://bench/a.tar", s, e)),
            "obstore, 64 threads": lambda: threads(
                lambda s, e: bytes(obstore.get_range(store, path, start=s, end=e))
            ),
        }
        print(f"\n{len(ranges):,} ranges of {LENGTH:,} bytes, {AT_ONCE} at once, medians of 3:\n")
        print("| | processor ms of the client per range | ranges/s |\n| --- | ---: | ---: |")
        for name, work in ways.items():
            figures = []
            for _ in range(3):
                began, mark = time.perf_counter(), time.process_time()
                found = work()
                own, wall = time.process_time() - mark, time.perf_counter() - began
                assert all(d == body[s:e] for d, (s, e) in zip(found, ranges, strict=True))
                figures.append((own / len(ranges) * 1e3, len(ranges) / wall))
            own, rate = np.median(figures, axis=0)
            print(f"| {name} | {own:.2f} | {rate:,.0f} |")


def main() -> None:
    urls.FIRST_PAUSE, urls.LONGEST_PAUSE = 0.01, 0.02
    urls.READ_SECONDS, urls.SECONDS, urls.SLOWEST = 1.0, 8.0, 1e9
    print("| situation | ours | obstore |\n| --- | --- | --- |")
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "a.tar").write_bytes(BYTES)
        os.environ["HOME"] = folder
        for name, (fault, times) in FAULTS.items():
            cells = []
            for read in (by_ours, by_obstore):
                with http_server(Path(folder)) as web:
                    web.fault, web.tagged = faults(fault, times), "ETags" in name
                    cells.append(outcome(read, web))
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
        with http_server(Path(folder)) as web:
            cells = [after_fork(read, web) for read in (by_ours, by_obstore)]
        print(f"| a fork after the first read | {' | '.join(cells)} |", flush=True)
        cells = [no_credentials(read) for read in (by_ours, by_obstore)]
        print(f"| S3 without credentials | {' | '.join(cells)} |", flush=True)
        cells = [other_stores(read) for read in (by_ours, by_obstore)]
        print(f"| a store that fsspec knows (memory://) | {' | '.join(cells)} |", flush=True)
    rng = np.random.default_rng(2)
    starts = rng.integers(0, OBJECT - LENGTH, RANGES).tolist()
    speed([(start, start + LENGTH) for start in starts])


if __name__ == "__main__":
    main()
