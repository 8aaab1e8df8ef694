"""The paper's table on Mini-ImageNet, on a GPU that is available for a few minutes at a time.

    python benchmarks/gpu_mini_imagenet.py cut DATA PIECES        here: cuts the data set into pieces of at most 64 MB
    python benchmarks/gpu_mini_imagenet.py run STORE --pieces PIECES --back BACK --out OUT --seconds 540
                                                                  there: repeat it until it exits with 0
    python benchmarks/gpu_mini_imagenet.py run STORE --toy ...    the same at toy size, on a CPU

Each session on the machine copies what is in PIECES (one piece or more; checked by SHA-256) into STORE, restores what
the last session brought back (its OUT, given as BACK), and, once the data set is complete, trains ResNet-50 and
ResNet-152, each with the student and its control: 200 epochs in bfloat16, by the product's own launcher. Before the
time is up it stops as on a preemption, at a step that is saved, and fills OUT: the table and what each run has
measured; then, of a run that is not finished, its finished stages (networks as weights only) and the last checkpoint
of the one in progress; then the models: in files of at most --file-mb each and --all-mb together. What did not fit is
named: on an empty machine those stages are trained again, but no run that has its results. docs/gpu.md says how large
they are.

Exit codes: 0: the table is complete; 75: call again; 2: an error, with its remedy.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import carried_runs  # noqa: E402

from cnn2gnn_dist import ledger, settings  # noqa: E402

LIST, AGAIN = "pieces.json", 75
SPARE_S = 45.0
"""Seconds reserved for the last checkpoint and for filling OUT."""
LIST_BYTES = 10_000
"""Reserved for the list of what was brought."""
PLACES = ("run.dir", "data.train", "data.test")
"""Fields that differ from machine to machine; the data are compared by their checksums."""
ROWS = ("teacher", "student", "self_path", "vote", "control_mlp")
RUNS = {"resnet50": {"arch": "resnet50"}, "resnet152": {"arch": "resnet152"}}
FULL = (
    "precision=bfloat16", "stream.backend=local", "stream.workers=12", "teacher.epochs=200", "teacher.optimizer=sgd",
    "teacher.lr=0.1", "teacher.weight_decay=0.0005", "teacher.max_micro_batch=256", "student.epochs=200",
    "student.max_micro_batch=256", "graph.start_epoch=100", "graph.refresh_epochs=10",
)  # fmt: skip
TOY = (
    "device=cpu", "stream.backend=local", "data.limit=2000", "data.allow_empty_classes=true", "data.calibration=0",
    "views.size=32", "teacher.epochs=2", "teacher.args={layers: [1, 1, 1, 1], channels: [8, 8, 16, 16]}",
    "student.epochs=2", "graph.start_epoch=1", "graph.refresh_epochs=1", "student.stem=conv3", "student.dim=32",
    "student.hidden=32", "evaluate.timing_images=64",
)  # fmt: skip


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cut(data: Path, to: Path, most_mb: int) -> None:
    """Group the data set's Parquet files into folders of limited size, each with the list of all files."""
    files = sorted((data / "mini-imagenet").glob("*.parquet"))
    if not files:
        raise SystemExit(f"no Parquet files in {data}/mini-imagenet")
    listed = {file.name: digest(file) for file in files}
    groups: list[list[Path]] = [[]]
    for file in files:
        if groups[-1] and sum(f.stat().st_size for f in [*groups[-1], file]) > most_mb * 10**6:
            groups.append([])
        groups[-1].append(file)
    for number, group in enumerate(groups):
        folder = to / f"piece-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LIST).write_text(json.dumps(listed, indent=1))
        for file in group:
            shutil.copyfile(file, folder / file.name)
        print(f"{folder}: {sum(f.stat().st_size for f in group) / 1e6:.1f} MB")


def take(pieces: Path, store: Path) -> list[str]:
    """Copy the available part of the data set; return the names of files still missing.

    Raises:
        SystemExit: a file differs from what the list says, or there is no list.
    """
    data = store / "data" / "mini-imagenet"
    data.mkdir(parents=True, exist_ok=True)
    for found in [*pieces.rglob(LIST)] if pieces.is_dir() else []:
        shutil.copyfile(found, data / LIST)
    if not (data / LIST).is_file():
        raise SystemExit(f"{pieces} holds no {LIST}: `cut` writes it")
    listed: dict[str, str] = json.loads((data / LIST).read_text())
    for name, expected in listed.items():
        for found in pieces.rglob(name):
            if digest(found) != expected:
                raise SystemExit(f"{found} is not the file that was cut: bring it again")
            shutil.copyfile(found, data / f".{name}")
            (data / f".{name}").rename(data / name)
    return [name for name in listed if not (data / name).is_file()]


def options_of(name: str, toy: bool) -> list[str]:
    """The overrides of a run."""
    return [*(TOY if toy else FULL), f"teacher.arch={'resnet18' if toy else RUNS[name]['arch']}"]


