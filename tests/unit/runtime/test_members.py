"""What ranks tell each other before they form a group, and what they conclude; files that hosts hand over."""

from __future__ import annotations

import contextlib
import pickle
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from torch import distributed as dist

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import members
from cnn2gnn_dist.runtime.group.members import Member, problem_of
from cnn2gnn_dist.runtime.shared_files import handover


def member(rank: int, host: str = "", **more) -> Member:
    host = host or f"node-{rank}"
    return Member(rank, host, host, **more)


def test_ranks_that_agree_are_a_group():
    same = {"versions": {"torch": "2.13.0"}, "about": {"seed": 0}}
    ranks = [member(0, clock=100.0, **same), member(1, clock=100.0 + members.CLOCKS_S, **same)]
    assert problem_of(ranks) is None


def test_software_that_differs_is_named_with_its_hosts():
    wrong = problem_of(
        [
            member(0, versions={"torch": "2.13.0", "dgl": "2.1", "python": "3.11"}),
            member(1, versions={"torch": "2.13.0", "dgl": "2.1", "python": "3.11"}),
            member(2, versions={"torch": "2.12.1", "python": "3.11"}),
        ]
    )
    assert wrong is not None
    assert wrong.what == (
        "the ranks don't run the same software: torch 2.13.0 on node-0, 2.12.1 on node-2; "
        "dgl 2.1 on node-0, none on node-2"
    )


def test_configs_that_differ_are_named_by_field():
    wrong = problem_of(
        [member(0, about={"seed": 0, "name": "a"}), member(1, about={"seed": 1, "name": "a"})]
    )
    assert wrong is not None
    assert "rank 1 on node-1 were started with different configs: seed 0 and 1" in wrong.what
    assert wrong.where == "seed"


def test_hosts_without_a_gpu_among_hosts_with_one():
    """With device=auto: NCCL on the first and gloo on the others would wait for each other."""
    ranks = [member(0, device="cuda"), member(1, device="cpu"), member(2, device="cpu")]
    wrong = problem_of(ranks)
    assert wrong is not None
    assert wrong.what == (
        "rank 1 on node-1, rank 2 on node-2: torch finds no GPU there, but rank 0 on node-0 has one"
    )
    assert wrong.where == "device"
    assert problem_of(ranks[1:]) is None
    assert problem_of([member(r, device="cuda") for r in range(2)]) is None


def test_clocks_that_differ():
    wrong = problem_of([member(0, clock=100.0), member(1, clock=100.5 + members.CLOCKS_S)])
    assert wrong is not None
    assert wrong.what.startswith("the clock of node-1 is 60 s ahead of that of node-0")


def test_errors_of_several_ranks_are_one():
    disk, gpu = UserError("no room", where="/a", remedy="make room"), UserError("no GPU")
    ranks = [
        member(r, host="a" if r < 2 else "b", problem=p)
        for r, p in enumerate([disk, disk, gpu, None])
    ]
    wrong = problem_of(ranks)
    assert wrong is not None
    assert wrong.what == "rank 0, 1 on a: no room (/a); rank 2 on b: no GPU"
    assert wrong.remedy == "make room"
    everyone = problem_of([member(r, problem=gpu) for r in range(3)])
    assert everyone is gpu  # the error itself, without a list of all ranks


def test_missing_ranks_are_named():
    store = dist.HashStore()
    for rank in (0, 2):
        store.set(f"member/{rank}", pickle.dumps(member(rank)))
    with pytest.raises(UserError, match="rank 1, 3 did not arrive") as caught:
        members.meet(store, member(0), 4, timedelta(seconds=0.1))
    assert isinstance(caught.value, members.NotMet)
    assert members.present() == ()


def joined(store: dist.Store, ranks: list[int]) -> list[str | None]:
    """The name of the attempt on which these of three ranks agree; None: they did not meet."""
    found: list[str | None] = [None] * len(ranks)

    def join(place: int, rank: int) -> None:
        with contextlib.suppress(members.NotMet):
            found[place] = members.begin_attempt(store, rank, 3, timedelta(seconds=20))

    threads = [threading.Thread(target=join, args=pair) for pair in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_each_attempt_has_a_name_of_its_own_in_a_store_that_remembers():
    """As with the store of torchrun's agents, which still has the answers of ranks that are gone."""
    store = dist.HashStore()
    first = joined(store, [0, 1, 2])
    second = joined(store, [2, 1, 0])
    assert len(set(first)) == len(set(second)) == 1
    assert None not in (first[0], second[0])
    assert first[0] != second[0]
    with pytest.raises(
        members.NotMet, match="rank 1, 2 did not arrive"
    ):  # their answers are from earlier attempts
        members.begin_attempt(store, 0, 3, timedelta(seconds=0.1))
    with pytest.raises(members.NotMet, match="rank 0 did not arrive"):
        members.begin_attempt(store, 1, 3, timedelta(seconds=0.1))


def test_own_versions_name_the_packages_files():
    found = members.versions()
    assert found["cnn2gnn-dist"].startswith("(digest of its files) ")
    assert found.keys() >= {"python", "torch", "numpy"}


def test_files_are_compared_by_size_and_contents(tmp_path: Path):
    (tmp_path / "a").write_text("text")
    known = handover.described(tmp_path, {"a": True})
    handover.wait_for(tmp_path, known, seconds=0)
    handover.wait_for(tmp_path, {"a": handover.Written(4)}, seconds=0)
    (tmp_path / "a").write_text("TEXT")
    handover.wait_for(tmp_path, known, sums=False, seconds=0)
    with pytest.raises(UserError, match="a has other contents"):
        handover.wait_for(tmp_path, known, seconds=0)
    with pytest.raises(UserError, match="a has 4 bytes instead of 5"):
        handover.wait_for(tmp_path, {"a": handover.Written(5)}, seconds=0)
    with pytest.raises(UserError, match=r"b \(No such file or directory\)"):
        handover.wait_for(tmp_path, {"b": handover.Written(5)}, seconds=0)
