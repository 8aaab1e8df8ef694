"""A served model under measurement and abuse: images/s, versions swapped under load, damaged uploads.

    python benchmarks/serving.py MODEL IMAGES [throughput] [swaps] [fuzz] [replica]

MODEL is copied first; IMAGES is a folder of images of its kind. ``throughput``: images/s of a server compared with
the bare model in a loop, in turns, in requests of 1 and of 64 images. ``swaps``: 1,000 requests while the memory
changes 20 times; every answer is compared with that of the version it names. ``fuzz``: 10,000 uploads: random,
truncated, bit-flipped, bombs, malformed forms and JSON. ``replica``: Ray Serve with two replicas, one of which is
killed. Latency under load: ``serving_locust.py``. Clients are separate processes on the same cores.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from serving_client import FORM, PNG, TOKEN, Client, form, served

from cnn2gnn_dist.inference.classifier import load
from cnn2gnn_dist.inference.memory.view import Memory

# --- images per second ------------------------------------------------------------------------


def asking(
    port: int, images: list[bytes], size: int, clients: int, seconds: float, pipe: Any
) -> None:
    """Run in a process: this many clients ask for some seconds; sends images per second and each request's time."""

    def one(number: int) -> list[float]:
        client, took, rng = Client(port), [], random.Random(number)
        while (began := time.monotonic()) < until:
            some = rng.choices(images, k=size)
            status, _ = client.ask(*((some[0], PNG) if size == 1 else (form(some), FORM)))
            assert status == 200, status
            took.append(time.monotonic() - began)
        return took

    start = time.monotonic()
    until = start + seconds
    with ThreadPoolExecutor(clients) as pool:
        took = [each for found in pool.map(one, range(clients)) for each in found]
    pipe.send((size * len(took) / (time.monotonic() - start), took))


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(pid: int, run: Callable[[], tuple[float, list[float]]]) -> tuple[float, float, float]:
    """Images per second, milliseconds of processor time per image, and time per image of the fastest tenth of requests.

    Other work on the machine disturbs the last two least.
    """
    before, start = cpu_seconds(pid), time.monotonic()
    rate, took = run()
    spent = 1000 * (cpu_seconds(pid) - before) / (rate * (time.monotonic() - start))
    return rate, spent, 1000 * sorted(took)[len(took) // 10]


def throughput(model: Path, images: list[bytes], seconds: float, rounds: int) -> None:
    """Compare images per second, and processor time (which other work on the machine hardly affects)."""
    bare = load(model, device="cpu")
    context = multiprocessing.get_context("fork")

    def alone(size: int) -> tuple[float, list[float]]:
        start, took, rng = time.monotonic(), [], random.Random(0)
        while (began := time.monotonic()) < start + seconds:
            bare.predict(rng.choices(images, k=size))
            took.append(time.monotonic() - began)
        return size * len(took) / (time.monotonic() - start), took

    def through(port: int, size: int, clients: int) -> tuple[float, list[float]]:
        ours, theirs = context.Pipe()
        process = context.Process(
            target=asking, args=(port, images, size, clients, seconds, theirs)
        )
        process.start()
        found: tuple[float, list[float]] = ours.recv()
        process.join()
        return found

    bare.predict(images[:8])
    with served(model, "--device", "cpu") as (server, port):
        through(port, 1, 1)
        for size, clients in ((1, 1), (1, 8), (64, 1), (64, 2)):
            pairs = [
                (
                    measured(os.getpid(), partial(alone, size)),
                    measured(server.pid, partial(through, port, size, clients)),
                )
                for _ in range(rounds)
            ]
            (bare_rate, bare_ms, bare_least), (rate, ms, least) = (
                [statistics.median(column) for column in zip(*side, strict=True)]
                for side in zip(*pairs, strict=True)
            )
            ratios = [b[0] / a[0] for a, b in pairs]
            print(
                f"throughput: {size} image(s) a request, {clients} client(s): bare {bare_rate:.0f}, "
                f"served {rate:.0f} images/s, ratio {statistics.median(ratios):.2f} (of "
                f"{', '.join(f'{one:.2f}' for one in ratios)}); processor time an image: bare "
                f"{bare_ms:.2f}, served {ms:.2f} ms; fastest tenth of requests: bare {bare_least:.2f}, "
                f"served {least:.2f} ms",
                flush=True,
            )


# --- versions under load ----------------------------------------------------------------------


def swaps(model: Path, images: list[bytes], requests: int = 1000, changes: int = 20) -> None:
    """Remove and undo while clients ask; the expected answers of each version are computed afterwards."""
    opened = load(model, device="cpu")
    asked = images[:3]
    assert opened.memory is not None
    keys = [near.key for one in opened.predict(asked) for near in one.neighbours][: changes // 2]
    answers: list[tuple[int, bytes]] = []
    with served(model, "--device", "cpu") as (_, port):

        def ask(_: int) -> None:
            client = Client(port)
            while len(answers) < requests or not done:
                answers.append(client.ask(form(asked), FORM, "/predict?top=3&neighbours=5"))

        done: list[bool] = []
        edits = Client(port)
        allowed = {"Authorization": f"Bearer {TOKEN}"}
        with ThreadPoolExecutor(8) as pool:
            running = [pool.submit(ask, number) for number in range(8)]
            for number in range(changes):
                while len(answers) < number * requests // changes:
                    time.sleep(0.001)
                key = keys[number // 2 % len(keys)]
                status, text = (
                    edits.ask(b"", allowed, "/memory/undo")
                    if number % 2
                    else edits.ask(
                        json.dumps({"keys": [key]}).encode(), allowed, "/memory", "DELETE"
                    )
                )
                assert status == 200, text
            done.append(True)
            for one in running:
                one.result()
    expected: dict[int, list[Any]] = {}
    outcome: Counter[str] = Counter()
    for status, body in answers:
        made = json.loads(body)
        if status != 200:
            outcome[f"status {status}"] += 1
            continue
        version = made["memory_version"]
        if version not in expected:
            opened.memory = Memory.open(opened.memory.root, version)
            expected[version] = [one.as_dict() for one in opened.predict(asked, top=3)]
        same = all(
            given["classes"] == right["classes"]
            and [n["key"] for n in given["neighbours"]] == [n["key"] for n in right["neighbours"]]
            for given, right in zip(made["answers"], expected[version], strict=True)
        )
        outcome["right" if same else "mixed"] += 1
    distinct = len({json.dumps(one) for one in expected.values()})
    print(
        f"swaps: {changes} changes, {len(answers)} requests: {dict(outcome)}; {len(expected)} versions "
        f"seen, {distinct} different answers"
    )
    assert outcome["right"] == len(answers) >= requests


# --- damaged uploads --------------------------------------------------------------------------


def damaged(
    rng: random.Random, whole: list[bytes], bombs: list[bytes]
) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request that is probably invalid."""
    kind = rng.randrange(8)
    data = bytearray(rng.choice(whole))
    if kind == 0:
        data = bytearray(rng.randbytes(rng.randrange(2000)))
    elif kind == 1:
        data = data[: rng.randrange(len(data))]
    elif kind == 2:
        data = bytearray(rng.choice(bombs))
    else:
        for _ in range(1 << rng.randrange(7)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    way = rng.randrange(6)
    if way == 0:
        return bytes(data), {
            "Content-Type": rng.choice(["image/png", "image/*", "a/b", "\xff", ""])
        }
    if way == 1:
        body = json.dumps({"images": [base64.b64encode(data).decode()]}).encode()
        if kind > 4:
            body = body[: rng.randrange(len(body) + 1)] + rng.randbytes(rng.randrange(9))
        return body, {"Content-Type": "application/json"}
    body = form(
        [bytes(data)] * rng.choice([1, 1, 1, 2, 64, 65]) if len(data) < 20_000 else [bytes(data)]
    )
    if way == 2:  # the form itself is damaged
        spoilt = bytearray(body)
        for _ in range(1 << rng.randrange(5)):
            spoilt[rng.randrange(min(200, len(spoilt)))] = rng.randrange(256)
        body = bytes(spoilt[: rng.randrange(len(spoilt) + 1)] if kind > 4 else spoilt)
    return body, FORM


def fuzz(model: Path, images: list[bytes], count: int = 10_000, seed: int = 0) -> None:
    from tests.support.bombs import all_bombs, saved

    bombs = [data for data in all_bombs().values() if len(data) < 15_000_000]
    whole = [*images[:8], *(saved(kind) for kind in ("JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"))]
    statuses: Counter[int] = Counter()
    slowest = 0.0
    # libtiff writes to stderr about what it reads.
    with served(model, "--device", "cpu", errors=subprocess.DEVNULL) as (process, port):

        def some(part: int) -> None:
            nonlocal slowest
            rng, client = random.Random(seed * 1000 + part), Client(port)
            for _ in range(count // 8):
                body, headers = damaged(rng, whole, bombs)
                start = time.monotonic()
                try:
                    status, text = client.ask(body, headers)
                except (http.client.HTTPException, OSError):  # refused while it was being sent
                    client, status, text = Client(port), -1, b""
                slowest = max(slowest, time.monotonic() - start)
                statuses[status] += 1
                if status >= 500:
                    print(status, text, headers, body[:300])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(some, range(8)))
        good, _ = Client(port).ask(images[0], PNG)
        assert process.poll() is None
        with open(f"/proc/{process.pid}/status", encoding="ascii") as file:
            peak = int(re.search(r"VmHWM:\s+(\d+)", file.read()).group(1)) / 1024  # type: ignore[union-attr]
    print(
        f"fuzz: {sum(statuses.values())} uploads (seed {seed}): {dict(sorted(statuses.items()))} "
        f"(-1: connection closed after a refusal); slowest {slowest:.1f} s, the server's peak {peak:.0f} "
        f"MB; afterwards {good}"
    )
    assert good == 200
    assert not any(status >= 500 for status in statuses)


# --- a replica is killed ----------------------------------------------------------------------


def replica(model: Path, images: list[bytes], requests: int = 400) -> None:
    import ray
    from ray import serve

    from cnn2gnn_dist.serving.ray_app import Options, build

    right = [one.as_dict() for one in load(model, device="cpu").predict(images[:8], top=3)]
    folder = tempfile.mkdtemp(prefix="ray-")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    port = 8197
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(Options(model=str(model), replicas=2, cpus=0.5)), name="m")
        outcome: Counter[str] = Counter()
        killed: list[int] = []

        def ask(part: int) -> None:
            client, rng = Client(port), random.Random(part)
            for _ in range(requests // 4):
                which = rng.randrange(8)
                while True:
                    try:
                        status, body = client.ask(images[which], PNG, "/predict?top=3")
                    except (http.client.HTTPException, OSError):
                        client, status, body = Client(port), -1, b""
                    if status != 200:
                        outcome[f"status {status}, asked again"] += 1
                        continue
                    made = json.loads(body)["answers"][0]
                    outcome["right" if made["classes"] == right[which]["classes"] else "wrong"] += 1
                    break

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(ask, part) for part in range(4)]
            while outcome["right"] < requests // 4:
                time.sleep(0.01)
            found = subprocess.run(
                ["pgrep", "-f", "^ray::ServeReplica:m"], capture_output=True, text=True
            )
            killed.append(int(found.stdout.split()[0]))
            os.kill(killed[0], signal.SIGKILL)
            for one in running:
                one.result()
        print(
            f"replica: 1 of 2 killed after {requests // 4} of {requests} answers: {dict(outcome)}"
        )
        assert outcome["right"] == requests
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("what", nargs="*", default=["throughput", "swaps", "fuzz"])
    parser.add_argument("--seconds", type=float, default=5.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uploads", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="for the damage")
    given = parser.parse_args()
    images = [path.read_bytes() for path in sorted(given.images.iterdir()) if path.is_file()]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(shutil.copytree(given.model, Path(folder) / "model"))
        steps: dict[str, Callable[[], None]] = {
            "throughput": lambda: throughput(model, images, given.seconds, given.rounds),
            "swaps": lambda: swaps(model, images),
            "fuzz": lambda: fuzz(model, images, given.uploads, given.seed),
            "replica": lambda: replica(model, images),
        }
        for name in given.what:
            steps[name]()


if __name__ == "__main__":
    main()
