"""Who is in the group, and what they run: exchanged before a group is formed, so that all ranks stop together.

Each rank leaves a card in the group's store: its host, its versions, its config, and the error that
keeps it from joining, if there is one. All ranks read all cards and come to the same conclusion. A
group that is formed without this shows such an error on one rank, while the others wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

from cnn2gnn_dist.errors import PeerLost, UserError
from cnn2gnn_dist.runtime import preemption

CLOCKS_S = 60.0
"""Most seconds by which the clocks of two hosts may differ: times of files and logs are compared by hand."""
LINGER_S = 5.0
"""Seconds that rank 0, whose store often ends with it, waits for the others to read an error, and they for rank 0."""
PACKAGES = ("torch", "deepspeed", "dgl", "numpy", "ray", "timm", "pyarrow")
CHECK_OTHERS = "check the other ranks' output; for a single process unset RANK and WORLD_SIZE"
POLL_S = 0.02
SHOWN = 5
"""Differences that a message lists."""


class NotMet(PeerLost):
    """The ranks did not all arrive in time; the same command may find them."""


@dataclass(frozen=True)
class Member:
    """What a rank reports about itself to the others.

    Attributes:
        rank: its number.
        host: name of its host.
        place: the same for ranks that see files through the same page cache.
        versions: by name.
        about: its config, by dotted field.
        clock: seconds since 1970, read when all had arrived.
        problem: why it can't join.
        device: what it computes on, "cpu" or "cuda".
    """

    rank: int
    host: str
    place: str
    versions: Mapping[str, str] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    clock: float = 0.0
    problem: UserError | None = None
    device: str = "cpu"

    @classmethod
    def here(
        cls,
        rank: int,
        about: Mapping[str, Any] | None = None,
        problem: UserError | None = None,
        device: str = "cpu",
    ) -> Member:
        """This process."""
        host, own = socket.gethostname(), about or {}
        place = f"{host} {_mounts()}"
        return cls(rank, host, place, versions(), own, problem=problem, device=device)


_present: tuple[Member, ...] = ()


def present() -> tuple[Member, ...]:
    """The ranks of the group that was formed last, in their order; empty without one."""
    return _present


def forget() -> None:
    """Forget the members of a group that has ended."""
    global _present
    _present = ()


def on_several_hosts() -> bool:
    """Whether ranks of the group may see different contents of one file."""
    return len({member.place for member in _present}) > 1


def speaks_for_host(rank: int) -> bool:
    """Whether this is the first of the ranks that see files as it does."""
    places = [member.place for member in _present]
    return rank >= len(places) or places.index(places[rank]) == rank


def on_host_of(rank: int) -> list[int]:
    """The ranks that see files as a rank does, itself among them, in ascending order."""
    if rank >= len(_present):
        return [rank]
    return [other for other, one in enumerate(_present) if one.place == _present[rank].place]


def name_of(rank: int) -> str:
    """``rank 1 on node-b``, or ``rank 1`` if the host is unknown."""
    if rank < len(_present):
        return f"rank {rank} on {_present[rank].host}"
    return f"rank {rank}"


def begin_attempt(store: Any, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agree on a name for this attempt of the ranks to form a group (every rank calls this).

    torchrun's agents keep their store when they restart ranks, with all keys of the earlier attempts; and an
    agent counts only the restarts that its own ranks have caused. So rank 0 invites under a new name, each
    rank answers with a new name of its own, and rank 0 lists the answers it has: a list with this rank's name
    can't be an old one.

    Raises:
        NotMet: ranks did not arrive in time.
    """  # noqa: DOC501
    deadline = timeout.total_seconds()
    own, others = secrets.token_hex(8), range(1, world_size)
    if rank == 0:
        store.set("invitation", own)
        answers: dict[int, str] = {}

        def all_answered() -> bool:
            for other in others:
                invited, _, name = _value(store, f"answer/{other}").partition(" ")
                if invited == own:
                    answers[other] = name
            return len(answers) == len(others)

        if not wait_until(all_answered, deadline, POLL_S):
            raise _not_met(rank, world_size, timeout, [r for r in others if r not in answers])
        store.set("attempt", " ".join([own, *(answers[other] for other in others)]))
        return own
    answered = ""

    def is_listed() -> bool:
        nonlocal answered
        invited = _value(store, "invitation")
        if invited and invited != answered:
            store.set(f"answer/{rank}", f"{invited} {own}")
            answered = invited
        return own in _value(store, "attempt").split(" ")[1:]

    if not wait_until(is_listed, deadline, POLL_S):
        raise _not_met(rank, world_size, timeout, [r for r in range(world_size) if r != rank][:1])
    return _value(store, "attempt").split(" ")[0]


