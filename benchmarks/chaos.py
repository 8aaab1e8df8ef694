"""Kill a small run at random moments, restart it, and compare it with an uninterrupted one.

    PYTHONPATH=. python benchmarks/chaos.py 100          # at least this many kills, about 30 minutes
    PYTHONPATH=. python benchmarks/chaos.py 20 --seed 7 --only ray
    PYTHONPATH=. python benchmarks/chaos.py 20 --hosts 2       # on hosts that are namespaces, as root

The victims, in turn: one rank, all ranks and their launcher, the launcher alone (torchrun); a rank, the
driver, a stream's reader, Ray's head (`cnn2gnn run`). The moments: while starting, at any step, while
a checkpoint is written, during a graph refresh. Progress goes to stderr, the table to stdout;
exit code 1 if a loss, an accuracy or a bit of the last weights differs.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from torturing import hosts as torturing_hosts

from cnn2gnn_dist import durable
from tests.support import runs

HOW = ["checkpoint.every_steps=3", "cluster.max_failures=0", "cluster.timeout_s=60"]
STAGES = ("teacher", "student", "control")
VICTIMS = {
    "torchrun": ["rank", "all", "launcher"],
    "ray": ["rank", "driver", "reader", "head"],
}
MOMENTS = ["start", "step", "step", "checkpoint", "refresh"]
LONGEST = 240


@dataclass
class Tally:
    """Counts so far."""

    kills: Counter = field(default_factory=Counter)
    moments: Counter = field(default_factory=Counter)
    launches: int = 0
    resumed: int = 0
    lost_steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    differing: int = 0
    compared: int = 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kills", type=int, nargs="?", default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(VICTIMS))
    parser.add_argument("--hosts", type=int, choices=[2, 3], help="see torturing/hosts.py")
    args = parser.parse_args()
    if args.hosts:
        return torturing_hosts.main(args.hosts, args.kills, args.seed)
    rng, tally = random.Random(args.seed), Tally()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    reference = runs_through(folder / "whole", "torchrun", tally)
    number = 0
    while sum(tally.kills.values()) < args.kills:
        mode = args.only or rng.choice(list(VICTIMS))
        run = folder / f"run-{number}"
        tortured(run, mode, rng, tally, most=args.kills)
        compare(runs.trail(run, STAGES), reference, tally, run)
        shutil.rmtree(run)
        number += 1
    shutil.rmtree(folder)
    print(table(tally, args.seed))
    return 1 if tally.differing else 0


def command(run: Path, mode: str) -> list[str]:
    if mode == "torchrun":
        return runs.torchrun(run, *HOW)
    start = [sys.executable, "-m", "cnn2gnn_dist", "run", "--config", "demo"]
    return [*start, *runs.MICRO, f"run.dir={run}", *HOW]


def launch(run: Path, mode: str, log: Path) -> subprocess.Popen[bytes]:
    env = runs.environment() if mode == "torchrun" else runs.ray_environment()
    with open(log, "wb") as output:
        return subprocess.Popen(
            command(run, mode),
            cwd=runs.REPOSITORY,
            env=env,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def runs_through(run: Path, mode: str, tally: Tally) -> dict:
    """Run to the end without interruption."""
    log = run.with_suffix(".log")
    began = time.monotonic()
    process = launch(run, mode, log)
    wait_for_step(run, (None, 0), process)
    tally.cold.append(time.monotonic() - began)
    if process.wait(LONGEST):
        raise SystemExit(log.read_text()[-4000:])
    return runs.trail(run, STAGES)


def tortured(run: Path, mode: str, rng: random.Random, tally: Tally, most: int) -> None:
    """Start, kill and restart the run until it is complete."""
    while True:
        log, before, began = run.with_suffix(".log"), standing(run), time.monotonic()
        process = launch(run, mode, log)
        tally.launches += 1
        enough = sum(tally.kills.values()) >= most
        moment = rng.choice(MOMENTS)
        stopped = not enough and strike(process, run, mode, moment, rng, tally, before, began)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LONGEST)
        if process.poll() is None:
            raise SystemExit(f"no exit:\n{log.read_text()[-4000:]}")
        text = log.read_text(errors="replace")
        found = re.search(r"(\w+) +resumes at epoch.*\(step (\d+)\)", text)
        if found:
            tally.resumed += 1
            if before[0] == found[1]:
                tally.lost_steps.append(before[1] - int(found[2]))
        if process.returncode == 0:
            return
        if not stopped and not re.search("is using this folder|was asked to stop", text):
            raise SystemExit(f"failed on its own ({process.returncode}):\n{text[-4000:]}")
        say(f"{sum(tally.kills.values())} kills; {run.name} at {standing(run)}")


def strike(
    process: subprocess.Popen[bytes],
    run: Path,
    mode: str,
    moment: str,
    rng: random.Random,
    tally: Tally,
    before: tuple[str | None, int],
    began: float,
) -> bool:
    """Wait for the chosen moment, then kill; False if the run ended before it."""
    if moment == "start":
        wait_for(lambda: False, process, rng.uniform(0.5, 9.0))
    else:
        if not wait_for_step(run, before, process):
            return False
        tally.seconds.append(time.monotonic() - began)
        if moment == "step":
            wait_for(lambda: False, process, rng.uniform(0, 6.0))
        else:
            pattern = "*/checkpoints/*.tmp" if moment == "checkpoint" else "student/graph/*.tmp"
            wait_for(lambda: any(run.glob(pattern)), process, rng.uniform(2.0, 20.0))
    if process.poll() is not None:
        return False
    victim = rng.choice(VICTIMS[mode])
    if not kill(process, mode, victim):
        return False
    tally.kills[f"{mode}: {victim}"] += 1
    tally.moments[moment] += 1
    return True


def kill(process: subprocess.Popen[bytes], mode: str, victim: str) -> bool:
    """Send SIGKILL to the victim; False if there is none yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(process.pid)
        family = top.children(recursive=True)
        if victim in ("driver", "launcher"):
            chosen = [top]
        elif victim == "all":
            chosen = [top, *family]
        else:
            mark = {"rank": "launch/train.py", "reader": "ray::ReaderAct", "head": "gcs_server"}
            wanted = "ray::_Rank" if (mode, victim) == ("ray", "rank") else mark[victim]
            chosen = [c for c in family if wanted in c.name() or wanted in c.cmdline()][-1:]
        for one in chosen:
            one.kill()
        return bool(chosen)
    return False