def check(run: Path, toy: bool) -> None:
    """Check that what is there of a run has the config of this session.

    The product refuses a stage of another config, but a run that is finished is not started again.

    Raises:
        SystemExit: it has another one.
    """
    if not (run / ledger.CONFIG).is_file():
        return
    places = [f"{field}=there" for field in PLACES]
    wanted = settings.load("mini_imagenet", [*options_of(run.name, toy), *places])
    found = settings.load(str(run / ledger.CONFIG), places)
    changed = settings.differences(*(settings.as_tree(one) for one in (found, wanted)))
    if changed:
        raise SystemExit(
            f"{run} was made with another config ({'; '.join(changed)}): give another STORE, and no BACK of it"
        )


def train(store: Path, name: str, seconds: float, toy: bool) -> int:
    """Continue one run; return its exit code, 75 if time ran out."""
    options = [*options_of(name, toy), f"run.dir={store / 'runs' / name}"]
    line = [sys.executable, "-m", "cnn2gnn_dist.launcher", "--config", "mini_imagenet", *options]
    environment = os.environ | {"CNN2GNN_DATA": str(store / "data"), "PYTHONPATH": str(ROOT)}
    with (store / f"{name}.log").open("a") as log:
        running = subprocess.Popen(line, env=environment, stdout=log, stderr=log, cwd=ROOT)
        try:
            return running.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGTERM)
            running.wait()
            return AGAIN


def table(store: Path) -> tuple[str, bool]:
    """The rows of all finished runs, and whether those are all runs."""
    lines = [
        "| run | row | accuracy | parameters | MFLOP / image | ms / image |",
        "|---|---|---|---|---|---|",
    ]
    whole = True
    for name in RUNS:
        results = store / "runs" / name / "results.json"
        if not results.is_file():
            whole = False
            lines.append(f"| {name} | not finished | | | | |")
            continue
        found = json.loads(results.read_text())
        for row in ROWS:
            one: dict[str, Any] = found.get(row) or {}
            if one:
                lines.append(
                    f"| {name} | {row} | {100 * one['accuracy']:.2f} % | {one['parameters']:,} | "
                    f"{one['flops'] / 1e6:.1f} | {one['ms_per_image']:.3f} |"
                )
    return "\n".join(lines), whole


def bring(store: Path, out: Path, file_mb: int, all_mb: int) -> list[str]:
    """Fill OUT: the table, the ends of the logs, and what fits of the runs; return what did not fit."""
    out.mkdir(parents=True, exist_ok=True)
    told = {"table.md": table(store)[0] + "\n"}
    for name in RUNS:
        log = store / f"{name}.log"
        if log.is_file():
            told[log.name] = "\n".join(log.read_text().splitlines()[-200:])
    for name, text in told.items():
        (out / name).write_text(text)
    room = all_mb * 10**6 - LIST_BYTES - sum((out / name).stat().st_size for name in told)
    return carried_runs.write(
        [store / "runs" / name for name in RUNS],
        out,
        store / ".carried",
        limit=room,
        part=file_mb * 10**6,
    )


def visit(given: argparse.Namespace) -> int:
    """One session on the machine."""
    end = time.monotonic() + given.seconds - SPARE_S
    given.store.mkdir(parents=True, exist_ok=True)
    missing = take(given.pieces, given.store)
    if missing:
        print(f"{len(missing)} files of the data set are missing: {', '.join(missing)}")
        return AGAIN
    (given.store / "runs").mkdir(exist_ok=True)
    for name in carried_runs.read(given.back, given.store / "runs"):
        print(f"{name}: restored from {given.back}")
    for name in RUNS:
        check(given.store / "runs" / name, given.toy)
    code = 0
    for name in RUNS:
        if carried_runs.is_finished(given.store / "runs" / name):
            continue
        code = (
            AGAIN
            if time.monotonic() >= end
            else train(given.store, name, end - time.monotonic(), given.toy)
        )
        if code:
            break
    text, whole = table(given.store)
    left = bring(given.store, given.out, given.file_mb, given.all_mb)
    print(text)
    if left:
        print(f"did not fit into {given.all_mb} MB: {', '.join(left)}")
    if code not in (0, AGAIN):
        print((given.store / f"{name}.log").read_text()[-2000:])
        return 2
    return 0 if whole else AGAIN


def main(line: list[str] | None = None) -> int:
    """Cut, or run one session; ``line``: the command's, by default."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(required=True)
    cutting = ways.add_parser("cut")
    cutting.add_argument("data", type=Path)
    cutting.add_argument("to", type=Path)
    cutting.add_argument("--most-mb", type=int, default=60)
    cutting.set_defaults(run=lambda given: cut(given.data, given.to, given.most_mb) or 0)
    visiting = ways.add_parser("run")
    visiting.add_argument("store", type=Path)
    visiting.add_argument("--pieces", type=Path, required=True)
    visiting.add_argument("--back", type=Path, default=Path("no-such-folder"))
    visiting.add_argument("--out", type=Path, required=True)
    visiting.add_argument("--seconds", type=float, default=540.0)
    visiting.add_argument("--file-mb", type=int, default=15)
    visiting.add_argument("--all-mb", type=int, default=60)
    visiting.add_argument("--toy", action="store_true")
    visiting.set_defaults(run=visit)
    given = parser.parse_args(line)
    return int(given.run(given))


if __name__ == "__main__":
    sys.exit(main())
