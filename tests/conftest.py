"""What costs too much to make twice: a small Ray cluster for the tests of a file, one small run for all tests."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from cnn2gnn_dist import log
from tests.support import REPOSITORY, runs

FOLDER = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # a socket's path has at most 107 bytes
LONGEST = (
    *("resume", "ways_in", "distdgl", "ray_session", "slurm", "two_hosts", "remedies", "pool"),
    *("deepspeed_hosts", "variants", "ray_hosts", "recipe_runs", "run_storage", "placement"),
    *("checkpoint", "faults", "process_readers", "gpu_check", "host_reads", "backpressure"),
    *("file_server", "hosts", "engine", "sequence", "collectives"),
)
"""Files that take minutes: started first, so that none of them is still running when all others are done."""

UNIT_TIMEOUT = 300
"""Seconds for one unit test, which takes seconds: what hangs says where."""


def pytest_configure() -> None:
    """Set how Ray authenticates before any test imports it: it reads that on import."""
    token = FOLDER / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]  # set by an outer cluster
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        **runs.SHARED_CORES,
    )


def pytest_unconfigure() -> None:
    """Remove the token, and what the cluster has left behind."""
    shutil.rmtree(FOLDER, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start processes as slow; run the longest files first, since files run side by side."""
    unit = REPOSITORY / "tests" / "unit"
    for item in items:
        if unit not in item.path.parents:
            item.add_marker("slow")
        elif item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(UNIT_TIMEOUT))
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture
def console() -> Iterator[None]:
    """Log lines on stderr, as the entry points show them."""
    with log.console():
        yield


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A Ray cluster of this process: on loopback only, with the session's own token.

    It ends with the file's tests and leaves no processes: those of the next file, in the same process, find no Ray.
    """
    import ray
    import ray._private.services as services

    patch = pytest.MonkeyPatch()
    # So that actors import the package and the tests' modules as this process does.
    known = os.environ.get("PYTHONPATH", "")
    paths = [str(REPOSITORY), *filter(None, [known])]
    patch.setenv("PYTHONPATH", os.pathsep.join(paths))
    # Otherwise Ray replaces 127.0.0.1 by the machine's address, and listens on the network.
    patch.setattr(services, "resolve_ip_for_localhost", lambda host: host)
    before, started = set(psutil.Process().children()), set()
    try:
        try:
            ray.init(
                address="local",  # never one that another test, or another user, has started here
                num_cpus=4,
                object_store_memory=200 << 20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=str(FOLDER / "t"),
                _node_ip_address="127.0.0.1",
            )
        finally:
            started = set(psutil.Process().children()) - before  # not what tests start themselves
        yield
    finally:
        started = {one for daemon in started for one in (daemon, *_below(daemon))}
        ray.shutdown()
        _, alive = psutil.wait_procs(started, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
                process.kill()
        patch.undo()
        shutil.rmtree(FOLDER / "t", ignore_errors=True)


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


@pytest.fixture(scope="session")
def micro_run(tmp_path_factory):
    """Folder of a small complete run on two ranks under torchrun, which tests must not write into.

    The workers of pytest-xdist share one: the first that needs it makes it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "micro"
    with FileLock(f"{folder}.lock"):
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed
            command = runs.torchrun(folder / "run")
            code, output = runs.finish(runs.start(command, runs.environment()))
            assert code == 0, output[-4000:]
            (folder / "made").touch()
    return folder / "run"
