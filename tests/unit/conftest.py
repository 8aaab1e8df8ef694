"""A unit test starts no process: one that does belongs in tests/multiprocess or tests/end_to_end."""

from __future__ import annotations

import functools
import multiprocessing.process
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from cnn2gnn_dist import typed_text

_STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}
_test: str | None = None


def _refuse(event: str, _arguments: tuple[object, ...]) -> None:
    if _test is not None and event in _STARTS:
        raise AssertionError(f"{_test} starts a process ({event}): not a unit test")


sys.addaudithook(_refuse)
_start = multiprocessing.process.BaseProcess.start  # raises no audit event


def _checked_start(process: multiprocessing.process.BaseProcess) -> None:
    _refuse("os.fork", None)
    _start(process)


multiprocessing.process.BaseProcess.start = _checked_start  # type: ignore[method-assign]
# On a loaded machine examples are drawn slowly, which is no reason for a test to fail.
settings.register_profile("any machine", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
# The same few presets are read thousands of times, and nothing changes the nodes composed from a text.
typed_text._compose = functools.lru_cache(maxsize=32)(typed_text._compose)  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _no_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    global _test
    _test = request.node.nodeid
    yield
    _test = None
