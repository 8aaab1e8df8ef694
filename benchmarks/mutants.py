"""Mutants: small faults put into the code, one at a time. Which of them do the tests detect?

python benchmarks/mutants.py                        every subject, a seeded sample of each
python benchmarks/mutants.py losses judge --all     these two subjects, every mutant
python benchmarks/mutants.py --list order           the mutants, nothing is run

A mutant is killed when a test of its subject fails or hangs on it. Survivors are listed; those
for which ``mutating/equivalent.py`` gives a reason don't count. Outcomes are kept in
runs/mutants.jsonl, so an interrupted run continues. Exit code 1 below 95 %.

Why not mutmut or cosmic-ray? The former mutates every word of every message; the latter starts an interpreter,
and imports torch, for every mutant.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutating.equivalent import REASONS
from mutating.operators import Mutant, mutants

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("cnn2gnn_dist", "tests", "launch", "benchmarks", "ds_config.json", "pyproject.toml")
GOAL = 0.95
SAMPLE = 40
"""Mutants per file, unless all are requested."""


@dataclass(frozen=True)
class Subject:
    """A file and the tests that should notice faults in it, fastest first."""

    name: str
    file: str
    tests: tuple[str, ...]


SUBJECTS = (
    Subject("arithmetic", "data/batch_sizes.py", ("unit/data/test_batch_sizes.py",)),
    Subject("order", "data/order.py", ("unit/data/test_order.py",)),
    Subject("targets", "data/soft_targets.py", ("unit/data/test_soft_targets.py",)),
    Subject("losses", "models/losses.py", ("unit/models/test_losses.py",)),
    Subject(
        "judge",
        "stages/shared/predictions.py",
        ("unit/pipeline/test_predictions.py", "multiprocess/test_predictions.py"),
    ),
    Subject(
        "block", "graph/block.py", ("unit/graph/test_block.py", "unit/models/test_student_model.py")
    ),
    Subject("live_search", "stages/neighbours/live_search.py", ("unit/graph/test_live_search.py",)),
    Subject(
        "partition",
        "graph/partition/parts.py",
        ("unit/graph/test_partition.py", "multiprocess/test_partition.py"),
    ),
    Subject(
        "checkpoint",
        "training/checkpoint/manager.py",
        ("multiprocess/test_checkpoint_manager.py", "multiprocess/test_checkpoint_pair.py"),
    ),
    Subject(
        "checkpoint_folder",
        "training/checkpoint/folder.py",
        ("unit/training/test_checkpoint_files.py",),
    ),
    Subject("ledger", "ledger.py", ("unit/pipeline/test_ledger.py",)),
)


class Server:
    """Tests of one subject in a copy of the repository, run on one mutant after another."""

    def __init__(self, folder: Path, subject: Subject) -> None:
        for name in COPIED:
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, folder / name)
        self.module = folder / "cnn2gnn_dist" / subject.file
        tests = [f"tests/{name}" for name in subject.tests]
        command = [sys.executable, str(folder / "benchmarks" / "mutating" / "server.py")]
        env = os.environ | {
            "PYTHONPATH": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
        }
        self.process = subprocess.Popen(
            [*command, str(self.module), *tests],
            cwd=folder,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, source: str, seconds: float) -> tuple[str, float]:
        """Outcome of the tests on this source."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"source": source, "seconds": seconds}) + "\n")
        self.process.stdin.flush()
        outcome, took = json.loads(self.process.stdout.readline())
        return outcome, took


