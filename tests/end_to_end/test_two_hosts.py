"""Whole runs on two hosts: the same as on one, whatever their file server's clients believe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import host_runs, hosts, runs
from tests.support.hosts import Host

pytestmark = hosts.needed("bindfs")

BELIEVED_S = 8.0
"""As long as a stage of this run: what a host has seen in one it believes in the next."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with hosts.short_folder() as path:
        yield path


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[Host, ...]]:
    with hosts.network(2, keep=[folder]) as made:
        hosts.share(folder / "server", folder / "shared", made, BELIEVED_S)
        yield made


def arrays(run: Path) -> dict[str, bytes]:
    """Everything that was computed, by path: rows of graphs, their parts, targets, predictions."""
    found = {}
    for pattern in ("**/*.npy", "targets/**/*.parquet", "evaluation/*.npz"):
        for path in sorted(run.glob(pattern)):
            found[str(path.relative_to(run))] = path.read_bytes()
    return found


def test_a_run_over_clients_with_caches_of_their_own(
    pair: tuple[Host, ...], folder: Path, micro_run: Path
) -> None:
    arguments = host_runs.micro(folder / "shared" / "run")
    for code, output in host_runs.finish(host_runs.start(pair, arguments)):
        assert code == 0, output[-4000:]
    run = folder / "server" / "run"
    assert runs.trail(run) == runs.trail(micro_run)
    assert runs.scores(run) == runs.scores(micro_run)
    made, wanted = arrays(run), arrays(micro_run)
    assert made.keys() == wanted.keys()
    assert [name for name in made if made[name] != wanted[name]] == []
