"""Images per second of the stream and of what users would use instead, side by side in one run.

    apt-get install ffmpeg                                   # SPDL's; FFCV: benchmarks/requirements-build.txt
    pip install --no-deps --target rivals -r benchmarks/requirements.txt
    export PYTHONPATH=rivals                                 # competitors, outside the project's environment
    python benchmarks/stream.py                              # everything, about 25 minutes on 2 cores
    python benchmarks/stream.py --only photos --rounds 1     # part of it
    python benchmarks/stream.py --profile                    # where our own time goes

Every contender runs in a separate process, in turn, for several rounds (A B C A B C …), on the
same images from a warm page cache, with two workers of one thread each. Its speed is measured from
its first batch on; the time to the first batch has its own column. Ratios are taken within a
round, and their median counts. Cores may be shared, and seconds then mean little: ratios of images per
processor second have a column of their own, and so has what other processes used meanwhile.
A competitor that is not installed has its error in the table.
Progress goes to stderr, the tables (Markdown) to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from loaders import contenders, inputs, tables  # noqa: E402
from loaders.job import Job, measure  # noqa: E402

LONGEST = 240
"""Seconds after which a run counts as hung."""
Figures = dict[str, Any]


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="stream-", ignore_cleanup_errors=True) as name:
        bench = Bench(Path(name), args)
        found = {part: getattr(bench, part)() for part in args.only}
    results = {"versions": tables.versions(), "machine": tables.machine(), "parts": found}
    if args.out:
        Path(args.out).write_text(json.dumps(results, indent=1))
    print(tables.markdown(results))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parts = ["photos", "small", "resume"]
    parser.add_argument(
        "--only", nargs="+", choices=[*parts, "cifar", "profile"], help="parts (cifar = small)"
    )
    parser.add_argument("--profile", action="store_true", help="only profile where our time goes")
    parser.add_argument(
        "--contenders", nargs="+", default=[], help="only rows that start with this"
    )
    parser.add_argument("--passes", type=int, default=40, help="over the photographs")
    parser.add_argument("--seconds", type=float, default=8.0, help="maximum seconds of reading")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, help="images of CIFAR-10 (default: all)")
    parser.add_argument("--data", help="folder of the data sets")
    parser.add_argument("--out", help="file for the figures of every round, as JSON")
    args = parser.parse_args()
    args.only = ["profile"] if args.profile else args.only or parts
    args.only = ["small" if part == "cifar" else part for part in args.only]
    return args


class Bench:
    """All parts, with one folder for what they write."""

    def __init__(self, work: Path, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        self.data = inputs.data_folder(args.data)
        self.made: dict[str, Job] = {}
        (work / "token").write_text(secrets.token_hex(32))

    def photos(self) -> Figures:
        job = replace(self._input("photos"), settle=256)
        return self._compare(job, contenders.PHOTOS)

    def small(self) -> Figures:
        job = replace(self._input("small"), passes=2, settle=4096)
        return self._compare(job, contenders.SMALL)

    def resume(self) -> Figures:
        """Seconds to the first batch at both ends of an epoch."""
        rows = {}
        for kind in ("photos", "small"):
            for backend in ("local", "ray"):
                job = replace(self._input(kind), module="resume", options={"backend": backend})
                rows[f"{kind}, {backend}"] = self._run(job, f"resume, {kind}, {backend}")
        return {"rows": rows}

    def profile(self) -> Figures:
        rows = {}
        for kind in ("photos", "small"):
            for partial in (False, True):
                job = replace(self._input(kind), module="shares", seconds=self.args.seconds)
                name = f"{kind}{', partial decode' if partial else ''}"
                rows[name] = self._run(job, f"profile, {name}", partial=partial)
        return {"rows": rows}

    def _input(self, kind: str) -> Job:
        if kind not in self.made:
            say(f"preparing: {kind}")
            if kind == "photos":
                self.made[kind] = inputs.photos(self.data, self.work, self.args.passes)
            else:
                self.made[kind] = inputs.small(self.data, self.work, self.args.limit)
        return self.made[kind]

    def _compare(self, job: Job, rows: dict[str, contenders.Contender]) -> Figures:
        wanted = self.args.contenders or [""]
        rows = {n: c for n, c in rows.items() if any(n.startswith(w) for w in wanted)}
        figures: dict[str, list[Figures]] = {name: [] for name in rows}
        job.seconds = self.args.seconds
        for module in dict.fromkeys(c.module for c in rows.values()):
            if module in contenders.OWN_FORMAT:
                self._run(replace(job, module=module, options={"prepare": True}), f"write {module}")
        for number in range(self.args.rounds):
            for name, row in rows.items():
                if figures[name] and "error" in figures[name][-1]:
                    continue
                passes = max(1, round(job.passes * row.passes))
                settle = max(job.settle, round(row.settle * job.images))
                one = replace(
                    job, module=row.module, options=row.options, passes=passes, settle=settle
                )
                label = f"{job.kind}, round {number + 1} of {self.args.rounds}, {name}"
                figures[name].append(self._run(one, label, partial=row.partial))
        about = inputs.describe(job)
        return {"about": about, "rows": figures, "ratios": tables.ratios(job.kind, figures)}

    def _run(self, job: Job, label: str, partial: bool = False) -> Figures:
        """Run one job in a separate process; an error is a result too."""
        paths = [self.work / name for name in ("job.json", "result.json", "log.txt")]
        paths[1].unlink(missing_ok=True)
        job.born = time.time()
        job.save(paths[0])
        with open(paths[2], "wb") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, "--child", str(paths[0]), str(paths[1])],
                env=environment(self.work, partial),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            end(process)
        if paths[1].exists():
            result: Figures = json.loads(paths[1].read_text())
        else:
            lines = paths[2].read_text(errors="replace").strip().splitlines()
            result = {"error": lines[-1][:120] if lines else f"no result in {LONGEST} s"}
            say("\n".join(lines[-20:]))
        say(f"{label}: {tables.brief(result)}")
        return result


def end(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run; kill one that hangs, with everything that it started."""
    for patience, stop in ((LONGEST, signal.SIGTERM), (10, signal.SIGKILL)):
        try:
            process.wait(patience)
            return
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, stop)  # it has its own session
    process.wait()


def environment(work: Path, partial: bool) -> dict[str, str]:
    """One thread per worker; Ray's files and token in the folder of this run."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(
            [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "CNN2GNN_PARTIAL": "1" if partial else "0",
        "XDG_CACHE_HOME": str(work / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(work / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def child(job_path: Path, result_path: Path) -> None:
    """Run one job here and write its figures."""
    import torch

    torch.set_num_threads(1)
    job = Job.load(job_path)
    module = importlib.import_module(f"loaders.{job.module}")
    result: Figures = {}
    if job.options.get("prepare"):
        module.prepare(job)
    elif hasattr(module, "figures"):
        result = module.figures(job)
    else:
        result = measure(job, module.batches(job))
    partly = result_path.with_suffix(".part")
    partly.write_text(json.dumps(result))
    partly.rename(result_path)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
