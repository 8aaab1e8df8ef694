"""Which tests take the most processor time: a pytest plugin (``-p tests.support.processor_time``).

Wall time says little on a machine that does other things as well. The time of pytest's process and of all
its descendants is counted; what a process has used is lost if both it and its parent are killed. A fixture
counts for the first test that needs it.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Generator

import psutil
import pytest

from tests.support import REPOSITORY

MOST = 25
_began = 0.0
_seconds: Counter[str] = Counter()


def used(with_processes: bool) -> float:
    """Seconds of processor time used by this process, and by its children that have ended."""
    total = sum(os.times()[:4])
    if with_processes:
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                total += sum(child.cpu_times()[:4])
    return total


def pytest_collection_finish() -> None:
    """Don't count what was imported until now for any test."""
    global _began
    _began = used(False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    """Add to the report of each phase the time used since the previous one."""
    global _began
    report = yield
    now = used(REPOSITORY / "tests" / "unit" not in item.path.parents)
    report.processor_seconds = max(now - _began, 0.0)
    _began = now
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up the phases of a test; with pytest-xdist, those of all workers in its main process."""
    _seconds[report.nodeid] += getattr(report, "processor_seconds", 0.0)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the tests that took most time, and the sum."""
    terminalreporter.section(f"processor time, {sum(_seconds.values()):.0f} s; most of it")
    for name, seconds in _seconds.most_common(MOST):
        terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
