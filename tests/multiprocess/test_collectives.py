"""Ranks that wait for each other: barriers that block the host, and waiting for a rank at work."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cnn2gnn_dist.errors import PeerLost, UserError
from cnn2gnn_dist.runtime.group import collectives
from tests.support import rank_group

TIMEOUT_S = 5.0


def appears(path: Path, seconds: float) -> bool:
    """Whether a file appears within some time."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return path.exists()


class Queued(torch.Tensor):
    """Behaves like a tensor on CUDA: collectives on it are only queued, and reading it waits for them."""

    works: list[Any] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        while cls.works:
            cls.works.pop().wait()
        return super().__torch_function__(func, types, args, kwargs or {})


def as_on_cuda() -> None:
    """Make ``dist.all_reduce`` return before anything is reduced."""
    zeros, ones, all_reduce = torch.zeros, torch.ones, dist.all_reduce

    def queue(tensor, **how):
        Queued.works.append(all_reduce(tensor, async_op=True, **how))

    torch.zeros = lambda *a, **k: zeros(*a, **k).as_subclass(Queued)
    torch.ones = lambda *a, **k: ones(*a, **k).as_subclass(Queued)
    dist.all_reduce = queue


def ran_on(folder: Path) -> bool:
    """Rank 1 is slow to write a file that rank 0 reads after the barrier: did rank 0 run ahead?

    Rank 1 waits until it sees rank 0 beyond the barrier, or for a second.
    """
    if collectives.rank() == 0:
        collectives.barrier()
        found = (folder / "rows").exists()
        (folder / "beyond").touch()
        return not found
    beyond = appears(folder / "beyond", 1.0)
    (folder / "rows").touch()
    collectives.barrier()
    return beyond


def hand_over(folder: Path) -> list[bool]:
    found = []
    for name, prepare in (("gloo", lambda: None), ("as on CUDA", as_on_cuda)):
        (folder / name).mkdir(exist_ok=True)
        collectives.all_gather_object(None)
        prepare()
        found.append(ran_on(folder / name))
        collectives.all_gather_object(None)
    return found


def test_a_barrier_holds_the_host(tmp_path: Path) -> None:
    assert rank_group.run(hand_over, 2, tmp_path) == [[False, False]] * 2


def long_work(folder: Path) -> str:
    end = time.monotonic() + 2.5 * TIMEOUT_S
    numbers = torch.zeros(100)
    while time.monotonic() < end:
        numbers = (numbers + 1).sin()
    (folder / "made").touch()
    return "done"


def longer_than_the_timeout(folder: Path) -> tuple[str, bool]:
    result = collectives.alone(lambda: long_work(folder))
    return result, (folder / "made").exists()


def uneven_shares(folder: Path) -> bool:
    """Rank 1 has the large share; the ranks meet more than once."""
    with collectives.uneven():
        pass
    with collectives.uneven():
        if collectives.rank() == 1:
            long_work(folder)
    there = (folder / "made").exists()
    return collectives.alone(lambda: 7) == 7 and there


def test_a_rank_at_work_is_waited_for_beyond_the_timeout(tmp_path: Path) -> None:
    ended = rank_group.launch(longer_than_the_timeout, 2, tmp_path, group_timeout_s=TIMEOUT_S)
    assert [(o.returncode, o.value) for o in ended] == [(0, ("done", True))] * 2
    (tmp_path / "made").unlink()
    ended = rank_group.launch(uneven_shares, 3, tmp_path, group_timeout_s=TIMEOUT_S)
    assert [(o.returncode, o.value) for o in ended] == [(0, True)] * 3


def lost_while_working(folder: Path, who: int, how: int) -> tuple[str, bool]:
    """A rank kills or stops itself in the middle of its work: the others' error, and whether it is a lost peer."""

    def end() -> None:
        long_work_begun = time.monotonic()
        while time.monotonic() < long_work_begun + 1:
            torch.zeros(100).sin()
        (folder / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), how)

    began = time.monotonic()
    try:
        with collectives.uneven():
            if collectives.rank() == who:
                end()
    except RuntimeError as error:
        assert time.monotonic() - began < 20 * TIMEOUT_S
        if how == signal.SIGSTOP:
            os.kill(int((folder / "pid").read_text()), signal.SIGKILL)
        return str(error), collectives.lost_peer(error)
    return "nothing", False


@pytest.mark.parametrize(
    ("who", "how"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)]
)
def test_a_rank_that_is_gone_is_not_waited_for(tmp_path: Path, who: int, how: int) -> None:
    ended = rank_group.launch(lost_while_working, 2, tmp_path, who, how, group_timeout_s=TIMEOUT_S)
    said, lost = ended[1 - who].value
    assert lost, said
    if (who, how) == (1, signal.SIGKILL):
        assert f"rank 1 has sent no heartbeat for {TIMEOUT_S:.0f} s" in said


def refused() -> tuple[str, float]:
    """Rank 0 refuses after a while and exits at once, which also ends the store."""
    begun = time.monotonic()

    def refuse() -> None:
        while time.monotonic() < begun + 1:  # by then the other polls only occasionally
            torch.zeros(100).sin()
        raise UserError("no such stage")

    try:
        collectives.alone(refuse)
    except UserError as error:
        if collectives.rank() == 0:
            os._exit(2)
        return str(error), time.monotonic() - begun
    return "nothing", 0.0


def test_a_refusal_of_rank_0_reaches_all_before_it_leaves() -> None:
    ended = rank_group.launch(refused, 3)
    assert [o.returncode for o in ended] == [2, 0, 0]
    assert [o.value[0] for o in ended[1:]] == ["no such stage"] * 2


def raising() -> list[tuple[str, str]]:
    """The error on this rank when one of the two raises inside."""
    found = []
    for kind in (UserError, KeyError):
        for who in (0, 1):
            try:
                with collectives.uneven():
                    if collectives.rank() == who:
                        raise kind(f"rank {who} has no room")
            except (UserError, RuntimeError, KeyError) as error:
                collectives.barrier()  # no rank is left waiting
                found.append((type(error).__name__, error.args[0]))
    return found


def test_what_one_rank_raises_is_raised_on_all() -> None:
    first, second = rank_group.run(raising, 2)
    own = [("KeyError", f"rank {r} has no room") for r in (0, 1)]
    told = [("PeerRaised", f"rank {r}: KeyError('rank {r} has no room')") for r in (0, 1)]
    both = [("UserError", f"rank {r} has no room") for r in (0, 1)]
    assert first == [*both, own[0], told[1]]
    assert second == [*both, told[0], own[1]]


def full_at(who: int) -> tuple[str, str]:
    """The error on this rank when the disk is full for one of them."""
    try:
        with collectives.uneven():
            if collectives.rank() == who:
                open("/dev/full", "w").write("x" * 100_000)  # noqa: SIM115
    except (UserError, OSError) as error:
        collectives.barrier()
        return type(error).__name__, str(error)
    return "nothing", ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("who", [0, 1])
def test_a_full_disk_of_one_rank_is_an_error_with_a_remedy_on_the_others(who: int) -> None:
    found = rank_group.run(full_at, 2, who)
    assert found[who][0] == "OSError"  # its stage reports it
    name, said = found[1 - who]
    assert name == "UserError"
    assert "disk full: No space left on device" in said


def test_a_single_process_works_without_a_group() -> None:
    assert collectives.alone(lambda: 5) == 5
    with collectives.uneven():
        collectives.barrier()
    with pytest.raises(PeerLost):
        collectives.alone(lambda: (_ for _ in ()).throw(PeerLost("x")))
