"""Cores and memory that this process may use: the machine's, or less in a container or a job with limits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows control groups, and those of this process."""
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2 and of version 1: files of the limit and of the use, line of ``memory.stat`` with cached files."""


def cores() -> int:
    """Cores that this process can keep busy: its affinity's, or fewer by its group's quota, rounded up.

    A container that is limited to 2 CPUs of a machine with 64 may use all of them, each for a 32nd of the time.
    """
    quotas = (_quota(folder) for folder in _groups("cpu"))
    found = min((quota for quota in quotas if quota is not None), default=math.inf)
    own = len(os.sched_getaffinity(0))
    return own if found >= own else max(1, math.ceil(found))


def available_memory() -> int:
    """Bytes that this process's group, or the machine, has available."""
    import psutil

    found = int(psutil.virtual_memory().available)
    for folder in _groups("memory"):
        for limit, used, cached in _MEMORY:
            try:
                left = int((folder / limit).read_text()) - int((folder / used).read_text())
                lines = (folder / "memory.stat").read_text().splitlines()
                left += next(int(line.split()[1]) for line in lines if line.split()[0] == cached)
            except (OSError, ValueError, StopIteration):  # the other version, or "max"
                continue
            found = min(found, left)  # cached files are reclaimable
    return found


def _quota(folder: Path) -> float | None:
    """Cores that a group is allowed; None: any number."""
    try:
        quota, period = (folder / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        except OSError:
            return None
    return int(quota) / int(period) if quota.isdecimal() else None  # "max", or -1


def _groups(controller: str) -> Iterator[Path]:
    """Folders of this process's group and of those around it, of version 2 and of a controller of version 1."""
    own = {"": "", controller: ""}
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, names, path = line.split(":", 2)
        own |= dict.fromkeys(own.keys() & set(names.split(",")), path)
    for name, path in own.items():
        top = CGROUPS / name
        inner = top / path.strip("/")
        yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(top))