def _value(store: Any, key: str) -> str:
    return bytes(store.get(key)).decode() if store.check([key]) else ""


def _not_met(rank: int, world_size: int, timeout: timedelta, missing: Sequence[int]) -> NotMet:
    return NotMet(
        f"rank {rank} of {world_size} could not meet the others within "
        f"{timeout.total_seconds():g} s: rank {', '.join(map(str, missing))} did not arrive",
        where="process group",
        remedy=CHECK_OTHERS,
    )


def meet(store: Any, own: Member, world_size: int, timeout: timedelta) -> None:
    """Exchange cards over the store; the group is then ``present`` (every rank calls this).

    Raises:
        UserError: a rank can't join, ranks differ in versions, configs or devices, or their clocks do (on
            every rank, with the same text); or ranks did not arrive in time.
    """
    store.set(f"member/{own.rank}", pickle.dumps(own))
    members = [
        pickle.loads(content) for content in _all(store, "member", world_size, timeout, own.rank)
    ]
    store.set(f"clock/{own.rank}", repr(time.time()))
    clocks = _all(store, "clock", world_size, timeout, own.rank)
    members = [replace(m, clock=float(c)) for m, c in zip(members, clocks, strict=True)]
    wrong = problem_of(members)
    if wrong is not None:
        _end_together(store, own.rank, world_size)
        wrong.shared = True
        raise wrong
    global _present
    _present = tuple(members)


def _end_together(store: Any, rank: int, world_size: int) -> None:
    """Wait until all have read an error, which rank 0 reports: a launcher stops it once another rank has ended."""
    preemption.ignore_stop()
    with contextlib.suppress(RuntimeError):  # torch's: rank 0 is late, or gone
        if rank != 0:
            store.wait(["members/stays"], timedelta(seconds=LINGER_S))
        else:
            store.set("members/stays", "")
        store.add("members/read", 1)
        if rank == 0:
            wait_until(lambda: store.add("members/read", 0) >= world_size, LINGER_S)


def _all(store: Any, name: str, world_size: int, timeout: timedelta, rank: int) -> list[bytes]:
    deadline = time.monotonic() + timeout.total_seconds()
    keys = [f"{name}/{number}" for number in range(world_size)]
    for key in keys:
        left = max(deadline - time.monotonic(), 0.001)
        with contextlib.suppress(RuntimeError):  # torch's, when the time is over
            store.wait([key], timedelta(seconds=left))
    missing = [number for number, key in enumerate(keys) if not store.check([key])]
    if missing:
        raise _not_met(rank, world_size, timeout, missing)
    return [bytes(store.get(key)) for key in keys]


def problem_of(members: Sequence[Member]) -> UserError | None:
    """What keeps these ranks from forming a group; the same on every rank. None if nothing does."""
    failed = [(m, m.problem) for m in members if m.problem is not None]
    if failed:
        return combined_error(failed, len(members))
    for differ in (_versions_differ, _configs_differ, _devices_differ, _clocks_differ):
        if (wrong := differ(members)) is not None:
            return wrong
    return None


