"""What the package prints: on which stream, for which rank and stage, and how much."""

from __future__ import annotations

import argparse
import ast
import importlib
import logging
import sys
from pathlib import Path

import pytest

import cnn2gnn_dist
from cnn2gnn_dist import cli, log
from cnn2gnn_dist.errors import UserError

PACKAGE = Path(cnn2gnn_dist.__file__).parent
HERE = logging.getLogger("cnn2gnn_dist.tests")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((0, "image"), "0 images"),
        ((1, "image"), "1 image"),
        ((1200, "image"), "1,200 images"),
        ((1, "class", "classes"), "1 class"),
        ((2, "class", "classes"), "2 classes"),
    ],
)
def test_a_number_with_its_noun(given, text):
    assert log.counted(*given) == text


def say_all() -> None:
    HERE.debug("a detail")
    HERE.info("a step")
    HERE.warning("a doubt")
    HERE.error("a failure")


@pytest.mark.parametrize(
    ("verbosity", "lines"),
    [
        (log.QUIET, ["note: a doubt", "error: a failure"]),
        (log.NORMAL, ["a step", "note: a doubt", "error: a failure"]),
        (log.VERBOSE, ["debug: a detail", "a step", "note: a doubt", "error: a failure"]),
    ],
)
def test_how_much_is_logged_and_that_stdout_is_left_alone(verbosity, lines, capsys):
    with log.console(verbosity):
        say_all()
    said = capsys.readouterr()
    assert said.err.splitlines() == lines
    assert said.out == ""


def test_lines_carry_stage_and_rank(capsys):
    with log.console(rank=1), log.stage("teacher"):
        HERE.info("step 20")
        HERE.info("300 nodes", extra={"stage": "graph"})
        log.report_error(UserError("a peer is gone", where="here"), "train.py")
    with log.console(), log.stage("student"):
        HERE.warning("odd")
    HERE.info("nobody listens any more")
    assert capsys.readouterr().err.splitlines() == [
        "[rank 1] teacher  step 20",
        "[rank 1] graph    300 nodes",
        "[rank 1] train.py: a peer is gone",
        "  where:  here",
        "student  note: odd",
    ]


def test_a_line_stands_above_a_progress_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with log.console(), log.progress(total=3, desc="pack", mininterval=0) as bar:
        bar.update()
        capsys.readouterr()
        HERE.info("in between")
        said = capsys.readouterr().err
    cleared, _, redrawn = said.partition("in between\n")
    assert cleared.endswith("\r")  # the bar's line was cleared
    assert "pack" in redrawn


@pytest.mark.parametrize(("verbosity", "terminal"), [(log.QUIET, True), (log.NORMAL, False)])
def test_no_bars_under_quiet_or_without_a_terminal(verbosity, terminal, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with log.console(verbosity), log.progress(range(3), mininterval=0) as bar:
        assert list(bar) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_importing_the_package_sets_up_no_handler():
    for path in PACKAGE.rglob("*.py"):
        # Without the modules that run as separate processes: importing one starts it.
        if path.name != "__main__.py" and path.parent.name != "distdgl":
            name = path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".")
            importlib.import_module(name)
    known = logging.root.manager.loggerDict.items()
    tree = [one for n, one in known if n.startswith("cnn2gnn_dist")]
    tree = [one for one in tree if isinstance(one, logging.Logger)]
    assert len(tree) > 15
    assert [one.name for one in tree if one.handlers or one.level or not one.propagate] == []


def test_a_users_logging_is_left_as_it_was(capsys):
    tree = logging.getLogger("cnn2gnn_dist")
    own = logging.NullHandler()
    tree.addHandler(own)
    tree.setLevel(logging.ERROR)
    try:
        assert cli.main(["plan", "--images", "1000", "-v"]) == 0
        assert (tree.handlers, tree.level, tree.propagate) == ([own], logging.ERROR, True)
    finally:
        tree.removeHandler(own)
        tree.setLevel(logging.NOTSET)


def test_only_the_module_of_output_prints():
    printing = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "log.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and (
            getattr(node.func, "id", "") == "print"
            or (
                getattr(node.func, "attr", "") == "write"
                and ast.unparse(node.func) in ("sys.stdout.write", "sys.stderr.write")
            )
        )
    ]
    assert printing == []


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """All commands below a parser."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                found += leaves(one) or [one]
    return found


def test_every_command_can_be_verbose_or_quiet():
    commands = leaves(cli._parser())
    assert len(commands) > 15
    for command in commands:
        options = {text for action in command._actions for text in action.option_strings}
        assert {"-v", "--verbose", "-q", "--quiet"} <= options, command.prog


def test_a_stage_command_says_more_or_less(tmp_path, capsys):
    run = ["--config", "demo", f"run.dir={tmp_path}/run", "data.limit=64"]
    assert cli.main(["pack", *run, "-v"]) == 0
    said = capsys.readouterr()
    assert "pack     to run: not started yet\n" in said.err
    assert "pack     debug: key " in said.err
    assert said.out == ""
    assert cli.main(["pack", "-q", *run]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["pack", *run]) == 0
    assert capsys.readouterr().err == "pack     complete, skipped\n"
    assert cli.main(["pack", "--quiet", *run, "data.limit=65"]) == 2  # errors are always printed
    assert capsys.readouterr().err.startswith(
        "cnn2gnn: the stage pack in this folder was made from"
    )
