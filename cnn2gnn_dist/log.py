"""What the package prints, and where: the logger tree ``cnn2gnn_dist``, results, final errors.

- **Log lines** go through ``logging.getLogger(__name__)`` of each module. Only the entry points
  (``cli``, ``launcher``, ``submit``, a rank under Ray) show them, by ``console``: on stderr, so that
  stdout contains only what a command is asked for. A program that imports the package keeps
  its own logging: nothing is configured on import.
- **Output**, which is what a command exists to print, goes to stdout through ``output``.
- **Final errors**, which end a process, go to stderr through ``report_error``, at any verbosity.

A line reads ``[rank 1] teacher  note: text``: the rank if it isn't 0, the stage if there is
one, ``note:`` for a warning and ``error:`` for an error.

This is the only module that prints.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ROOT = "cnn2gnn_dist"
QUIET, NORMAL, VERBOSE = -1, 0, 1
LEVELS = {QUIET: logging.WARNING, NORMAL: logging.INFO, VERBOSE: logging.DEBUG}
LABELS = {logging.DEBUG: "debug: ", logging.WARNING: "note: ", logging.ERROR: "error: "}


class _State:
    """The labels of this process's lines."""

    verbosity = NORMAL
    rank = 0
    stage = ""


def verbosity() -> int:
    """QUIET, NORMAL or VERBOSE, as set at the entry point; NORMAL by default."""
    return _State.verbosity


@contextmanager
def console(verbosity: int = NORMAL, rank: int = 0) -> Iterator[None]:
    """Within this block the package's log lines are shown on stderr (for entry points).

    Args:
        verbosity: QUIET (warnings and errors), NORMAL or VERBOSE (everything).
        rank: of this process.
    """
    logger, handler = logging.getLogger(ROOT), _Console()
    before = logger.level, logger.propagate, _State.verbosity, _State.rank
    logger.addHandler(handler)
    logger.setLevel(LEVELS[verbosity])
    logger.propagate = False  # a configured root logger would print everything twice
    _State.verbosity, _State.rank = verbosity, rank
    try:
        yield
    finally:
        logger.removeHandler(handler)
        level, logger.propagate, _State.verbosity, _State.rank = before
        logger.setLevel(level)


def quoted(path: str | os.PathLike[str]) -> str:
    """A path as a shell reads it, for commands that are printed to be copied."""
    return shlex.quote(os.fspath(path))


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 image, 1,200 images; ``many``: a plural that is not ``one`` and an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``-v`` and ``-q``: they set ``verbosity`` in the namespace, if given."""
    group = parser.add_mutually_exclusive_group()
    for level, short, text in (
        (VERBOSE, "-v", "print more: keys, checkpoints, every line of metrics"),
        (QUIET, "-q", "print only warnings and errors; no progress bars"),
    ):
        group.add_argument(
            *(short, "--verbose" if level == VERBOSE else "--quiet"),
            action="store_const",
            const=level,
            dest="verbosity",
            default=argparse.SUPPRESS,
            help=text,
        )


def set_rank(rank: int) -> None:
    """Label this process's lines with its rank, once that is known."""
    _State.rank = rank


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Within this block lines belong to a stage, unless they name another (``extra={"stage": …}``)."""
    before, _State.stage = _State.stage, name
    try:
        yield
    finally:
        _State.stage = before


def output(text: str = "", end: str = "\n") -> None:
    """Print a command's result on stdout, flushed: a pipe may be read line by line."""
    print(text, end=end, flush=True)


def report_error(error: BaseException | str, program: str = "cnn2gnn") -> None:
    """Report on stderr the error that ends this process, or the part of its task that failed."""
    _write(f"{_rank()}{program}: {error}")


def progress(*arguments: Any, disable: bool = False, **options: Any) -> Any:
    """A ``tqdm`` bar on stderr, if that is a terminal and quiet mode is off."""
    from tqdm import tqdm

    hidden = disable or _State.verbosity == QUIET
    return tqdm(*arguments, disable=True if hidden else None, **options)  # None: off without a tty


class _Console(logging.Handler):
    """Writes to the current ``sys.stderr``, above progress bars."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(Lines())

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        try:
            _write(self.format(record))
        except Exception:  # as in logging's own handlers: a failed line is no reason to stop
            self.handleError(record)


class Lines(logging.Formatter):
    """``[rank 1] teacher  note: text``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format the record as a line, followed by its traceback if it has one."""
        name = getattr(record, "stage", _State.stage)
        column = f"{name:8} " if name else ""
        return f"{_rank()}{column}{LABELS.get(record.levelno, '')}{super().format(record)}"


def _rank() -> str:
    return f"[rank {_State.rank}] " if _State.rank else ""


def _write(text: str) -> None:
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:  # without tqdm there can be no bar
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()