def combined_error(failed: Sequence[tuple[Member, UserError]], world_size: int) -> UserError:
    """One error for those of several ranks: each with its ranks and host, unless all have the same."""
    by_error: dict[str, list[tuple[Member, UserError]]] = {}
    for one in failed:
        by_error.setdefault(str(one[1]), []).append(one)
    first = failed[0][1]
    if len(by_error) == 1 and len(failed) == world_size:
        return first
    texts = []
    for group in by_error.values():
        error = group[0][1]
        detail = f" ({error.where})" if error.where and len(by_error) > 1 else ""
        texts.append(f"{_names([member for member, _ in group])}: {error.what}{detail}")
    where = first.where if len(by_error) == 1 else ""
    remedies = dict.fromkeys(error.remedy for _, error in failed if error.remedy)
    return type(first)("; ".join(texts), where=where, remedy="; ".join(remedies))


def _names(members: Sequence[Member]) -> str:
    by_host: dict[str, list[int]] = {}
    for member in members:
        by_host.setdefault(member.host, []).append(member.rank)
    return ", ".join(
        f"rank {', '.join(map(str, ranks))} on {host}" for host, ranks in by_host.items()
    )


def _versions_differ(members: Sequence[Member]) -> UserError | None:
    names = dict.fromkeys(name for member in members for name in member.versions)
    found = []
    for name in names:
        hosts = {m.versions.get(name, "none"): m.host for m in reversed(members)}
        if len(hosts) > 1:
            found.append(f"{name} " + ", ".join(f"{v} on {h}" for v, h in reversed(hosts.items())))
    if not found:
        return None
    return UserError(
        f"the ranks don't run the same software: {'; '.join(found[:SHOWN])}",
        where="versions",
        remedy="install the same versions on every host: one image, or one shared environment",
    )


def _configs_differ(members: Sequence[Member]) -> UserError | None:
    first = members[0]
    for other in members[1:]:
        names = sorted(first.about.keys() | other.about.keys())
        pairs = [(name, first.about.get(name), other.about.get(name)) for name in names]
        unlike = [pair for pair in pairs if pair[1] != pair[2]][:SHOWN]
        if unlike:
            texts = [f"{name} {one!r} and {two!r}" for name, one, two in unlike]
            return UserError(
                f"rank {first.rank} on {first.host} and rank {other.rank} on {other.host} were started "
                f"with different configs: {'; '.join(texts)}",
                where=", ".join(name for name, _, _ in unlike),
                remedy="give every rank the same config file and overrides",
            )
    return None


def _devices_differ(members: Sequence[Member]) -> UserError | None:
    """With ``device=auto`` each host decides for itself; NCCL and gloo would wait for each other."""
    without = [member for member in members if member.device == "cpu"]
    if len(without) in (0, len(members)):
        return None
    other = next(member for member in members if member.device != "cpu")
    return UserError(
        f"{_names(without)}: torch finds no GPU there, but rank {other.rank} on {other.host} has one",
        where="device",
        remedy="`cnn2gnn doctor` on that host shows what torch sees; device=cpu uses no GPU on any host",
    )


def _clocks_differ(members: Sequence[Member]) -> UserError | None:
    first = min(members, key=lambda member: member.clock)
    last = max(members, key=lambda member: member.clock)
    if last.clock - first.clock <= CLOCKS_S:
        return None
    return UserError(
        f"the clock of {last.host} is {last.clock - first.clock:.0f} s ahead of that of {first.host}; "
        f"{CLOCKS_S:g} s are allowed",
        where="clocks",
        remedy="set the clocks by NTP on every host",
    )


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what computes results, by name; the package's own includes a digest of its files."""
    found = {"cnn2gnn-dist": _own_files(), "python": ".".join(map(str, sys.version_info[:2]))}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _own_files() -> str:
    """A digest of the package's files: a checkout changes more often than its version."""
    root, digest = Path(__file__).resolve().parents[2], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"(digest of its files) {digest.hexdigest()[:8]}"


def _mounts() -> str:
    """Identifies this machine's kernel and the mounts that this process sees."""
    found = []
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        found.append(str(os.stat("/proc/self/ns/mnt").st_ino))
    return " ".join(found)


def wait_until(true: Callable[[], bool], seconds: float, pause: float = 0.05) -> bool:
    """Poll until a condition holds, at most for ``seconds``; return whether it does."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True
