"""Runs on hosts that are namespaces, hit by faults at moments drawn from a seed, and a ledger of the results.

Faults: a rank is killed; a host loses power (its link, then all its processes); a host's link is cut for less than
``cluster.timeout_s``, or until its rank has given up; the run's disk is full for a while. Only this program restarts
ranks, with the same command on all hosts.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import host_runs, hosts, runs
from tests.support.forks import Fork
from tests.support.hosts import Host

TIMEOUT_S = 25
STAGES = ("pack", "index", "teacher", "targets", "student", "graph")
COMPARED = ("teacher", "student")
HOW = [
    *("checkpoint.every_steps=3", "checkpoint.max_failures=2", f"cluster.timeout_s={TIMEOUT_S}"),
    *("data.limit=240", "student.control=false", "--stages", ",".join(STAGES)),
]
THREE = ["teacher.global_batch=36", "student.global_batch=36", "graph.partition.parts=3"]
FAULTS = ("rank", "host", "short cut", "long cut", "disk")
MOMENTS = {
    "start": "",
    "teacher": "teacher/metrics.jsonl",
    "targets": "targets/begin.json",
    "refresh": "student/graph/*.tmp",
    "student": "student/metrics.jsonl",
    "graph": "graph/begin.json",
}
"""A stage, and the file that shows that it has begun (none: at launch); the fault comes up to ``LATER_S`` later."""
LATER_S = 4.0
LONGEST_S = 420.0
"""Time for all ranks to end after a fault; one that has not ended by then counts as hung."""
DISK = "192m"
EXPECTED = {0, 2, 75, 143, -signal.SIGKILL}


@dataclass
class Ledger:
    """Results of the faults so far."""

    faults: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    survived: int = 0
    hangs: int = 0
    strange: int = 0
    launches: int = 0
    runs: int = 0
    differing: int = 0
    compared: int = 0
    to_the_end: list[float] = field(default_factory=list)


def main(count: int, faults: int, seed: int) -> int:
    """Cause this many faults on ``count`` hosts; print a table; return 1 if a run differed, hung or ended oddly."""
    if why := hosts.missing():
        raise SystemExit(why)
    rng, ledger = random.Random(seed), Ledger()
    with _disk() as folder, hosts.network(count, keep=[folder.parent]) as members:
        reference = folder / "whole"
        _end_of(_launch(members, reference, ledger), ledger, reference)
        if not _complete(reference):
            raise SystemExit("the run without faults did not end")
        wanted = runs.trail(reference, COMPARED)
        while sum(ledger.faults.values()) < faults:
            run = folder / f"run-{ledger.runs}"
            _tortured(members, run, faults, rng, ledger)
            _compare(runs.trail(run, COMPARED), wanted, ledger, run)
            shutil.rmtree(run)
            ledger.runs += 1
    print(_table(ledger, count, seed))
    return 1 if ledger.differing or ledger.hangs or ledger.strange else 0


@contextlib.contextmanager
def _disk() -> Iterator[Path]:
    """A small file system that all hosts will share; the ranks' output is kept next to it."""
    base = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    folder = base / "disk"
    folder.mkdir()
    (base / "logs").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        shutil.rmtree(base)


def _launch(members: Sequence[Host], run: Path, ledger: Ledger) -> list[Fork]:
    ledger.launches += 1
    how = [*(THREE if len(members) == 3 else []), *HOW]
    port = host_runs.PORT + ledger.launches % 1000  # the one before may still be in TIME_WAIT
    return [
        host.fork(
            host_runs.rank_main,
            (host_runs.micro(run, *how),),
            host_runs.environment(members, rank, port),
            output=_log(run, rank),
        )
        for rank, host in enumerate(members)
    ]


def _complete(run: Path) -> bool:
    return (run / STAGES[-1] / "done.json").exists()


def _log(run: Path, rank: int) -> Path:
    return run.parent.parent / "logs" / f"{run.name}-{rank}.log"


def _tortured(
    members: Sequence[Host], run: Path, most: int, rng: random.Random, ledger: Ledger
) -> None:
    """Start the run, cause a fault, and start it again, until it is complete."""
    while not _complete(run):
        ranks = _launch(members, run, ledger)
        if sum(ledger.faults.values()) < most:
            ahead = [name for name, file in MOMENTS.items() if not file or not any(run.glob(file))]
            moment, fault = rng.choice(ahead), rng.choice(FAULTS)
            victim = rng.randrange(len(members))
            if _wait_for(run, moment, ranks, rng.uniform(0, LATER_S)):
                began = time.monotonic()
                with _struck(members, ranks, run, fault, victim, rng):
                    codes = _end_of(ranks, ledger, run)
                seconds = time.monotonic() - began
                ledger.faults[fault] += 1
                ledger.moments[moment] += 1
                ledger.survived += codes == [0] * len(codes)
                if any(codes):
                    ledger.to_the_end.append(seconds)
                say(
                    f"{sum(ledger.faults.values())} {run.name} {moment}: {fault} on "
                    f"{members[victim].name}: {codes} after {seconds:.0f} s"
                )
                continue
        codes = _end_of(ranks, ledger, run)
        if any(codes):
            ledger.strange += 1
            say(f"{run.name} failed on its own: {codes}\n{_said(run, len(members))}")
            raise SystemExit(1)


