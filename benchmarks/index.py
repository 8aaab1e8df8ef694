"""Speed and memory of building a manifest from shards, and the time to load one.

PYTHONPATH=. python benchmarks/index.py [SAMPLES] [SHARDS]    # default 1281167 1024; 3 minutes; 0: only 1.

1. Members per second of processor time of tarfile, webdataset and ours on the same shard, best of five, in one process.
2. A data set of ImageNet's size in sparse tar shards: headers and labels are real, images are holes
  (mean 110 kB), so that 140 GB temporarily take 8 GB of disk. Each step runs in a separate process,
  whose peak memory is reported.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROUNDS = 5


def head(name: str, size: int) -> bytes:
    """A member's header as tarfile writes it."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def write_shard(path: Path, first: int, sizes: np.ndarray, classes: int, json: bool) -> None:
    """A shard of KEY.cls, KEY.jpg (a hole) and, on request, KEY.json."""
    with open(path, "wb") as file:
        position = 0
        for number, size in enumerate(sizes.tolist(), first):
            key, label = f"train/{number:08d}", f"{number * 7919 % classes}".encode()
            small = head(f"{key}.cls", len(label)) + label.ljust(512, b"\0")
            file.seek(position)
            file.write(small + head(f"{key}.jpg", size))
            position += len(small) + 512 + -(-size // 512) * 512
            if json:
                text = b'{"class_name": "class %s"}' % label
                file.seek(position)
                file.write(head(f"{key}.json", len(text)) + text.ljust(512, b"\0"))
                position += 1024
        file.truncate(position + 1024)


def best(work: Callable[[], int]) -> float:
    """Members per second of processor time, best of several runs."""
    rates = []
    for _ in range(ROUNDS):
        start = (
            time.process_time()
        )  # one thread, from the page cache: other work on the machine matters little
        count = work()
        rates.append(count / (time.process_time() - start))
    return max(rates)


def compare(title: str, path: Path, members: int) -> None:
    """Print members per second for each way to list the contents of a shard."""
    from webdataset import tariterators

    from cnn2gnn_dist.data.index.manifest import index
    from cnn2gnn_dist.data.tar import samples as tar

    def by_tarfile() -> int:
        with tarfile.open(path) as archive:
            return sum(1 for _ in archive)

    def index_by_tarfile() -> int:
        labels: dict[str, int] = {}
        others = 0
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.endswith(".cls"):
                    label = archive.extractfile(member)
                    assert label is not None
                    labels[member.name[:-4]] = int(label.read())
                else:
                    others += 1
        return others + len(labels)

    def by_webdataset() -> int:
        found = tariterators.tarfile_samples([{"url": str(path)}])
        return sum(len(sample) - 2 for sample in found)

    ways = {
        "tarfile: names and offsets": by_tarfile,
        "ours:    names and offsets": lambda: sum(1 for _ in tar.walk(path)),
        "tarfile: the same and labels": index_by_tarfile,
        "ours:    samples": lambda: sum(len(sample.fields) for sample in tar.samples(path)),
        "ours:    index (manifest)": lambda: bool(index([path], progress=False)) and members,
        "webdataset: its samples": by_webdataset,
    }
    print(f"\n{title}: {members:,} members, {path.stat().st_size / 1e6:,.0f} MB")
    rates: list[float] = []
    for name, work in ways.items():
        assert work() == members
        rates.append(best(work))
        listed, labelled = rates[-1] / rates[0], rates[-1] / rates[min(2, len(rates) - 1)]
        print(f"  {name:28s} {rates[-1]:9,.0f} members/s {listed:6.1f} x tarfile's list", end="")
        print(f" {labelled:6.1f} x its list with labels" if len(rates) > 2 else "")


def step_build(folder: Path) -> None:
    """Index and save; print time and memory."""
    from cnn2gnn_dist.data.index.manifest import expand, index

    shards, before = expand(folder), peak()
    for count in (len(shards) // 8, len(shards)):
        start = time.perf_counter()
        manifest = index(shards[:count], progress=False, allow_empty_classes=True)
        built = time.perf_counter() - start
        print(f"  {count:5d} shards, {len(manifest):9,} samples: index {built:6.1f} s", end="")
        print(f"   peak memory {peak():4.0f} MB ({before:.0f} before the first)")
    start = time.perf_counter()
    manifest.save(folder / "m.arrow")
    print(f"  save (with digest) {time.perf_counter() - start:.2f} s", end="")
    print(
        f"   file {(folder / 'm.arrow').stat().st_size / 1e6:.0f} MB   peak memory {peak():.0f} MB"
    )


def step_load(folder: Path) -> None:
    """Load, with what a reader needs at its start; print milliseconds."""
    from cnn2gnn_dist.data.index.manifest import Manifest

    for turn in ("first in the process", "second", "third"):
        start = time.perf_counter()
        manifest = Manifest.load(folder / "m.arrow")
        loaded = time.perf_counter()
        sizes, digest, key = manifest.shard_sizes, manifest.digest, manifest.key(len(manifest) - 1)
        place = (manifest.offset_N[-1], manifest.size_N[-1], manifest.label_N[-1])
        done = time.perf_counter()
        assert len(sizes)
        assert digest
        assert key
        assert all(value >= 0 for value in place)
        print(
            f"  load, {turn:20s} {1e3 * (loaded - start):6.1f} ms, with shard sizes, digest, a key "
            f"and a place {1e3 * (done - start):6.1f} ms"
        )


def step_use(folder: Path) -> None:
    """Split and order at this size; print seconds."""
    from cnn2gnn_dist.data.index.manifest import Manifest, split_per_class
    from cnn2gnn_dist.data.order import Order

    manifest = Manifest.load(folder / "m.arrow")
    start = time.perf_counter()
    train, held = split_per_class(manifest, 0.1, 0)
    print(f"  split_per_class {time.perf_counter() - start:.2f} s", end="")
    print(f" ({len(train):,} and {len(held):,})   peak memory {peak():.0f} MB")
    start = time.perf_counter()
    manifest.select(train)
    print(f"  select {1e3 * (time.perf_counter() - start):.0f} ms")
    order = Order(manifest.shard_sizes, seed=0, global_batch=1024, window=8)
    start = time.perf_counter()
    order.batch(0, 0)
    first = time.perf_counter() - start
    start = time.perf_counter()
    order.batch(0, order.batches_per_epoch - 1)
    last = time.perf_counter() - start
    start = time.perf_counter()
    count = min(200, order.batches_per_epoch)
    for number in range(count):
        order.batch(1, number)
    print(
        f"  Order: first batch {1e3 * first:.1f} ms, last {1e3 * last:.1f} ms, "
        f"{count} in a row {1e3 * (time.perf_counter() - start) / count:.2f} ms each"
    )


def peak() -> float:
    """Peak resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent's
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    if sys.argv[1:2] == ["--step"]:
        {"build": step_build, "load": step_load, "use": step_use}[sys.argv[2]](Path(sys.argv[3]))
        return
    samples, shards = [int(a) for a in sys.argv[1:3]] if sys.argv[2:] else (1_281_167, 1024)
    with tempfile.TemporaryDirectory(prefix="index-") as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        small, large = folder / "small" / "s.tar", folder / "large" / "s.tar"
        for path, count, sizes in ((small, 10_000, 900), (large, 10_000, 110_000)):
            path.parent.mkdir()
            write_shard(path, 0, rng.integers(sizes // 2, 3 * sizes // 2, count), 10, json=False)
        compare("small images (CIFAR: 0.9 kB)", small, 20_000)
        compare("large images (ImageNet: 110 kB)", large, 20_000)
        named = folder / "named" / "s.tar"
        named.parent.mkdir()
        write_shard(named, 0, rng.integers(55_000, 165_000, 10_000), 10, json=True)
        compare("large images with class names in a .json", named, 30_000)
        if not samples:
            return
        whole = folder / "whole"
        whole.mkdir()
        start = time.perf_counter()
        bounds = np.linspace(0, samples, shards + 1).astype(int)
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            sizes_n = rng.integers(20_000, 200_000, last - first)
            write_shard(whole / f"train-{number:06d}.tar", int(first), sizes_n, 1000, json=True)
        used = sum(path.stat().st_blocks for path in whole.iterdir()) * 512 / 1e9
        print(f"\n{samples:,} samples in {shards:,} sparse shards", end="")
        print(f" ({used:.1f} GB of disk, written in {time.perf_counter() - start:.0f} s)")
        for step in ("build", "load", "use"):
            command = [sys.executable, __file__, "--step", step, str(whole)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    main()
