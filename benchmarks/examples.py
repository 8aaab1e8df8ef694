"""Apply the diffs of CONTRIBUTING.md, each to a separate clone, and run the commands below them.

    python benchmarks/examples.py          does every diff apply to the last commit?
    python benchmarks/examples.py --run    do its commands work, too? (a few minutes each)

It ends with a line per example; exit code 1 if something failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "CONTRIBUTING.md"


@dataclass(frozen=True)
class Example:
    """A heading of the page, its diff, and the commands after it."""

    title: str
    diff: str
    commands: list[str]


def examples(markdown: str) -> list[Example]:
    """All sections that have a diff."""
    found = []
    for section in re.split(r"(?m)^### ", markdown)[1:]:
        diff = re.search(r"(?ms)^```diff\n(.*?)^```$", section)
        console = re.search(r"(?ms)^```console\n(.*?)^```$", section)
        if diff and console:
            commands = [line.removeprefix("$ ") for line in console[1].splitlines()]
            found.append(Example(section.splitlines()[0], diff[1], commands))
    return found


def fault(example: Example, run: bool) -> str:
    """What is wrong with an example; "" if nothing."""
    with tempfile.TemporaryDirectory(prefix="example-") as folder:
        clone = ["git", "clone", "--quiet", str(REPOSITORY), folder]
        subprocess.run(clone, check=True)
        said = _said(["git", "apply", "-"], folder, example.diff)
        for command in example.commands if run and not said else []:
            said = said or _said(["bash", "-c", command], folder)
    return said


def _said(command: list[str], folder: str, text: str = "") -> str:
    """The last output of a command that fails; "" if it succeeds."""
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    environment = {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": folder}
    done = subprocess.run(
        command, cwd=folder, input=text, env=environment, capture_output=True, text=True
    )
    return "" if done.returncode == 0 else (done.stdout + done.stderr).strip()[-500:] or "failed"


def main() -> int:
    """Try all examples; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="also run the commands")
    options = parser.parse_args()
    faults = 0
    for example in examples(PAGE.read_text(encoding="utf-8")):
        said = fault(example, options.run)
        faults += bool(said)
        print(
            f"{'FAIL' if said else 'ok':5}{example.title}{': ' + said if said else ''}", flush=True
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
