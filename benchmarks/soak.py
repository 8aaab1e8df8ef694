"""Does the stream stay within its memory?

    python benchmarks/soak.py SECONDS

Streams small JPEGs through Ray actors, to a fast and a slow trainer in turn. Every five seconds it looks at the memory
of all processes of the session, the object store, what was spilled, /dev/shm and the session's files; every thirty
seconds it prints a line, and at the end a verdict (exit code 1: failed).
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest, index
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import ReaderSpec, Request
from cnn2gnn_dist.runtime.ray import cluster as ray_cluster

LOOK_S, LINE_S, PHASE_S = 5.0, 30.0, 20.0
SLOW_S = 0.2
"""Seconds per step of the slow trainer."""
FREED_S = 0.3
"""Ray frees consumed batches in rounds of a tenth of a second, one after the other."""
FLAT_SHARE = 0.02
"""Growth over the second half, as a fraction of the mean, that still counts as flat."""
MB = 2**20


@dataclass
class Look:
    """What was observed at one moment; sums over all processes of the session, in MB."""

    seconds: float
    batches: int
    processes: int
    rss: float
    unique: float
    driver: float
    readers: float
    store: float
    spilled: float
    shared: float
    files: float


@dataclass
class Soak:
    """The run so far; ``look`` is called by a separate thread."""

    began: float = field(default_factory=time.monotonic)
    batches: int = 0
    slow: bool = False
    looks: list[Look] = field(default_factory=list)
    folder: Path = Path()
    over: threading.Event = field(default_factory=threading.Event)

    def watch(self) -> None:
        while not self.over.wait(LOOK_S):
            self.looks.append(self.look())
            if len(self.looks) % round(LINE_S / LOOK_S) == 0:
                print(line(self.looks[-1], self.looks[-1 - round(LINE_S / LOOK_S) :][0]))

    def look(self) -> Look:
        me = psutil.Process()
        rss, unique, readers, count = 0.0, 0.0, 0.0, 0
        for process in [me, *me.children(recursive=True)]:
            try:
                memory = process.memory_full_info()
                count, rss, unique = count + 1, rss + memory.rss / MB, unique + memory.uss / MB
                if "ReaderActor" in process.name() + "".join(process.cmdline()[:1]):
                    readers += memory.rss / MB
            except psutil.Error:
                continue
        store = store_stats()
        return Look(
            seconds=time.monotonic() - self.began,
            batches=self.batches,
            processes=count,
            rss=rss,
            unique=unique,
            driver=me.memory_info().rss / MB,
            readers=readers,
            store=store.object_store_bytes_used / MB,
            spilled=store.spilled_bytes_total / MB,
            shared=sum(size_of(p) for p in Path("/dev/shm").rglob("*")) / MB,
            files=sum(size_of(p) for p in self.folder.rglob("*")) / MB,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--prefetch", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
        place = Path(folder) / "r"  # a short path: Ray puts sockets there
        place.mkdir()
        os.environ["RAY_TMPDIR"] = str(place)
        spec = make_data(Path(folder))
        ray_cluster.start(None, cpus=2)
        family = psutil.Process().children(recursive=True)
        soak = Soak(folder=place)
        print(f"{options}, one batch {options.batch * (3 * 64**2 + 17) / MB:.2f} MB")
        print(HEADER)
        watching = threading.Thread(target=soak.watch)
        watching.start()
        try:
            train(soak, spec, options)
        finally:
            soak.over.set()
            watching.join()
            family += psutil.Process().children(recursive=True)
            ray_cluster.stop()
        return verdict(soak, options, family, place, before)


def train(soak: Soak, spec: ReaderSpec, options: argparse.Namespace) -> None:
    sizes = Manifest.load(spec.manifest).shard_sizes
    order = Order(sizes, seed=0, global_batch=options.batch, window=8)
    how: dict[str, Any] = {"workers": options.workers, "prefetch": options.prefetch}
    with ReaderPool(spec, backend="ray", **how) as stream:
        for batch in stream.batches(requests(order)):
            assert batch.valid.all()
            soak.batches += 1
            passed = time.monotonic() - soak.began
            if passed > options.seconds:
                break
            if int(passed / PHASE_S) % 2:
                time.sleep(SLOW_S)


def requests(order: Order) -> Iterator[Request]:
    for epoch in itertools.count():
        for number in range(order.batches_per_epoch):
            yield Request(order.batch(epoch, number), epoch)


def make_data(folder: Path, images: int = 4096, shard: int = 512) -> ReaderSpec:
    rng = np.random.default_rng(0)
    paths = []
    for first in range(0, images, shard):
        path = folder / f"shard-{first:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, first + shard):
                small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                data = io.BytesIO()
                Image.fromarray(small).resize((72, 72)).save(data, "JPEG")
                for suffix, payload in (("cls", b"0"), ("jpg", data.getvalue())):
                    info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))
        paths.append(path)
    index(paths, progress=False).save(folder / "m.arrow")
    views = ViewSpec("random_resized_crop", 64, seed=1)
    return ReaderSpec(str(folder / "m.arrow"), views)


def store_stats() -> Any:
    """Ray's own figures of this node's object store."""
    import ray
    from ray._private.internal_api import node_stats

    node = ray.nodes()[0]
    address = node["NodeManagerAddress"], node["NodeManagerPort"]
    return node_stats(*address, include_memory_info=False).store_stats


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() and not path.is_symlink() else 0
    except OSError:  # deleted meanwhile
        return 0


HEADER = (
    "seconds batches  b/s  procs   RSS MB  unique  driver  readers   store  spilled  shm MB  files"
)


def line(now: Look, before: Look) -> str:
    speed = (now.batches - before.batches) / max(now.seconds - before.seconds, 1e-9)
    return (
        f"{now.seconds:7.0f} {now.batches:7d} {speed:4.0f} {now.processes:6d} {now.rss:8.0f} "
        f"{now.unique:7.0f} {now.driver:7.0f} {now.readers:8.0f} {now.store:7.2f} "
        f"{now.spilled:8.0f} {now.shared:7.1f} {now.files:6.1f}"
    )


def verdict(
    soak: Soak,
    options: argparse.Namespace,
    family: list[psutil.Process],
    place: Path,
    before: set[str],
) -> int:
    half = [look for look in soak.looks if look.seconds > options.seconds / 2]
    minutes = np.array([look.seconds for look in half]) / 60
    failed = False
    for name in ("rss", "unique", "driver", "readers", "files"):
        seen = np.array([getattr(look, name) for look in half])
        slope = float(np.polyfit(minutes, seen, 1)[0])
        grown = slope * float(minutes[-1] - minutes[0])
        flat = grown <= FLAT_SHARE * seen.mean() or name == "files"
        failed |= not flat
        print(
            f"{name:8} second half: mean {seen.mean():.1f} MB, slope {slope:+.2f} MB/min, "
            f"{'' if flat else 'NOT '}flat ({grown:+.1f} MB = {grown / seen.mean():+.1%})"
        )
    most = max(look.store for look in soak.looks)
    speed = max(
        (b.batches - a.batches) / (b.seconds - a.seconds) for a, b in itertools.pairwise(soak.looks)
    )
    held, freed = options.prefetch, speed * FREED_S
    bound = (held + freed) * options.batch * (3 * 64**2 + 17) / MB
    spilled = max(look.spilled for look in soak.looks)
    _, alive = psutil.wait_procs(family, timeout=0)
    left = [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    files = [str(path) for path in place.rglob("*")]
    shared = sorted(set(os.listdir("/dev/shm")) - before)
    failed |= spilled > 0 or bool(left or files) or most > bound
    print(
        f"store    at most {most:.2f} MB; {held} batches in flight and {freed:.0f} taken in the "
        f"last {FREED_S} s make {bound:.2f} MB; spilled {spilled} MB"
    )
    print(f"left     processes {left}, files {files}, new in /dev/shm (others' too) {shared}")
    print("verdict ", "FAILED" if failed else "well")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
