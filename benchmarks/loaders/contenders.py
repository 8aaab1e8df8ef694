"""Which loaders are compared on which data, and the expected ratios."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOCAL, RAY = "ours, threads", "ours, Ray actors"
PROCESSES = "ours, processes"
LOCAL_1, RAY_1 = "ours, 1 thread", "ours, 1 Ray actor"
PARTIAL, PARTIAL_RAY = "ours, threads, partial decode", "ours, Ray actors, partial decode"
WDS, WDS_OURS = "webdataset + DataLoader", "webdataset + DataLoader, our decoder"
RAY_DATA, MOSAIC, LIT = "Ray Data", "MosaicML streaming", "litdata"
LIMIT_T, LIMIT_P = "limit, 2 threads", "limit, 2 processes"
LIMIT_PT, LIMIT_PP = "limit, 2 threads, partial decode", "limit, 2 processes, partial decode"
FIRST, SECOND = "ours, decoded cache, first epoch", "ours, decoded cache, second epoch"


@dataclass(frozen=True)
class Contender:
    """A row of the table.

    Attributes:
        module: its module in this package.
        options: for that module.
        partial: whether the compiled partial decoder is used or turned off.
        passes: how many times as much as the others it reads, because it is faster (or stops after one epoch).
        settle: passes before its clock starts.
    """

    module: str
    options: dict[str, Any] = field(default_factory=dict)
    partial: bool = False
    passes: float = 1.0
    settle: float = 0.0


PHOTOS = {
    LOCAL: Contender("ours", {"backend": "local"}),
    RAY: Contender("ours", {"backend": "ray"}),
    LOCAL_1: Contender("ours", {"backend": "local", "workers": 1}),
    RAY_1: Contender("ours", {"backend": "ray", "workers": 1}),
    PARTIAL: Contender("ours", {"backend": "local"}, partial=True),
    PARTIAL_RAY: Contender("ours", {"backend": "ray"}, partial=True),
    WDS: Contender("wds"),
    WDS_OURS: Contender("wds", {"decoder": "ours"}),
    RAY_DATA: Contender("raydata"),
    MOSAIC: Contender("mosaic"),
    LIT: Contender("lit"),
    LIMIT_T: Contender("limit", {"with": "threads"}),
    LIMIT_P: Contender("limit", {"with": "processes"}),
    LIMIT_PT: Contender("limit", {"with": "threads"}, partial=True),
    LIMIT_PP: Contender("limit", {"with": "processes"}, partial=True),
}

SMALL = {
    LOCAL: Contender("ours", {"backend": "local"}, passes=10),
    RAY: Contender("ours", {"backend": "ray"}, passes=10),
    PROCESSES: Contender("ours", {"backend": "processes"}, passes=10),
    LOCAL_1: Contender("ours", {"backend": "local", "workers": 1}, passes=10),
    RAY_1: Contender("ours", {"backend": "ray", "workers": 1}, passes=10),
    FIRST: Contender("ours", {"backend": "local", "decoded": "fresh"}, passes=0.5),
    SECOND: Contender("ours", {"backend": "local", "decoded": "fresh"}, passes=10, settle=1),
    WDS: Contender("wds"),
    WDS_OURS: Contender("wds", {"decoder": "ours"}, passes=4),
    RAY_DATA: Contender("raydata"),
    LIMIT_T: Contender("limit", {"with": "threads"}, passes=10),
    LIMIT_P: Contender("limit", {"with": "processes"}, passes=10),
}

LIMIT, LIMIT_PARTIAL = (LIMIT_T, LIMIT_P), (LIMIT_PT, LIMIT_PP)

Goal = tuple[str, "str | tuple[str, ...]", float]
"""Ours, theirs (the fastest of several), the target ratio."""

GOALS: dict[str, list[Goal]] = {
    "photos": [
        (LOCAL, WDS, 1.6),
        (LOCAL, WDS_OURS, 1.05),
        (LOCAL, RAY_DATA, 2.5),
        (LOCAL, MOSAIC, 1.0),
        (LOCAL, LIT, 1.0),
        (LOCAL, LIMIT, 0.85),
        (RAY, LOCAL, 0.9),
        (RAY_1, LOCAL_1, 0.9),
        (PARTIAL, WDS, 1.6),
        (PARTIAL, LIMIT_PARTIAL, 0.85),
        (PARTIAL_RAY, PARTIAL, 0.9),
    ],
    "small": [
        (LOCAL, WDS, 6.0),
        (PROCESSES, WDS, 15.0),
        (LOCAL, RAY_DATA, 10.0),
        (RAY, LOCAL, 0.9),
        (RAY_1, LOCAL_1, 0.9),
        (SECOND, FIRST, 3.0),
    ],
}
