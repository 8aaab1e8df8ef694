"""How much more two ranks do than one: on one host, and on two hosts with one rank each.

    PYTHONPATH=. python benchmarks/scaling.py                                  the digits, to check that it runs
    PYTHONPATH=. python benchmarks/scaling.py --config cifar10 --rounds 3      on a quiet machine, as root

Complete runs through the same entry point, in turns over the rounds, one thread per rank. Hosts are namespaces of this
machine (tests/support/hosts.py), so their network is the machine's own: it shows latency and the cost of collectives,
but not bandwidth. Rates are images per second of all ranks: medians over log lines (teacher, student; without the first
ones), or a stage's images divided by its seconds (targets; refresh: the stage ``graph``, which embeds, searches,
partitions and writes a version), or views that nobody uses (stream: five epochs, after one that isn't counted).
Efficiency is the rate of two ranks divided by twice that of one. Shares of the trainings' time below the table show
where the rest may have gone. Last come images per second of processor time of all ranks, which other work on the
machine hardly changes, and their ratio to one rank's: what two ranks do in addition (collectives, halos, work that
each does for itself). It does not show how long they wait for each other.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

import psutil

from cnn2gnn_dist import durable, ledger, settings
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.stream import Stream
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from tests.support import host_runs, hosts, runs
from tests.support.forks import Fork
from tests.support.hosts import Host

STAGES = ("pack", "index", "teacher", "targets", "student", "graph")
RATES = {"teacher": "teacher", "targets": "targets", "student": "student", "refresh": "graph"}
"""The stage behind each rate."""
POLL_S = 0.1
SKIPPED = 2
"""Log lines at the beginning of a training that include the imports of the first step."""
STREAMED = 5
"""Epochs of the stream by itself that are counted, after a first one."""
LONGEST_S = 24 * 3600.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", help="a preset or file; default: the digits")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as name, ExitStack() as stack:
        members = stack.enter_context(_hosts(Path(name)))
        ways: dict[str, tuple[Host, ...]] = {
            "1 rank": members[:1],
            "2 ranks, one host": members[:1] * 2,
        }
        if len(members) > 1:
            ways["2 hosts, a rank each"] = members[:2]
        found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        for number in range(given.rounds):
            for way, group in ways.items():
                run = Path(name) / "run"
                say(f"round {number + 1}: {way}")
                used = _run(group, run, given.config, given.overrides, number)
                found[way].append(_rates(run, used) | _stream(group, run))
                say(json.dumps(found[way][-1]))
                shutil.rmtree(run)
    print(_table(found))
    return 0


@contextmanager
def _hosts(folder: Path) -> Iterator[tuple[Host, ...]]:
    if why := hosts.missing():
        raise SystemExit(why)
    with hosts.network(2, keep=[folder]) as members:
        yield members


def _run(
    group: tuple[Host, ...], run: Path, config: str | None, more: list[str], number: int
) -> dict[str, float]:
    """Run all stages; return the processor time that each has taken on all ranks, in seconds."""
    if config is None:
        arguments = host_runs.micro(run, *more)
    else:
        arguments = ["--config", config, f"run.dir={run}", *more]
    arguments += ["student.control=false", "--stages", ",".join(STAGES)]
    ranks = host_runs.start(group, arguments, port=host_runs.PORT + len(group) + 2 * number)
    until: dict[str, float] = {}
    ended = threading.Event()
    watching = threading.Thread(target=_watch, args=(ranks, run, until, ended))
    watching.start()
    try:
        outcomes = host_runs.finish(ranks, LONGEST_S)
    finally:
        ended.set()
        watching.join()
    for code, output in outcomes:
        if code:
            raise SystemExit(f"exit code {code}\n{output[-4000:]}")
    return {stage: until[stage] - until[before] for before, stage in pairwise(STAGES)}


def _stream(group: tuple[Host, ...], run: Path) -> dict[str, float]:
    """Images per second, and per second of processor time, that readers hand to ranks which do nothing with them."""
    folder = run / "stream"
    folder.mkdir()
    places = range(len(group))
    ranks = [
        group[rank].fork(_read, (run, rank, len(group)), runs.environment()) for rank in places
    ]
    for code, output in host_runs.finish(ranks, LONGEST_S):
        if code:
            raise SystemExit(f"exit code {code}\n{output[-4000:]}")
    read = [json.loads((folder / f"{rank}.json").read_text()) for rank in places]
    images = sum(one["images"] for one in read)
    return {
        "stream": images / max(one["seconds"] for one in read),
        "stream: per processor second": images / sum(one["processor"] for one in read),
    }


def _read(run: Path, rank: int, ranks: int) -> int:
    """Read two epochs of the run's stream as this rank, in training's views; the first one is not counted."""
    config = settings.of_run(run)
    stream = Stream(
        run / "manifest" / "train.arrow",
        global_batch=config.teacher.global_batch,
        views=Context(config, Ranks(), RunPaths(run), run, "", "cpu", False).views(),
        window=config.stream.window,
        backend="local",
        decoded_bytes=config.stream.decoded_bytes,
        rank=rank,
        world_size=ranks,
    )
    for _ in stream:
        pass
    began, spent = time.perf_counter(), time.process_time()
    images = sum(len(batch.images) for _ in range(STREAMED) for batch in stream)
    found = {
        "images": images,
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - spent,
    }
    stream.close()
    (run / "stream" / f"{rank}.json").write_text(json.dumps(found))
    return 0


def _watch(
    ranks: Sequence[Fork], run: Path, until: dict[str, float], ended: threading.Event
) -> None:
    """Note the processor time that all ranks have used when each stage is done."""
    folders = {"pack": "shards", "index": "manifest"}
    used = 0.0
    while not ended.wait(POLL_S):
        used = max(used, sum(map(_used, ranks)))
        for stage in STAGES:
            if stage not in until and (run / folders.get(stage, stage) / ledger.DONE).exists():
                until[stage] = used
    for stage in STAGES:
        until.setdefault(stage, used)  # ended within the last moment


def _used(rank: Fork) -> float:
    """Processor time of a rank and of the processes that it has started, in seconds."""
    total = 0.0
    with suppress(psutil.Error):
        top = psutil.Process(rank.pid)
        for process in (top, *top.children(recursive=True)):
            with suppress(psutil.Error):
                total += sum(process.cpu_times()[:4])
    return total


def _rates(run: Path, used: dict[str, float]) -> dict[str, float]:
    """Images per second by stage, shares of the trainings' time, and images per second of processor time."""
    images = len(Manifest.load(run / "manifest" / "train.arrow"))
    config = settings.load(str(run / "config.yaml"), [], say)
    views = max(1, int(config.targets.views))  # 0: the clean view alone
    found: dict[str, float] = {}
    for stage in ("teacher", "student"):
        lines = durable.read_lines(run / stage / "metrics.jsonl")
        lines = [line for line in lines if "images_per_s" in line][SKIPPED:]
        found[stage] = median(line["images_per_s"] for line in lines)
        found[f"{stage}: waits for data"] = median(line["wait_share"] for line in lines)
        if slow := [line["slowest"] for line in lines if "slowest" in line]:
            found[f"{stage}: slowest rank by the other"] = median(slow)

    def seconds(stage: str) -> float:
        return float(json.loads((run / stage / "done.json").read_text())["seconds"])

    found["targets"] = images * views / seconds("targets")
    found["refresh"] = images / seconds("graph")
    seen = {"teacher": config.teacher.epochs, "student": config.student.epochs, "targets": views}
    for rate, stage in RATES.items():
        found[f"{rate}: per processor second"] = images * seen.get(rate, 1) / used[stage]
    return found


def _table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds; efficiency next to each rate of two ranks."""
    middle = {
        way: {name: median(one[name] for one in rounds) for name in rounds[0]}
        for way, rounds in found.items()
    }
    alone, *_ = middle.values()
    rows = [["", *middle], ["---", *("---:" for _ in middle)]]
    for stage in (*RATES, "stream"):
        cells = [f"{one[stage]:,.0f}" for one in middle.values()]
        shares = [f" ({one[stage] / 2 / alone[stage]:.2f})" for one in list(middle.values())[1:]]
        rows.append(
            [
                f"{stage}, images/s (efficiency)",
                *map("".join, zip(cells, ["", *shares], strict=True)),
            ]
        )
    for stage in ("teacher", "student"):
        for what, form in (("waits for data", "{:.1%}"), ("slowest rank by the other", "{:.2f}")):
            name = f"{stage}: {what}"
            cells = [form.format(one[name]) if name in one else "" for one in middle.values()]
            rows.append([name, *cells])
    for stage in (*RATES, "stream"):
        name = f"{stage}: per processor second"
        cells = [f"{one[name]:,.1f} ({one[name] / alone[name]:.2f})" for one in middle.values()]
        rows.append([f"{stage}, images per processor second (of one rank's)", *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