@contextmanager
def serving(subject: Subject) -> Iterator[Server]:
    """A server, with its copy, for the duration of this block."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        server = Server(Path(name), subject)
        try:
            yield server
        finally:
            server.process.kill()
            server.process.wait()


def judged(subject: Subject, chosen: list[Mutant], notes: Notes) -> dict[str, Any]:
    """Run mutants of a subject; return counts, and the survivors."""
    left = [mutant for mutant in chosen if notes.outcome(subject, mutant) is None]
    if left:
        with serving(subject) as server:
            outcome, usual = server.run(source_of(subject), 1200)
            if outcome != "passed":
                raise SystemExit(f"{subject.name}: the tests fail without a mutant ({outcome})")
            for number, mutant in enumerate(left, 1):
                outcome, took = server.run(mutant.source, max(60, 8 * usual))
                notes.add(subject, mutant, outcome)
                mark = "lives" if outcome == "passed" else outcome
                where = f"{subject.name} {number}/{len(left)}, line {mutant.line}"
                print(f"{where}: {mark} ({took:.0f} s)  {mutant.name}", flush=True)
    outcomes = [notes.outcome(subject, mutant) for mutant in chosen]
    living = [m for m, how in zip(chosen, outcomes, strict=True) if how in ("passed", "broken")]
    excused = [mutant for mutant in living if (subject.name, mutant.name) in REASONS]
    return {
        "run": len(chosen),
        "equivalent": len(excused),
        "killed": len(chosen) - len(living),
        "living": [mutant for mutant in living if mutant not in excused],
    }


def source_of(subject: Subject) -> str:
    """The unmodified file."""
    return (ROOT / "cnn2gnn_dist" / subject.file).read_text(encoding="utf-8")


class Notes:
    """Outcomes on disk: a mutant is run again if its file or the tests have changed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        self.known = {key: outcome for key, outcome, *_ in map(json.loads, lines)}
        self.path = path
        self.tests: dict[str, bytes] = {}

    def outcome(self, subject: Subject, mutant: Mutant) -> str | None:
        """Outcome of its tests; None if they have not been run."""
        return self.known.get(self._key(subject, mutant))

    def add(self, subject: Subject, mutant: Mutant, outcome: str) -> None:
        """Record it at once."""
        key = self._key(subject, mutant)
        self.known[key] = outcome
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps([key, outcome, subject.name, mutant.name]) + "\n")

    def _key(self, subject: Subject, mutant: Mutant) -> str:
        if subject.name not in self.tests:
            contents = [(ROOT / "tests" / name).read_bytes() for name in subject.tests]
            self.tests[subject.name] = b"".join(contents)
        text = mutant.source.encode() + self.tests[subject.name]
        return hashlib.sha256(text).hexdigest()[:24]


def main() -> int:
    """Run the mutants, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [subject.name for subject in SUBJECTS]
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(names))
    parser.add_argument("--all", action="store_true", help="every mutant, not a sample")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    options = parser.parse_args()
    if unknown := set(options.subjects) - set(names):
        parser.error(f"no subject {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    subjects = [s for s in SUBJECTS if s.name in options.subjects or not options.subjects]
    notes, found = Notes(ROOT / "runs" / "mutants.jsonl"), {}
    for subject in subjects:
        everyone = list(mutants(source_of(subject)))
        chosen = everyone
        if not options.all and len(everyone) > SAMPLE:
            chosen = random.Random(options.seed).sample(everyone, SAMPLE)
        if options.list:
            print("\n".join(f"{subject.name} {m.line}: {m.name}" for m in chosen))
        else:
            found[subject.name] = judged(subject, chosen, notes) | {"all": len(everyone)}
    return 0 if options.list else report(found)


def report(found: dict[str, dict[str, Any]]) -> int:
    """Print the table and the survivors; return 0 if enough are killed."""
    columns = ("all", "run", "equivalent", "killed")
    print("\n" + f"{'subject':<20}" + "".join(f"{name:>12}" for name in (*columns, "share")))
    sums = {name: sum(row[name] for row in found.values()) for name in columns}
    for name, row in (*found.items(), ("together", sums)):
        share = row["killed"] / max(row["run"] - row["equivalent"], 1)
        print(f"{name:<20}" + "".join(f"{row[c]:>12}" for c in columns) + f"{share:>12.1%}")
    for name, row in found.items():
        for mutant in row["living"]:
            print(f"lives: {name} line {mutant.line}: {mutant.name}")
    return 0 if sums["killed"] >= GOAL * (sums["run"] - sums["equivalent"]) else 1


if __name__ == "__main__":
    sys.exit(main())