def _wait_for(run: Path, moment: str, ranks: Sequence[Fork], later: float) -> bool:
    """Wait until the stage has begun, then ``later`` seconds; False if a rank ended first."""
    until = None
    while all(rank.poll() is None for rank in ranks):
        if until is None and (not MOMENTS[moment] or any(run.glob(MOMENTS[moment]))):
            until = time.monotonic() + later
        if until is not None and time.monotonic() > until:
            return True
        time.sleep(0.005)
    return False


@contextlib.contextmanager
def _struck(
    members: Sequence[Host],
    ranks: Sequence[Fork],
    run: Path,
    fault: str,
    victim: int,
    rng: random.Random,
) -> Iterator[None]:
    """Cause the fault for as long as it should last; then repair what the next command needs."""
    host, filler = members[victim], run.parent / "filler"
    if fault == "rank":
        _kill(ranks[victim])
    elif fault == "disk":
        with contextlib.suppress(OSError), open(filler, "wb") as file:
            while True:
                file.write(b"\0" * (1 << 20))
                file.flush()
    else:
        host.cut()
        if fault == "short cut":
            time.sleep(rng.uniform(0.2, 0.4) * TIMEOUT_S)  # the length of the fault
            host.restore()
        elif fault == "host":
            _kill(ranks[victim])
            host.run(["sh", "-c", "kill -KILL -1"], capture_output=True)
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)
        host.restore()


def _kill(rank: Fork) -> None:
    try:
        os.killpg(rank.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not yet begun a session of its own, and has no children
        os.kill(rank.pid, signal.SIGKILL)


def _end_of(ranks: Sequence[Fork], ledger: Ledger, run: Path) -> list[int]:
    """Exit codes of all ranks; a rank that does not end is counted and killed."""
    deadline = time.monotonic() + LONGEST_S
    codes = []
    for number, rank in enumerate(ranks):
        try:
            codes.append(rank.wait(max(deadline - time.monotonic(), 0.1)))
        except subprocess.TimeoutExpired:
            ledger.hangs += 1
            say(f"rank {number} hangs\n{_said(run, len(ranks))}")
            hosts.end_family(rank)
            codes.append(-signal.SIGKILL)
    if strange := set(codes) - EXPECTED:
        ledger.strange += 1
        say(f"{run.name}: exit codes {strange}\n{_said(run, len(ranks))}")
    return codes


def _said(run: Path, count: int) -> str:
    return "\n".join(
        f"--- rank {r}\n{_log(run, r).read_text(errors='replace')[-3000:]}" for r in range(count)
    )


def _compare(found: dict, wanted: dict, ledger: Ledger, run: Path) -> None:
    for stage, (lines, weights) in wanted.items():
        own, bits = found[stage]
        ledger.compared += len(lines) + 1
        wrong = [line["step"] for line, other in zip(lines, own, strict=False) if line != other]
        ledger.differing += len(wrong) + abs(len(lines) - len(own)) + (weights != bits)
        if wrong or weights != bits:
            say(f"{run.name}: {stage} differs, first at step {wrong[:1]}")


def _table(ledger: Ledger, count: int, seed: int) -> str:
    def listed(counts: Counter[str]) -> str:
        return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))

    worst = max(ledger.to_the_end, default=0.0)
    rows = [
        ("hosts, seed", f"{count}, {seed}"),
        ("faults", f"{sum(ledger.faults.values())}: {listed(ledger.faults)}"),
        ("moments", listed(ledger.moments)),
        ("runs completed, launches", f"{ledger.runs}, {ledger.launches}"),
        ("faults that the run went on through", str(ledger.survived)),
        ("longest from a fault to the end of the last rank", f"{worst:.0f} s"),
        ("lines of metrics and final weights compared", str(ledger.compared)),
        ("of these different", str(ledger.differing)),
        ("hangs", str(ledger.hangs)),
        ("other exit codes than 0, 2, 75, 143 and that of the kill", str(ledger.strange)),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def say(text: str) -> None:
    """A line of progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
