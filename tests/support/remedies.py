"""Carry out the remedies in error messages as they are written.

A remedy may contain commands (`` `cnn2gnn index` ``), options (``--update``) and overrides
(``run.dir=…``, ``graph.partition.parts=2``): each is a separate alternative. A command is run with the
config of the command that failed, and then that command is run again; options and overrides are added
to it. Where a remedy has a placeholder (``…``, ``FOLDER``), the test fills it in.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cnn2gnn_dist import cli, settings
from cnn2gnn_dist.pipeline import runner
from tests.support import runs

OPEN = re.compile(r"…|\b[A-Z]{3,}\b")
"""Placeholders in a remedy for a value that only the user knows."""


@dataclass(frozen=True)
class Row:
    """An error and the alternatives of its remedy.

    Attributes:
        name: of the row.
        provoke: sets up, in an empty folder, a situation in which the returned command (the arguments
            after ``cnn2gnn``, with config and overrides last) fails.
        says: a part of the error message.
        fill: values of the placeholders in overrides, by field.
        only: the alternatives of the remedy, for :func:`table`.
    """

    name: str
    provoke: Callable[[Path], list[str]]
    says: str
    fill: Mapping[str, Callable[[Path], object]] = field(default_factory=dict)
    only: tuple[str, ...] = ()


def cnn2gnn(arguments: Sequence[str]) -> tuple[int, str]:
    """Run a cnn2gnn command; return exit code and output.

    Stages with models run as one rank through ``launch/train.py``: the same calls without Ray.
    """
    name, rest = arguments[0], list(arguments[1:])
    stages = None if name == "run" else name.split(",")
    known = [stage.name for stage in runner.stages_of(settings.load("demo"))]
    if (stages and not set(stages) <= set(known)) or (stages and set(stages) <= {"pack", "index"}):
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                code = cli.main(arguments)
            except SystemExit as end:  # argparse
                code = int(end.code or 0)
        return code, said.getvalue()
    chosen = ["--stages", name] if stages else []
    return runs.alone(*chosen, *rest)


def remedy_of(said: str) -> str:
    """The remedy of the last error in the output."""
    found = re.findall(r"^ +remedy: (.*)$", said, re.MULTILINE)
    assert found, f"no remedy:\n{said}"
    return found[-1]


def alternatives(remedy: str) -> list[str]:
    """The commands, options and overrides of a remedy, as they are written."""
    commands = [f"cnn2gnn {text}" for text in re.findall(r"`cnn2gnn ([^`]+)`", remedy)]
    plain = re.sub(r"`[^`]*`", " ", remedy)
    options = re.findall(r"(?<!\S)--[a-z][a-z-]*", plain)
    overrides = re.findall(r"(?<!\S)\(?((?:[a-z_]+\.)?[a-z_]+=[^\s,;)]+)", plain)
    return [*commands, *options, *overrides]


def carry_out(row: Row, alternative: str, place: Path) -> None:
    """Provoke the error, apply the alternative, and check that the command succeeds."""
    failing = row.provoke(place)
    code, said = cnn2gnn(failing)
    assert code not in (0, 1), said
    assert row.says in said, said
    assert "Traceback" not in said
    assert alternative in alternatives(remedy_of(said)), remedy_of(said)
    chosen = _filled(alternative, row, place)
    assert not OPEN.search(chosen.replace(str(place), "")), f"the test does not fill in {chosen}"
    if chosen.startswith("cnn2gnn "):
        command = shlex.split(chosen)[1:]
        if command[0] in ("run", *(s.name for s in runner.stages_of(settings.load("demo")))):
            command += _config_of(failing)
        code, said = cnn2gnn(command)
        assert code == 0, f"{chosen}:\n{said}"
        code, said = cnn2gnn(failing)
    else:
        code, said = cnn2gnn(overridden(failing, *chosen.split()))
    assert code == 0, f"{chosen}:\n{said}"


def overridden(command: Sequence[str], *chosen: str) -> list[str]:
    """A command with options and overrides added; an override replaces one of the same field."""
    fields = [f"{text.partition('=')[0]}=" for text in chosen if "=" in text]
    kept = [word for word in command if not any(word.startswith(name) for name in fields)]
    return [*kept, *chosen]


def _filled(alternative: str, row: Row, place: Path) -> str:
    name, sign, _ = alternative.partition("=")
    return f"{name}={row.fill[name](place)}" if sign and name in row.fill else alternative


def _config_of(command: Sequence[str]) -> list[str]:
    """--config and overrides of a command, or of its run if it has none (predict)."""
    if "--config" in command:
        return [*command[command.index("--config") :]]
    run = Path(command[command.index("--run") + 1])
    return ["--config", str(run / "config.yaml"), f"run.dir={run}"]


def table(rows: Sequence[Row]) -> list[object]:
    """Rows as test parameters, one per alternative in ``only``."""
    return [
        pytest.param(row, alternative, id=f"{row.name}: {alternative}")
        for row in rows
        for alternative in row.only
    ]