def standing(run: Path) -> tuple[str | None, int]:
    """The training that logged last, and its latest step."""
    logs = [run / stage / "metrics.jsonl" for stage in STAGES]
    there = [path for path in logs if path.exists() and path.stat().st_size]
    if not there:
        return None, 0
    lines = durable.read_lines(there[-1])
    return there[-1].parent.name, (lines[-1]["step"] if lines else 0)


def wait_for_step(run: Path, before: tuple[str | None, int], process: subprocess.Popen) -> bool:
    """Wait until a new step is logged; False if the run ends without one."""
    order = (None, *STAGES)

    def further() -> bool:
        stage, step = standing(run)
        return (order.index(stage), step) > (order.index(before[0]), before[1])

    wait_for(further, process, LONGEST)
    return process.poll() is None


def wait_for(condition, process: subprocess.Popen, seconds: float) -> None:
    """Wait until the condition holds, the process ends, or ``seconds`` have passed."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None and not condition():
        time.sleep(0.002)


def compare(found: dict, reference: dict, tally: Tally, run: Path) -> None:
    for stage in STAGES:
        (lines, weights), (wanted, bits) = found[stage], reference[stage]
        tally.compared += len(wanted) + 1
        wrong = [w["step"] for line, w in zip(lines, wanted, strict=False) if line != w]
        tally.differing += len(wrong) + abs(len(lines) - len(wanted)) + (weights != bits)
        if wrong or weights != bits:
            say(f"{run.name}: {stage} differs, first at step {wrong[:1]}")


def table(tally: Tally, seed: int) -> str:
    kills = ", ".join(f"{name} {count}" for name, count in sorted(tally.kills.items()))
    moments = ", ".join(f"{name} {count}" for name, count in sorted(tally.moments.items()))
    middle, cold = statistics.median(tally.seconds), tally.cold[0]
    return "\n".join(
        [
            "| | |",
            "| --- | --- |",
            f"| seed | {seed} |",
            f"| kills | {sum(tally.kills.values())}: {kills} |",
            f"| moments | {moments} |",
            f"| launches, of which resumed from a checkpoint | {tally.launches}, {tally.resumed} |",
            f"| steps repeated (of at most 3 between saves) | {sum(tally.lost_steps)}, "
            f"{statistics.mean(tally.lost_steps):.1f} per kill |",
            f"| lines of metrics and final weights compared | {tally.compared} |",
            f"| of these different | {tally.differing} |",
            f"| to the first new step, median (a cold start took {cold:.1f} s) | {middle:.1f} s |",
        ]
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
