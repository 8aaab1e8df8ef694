"""Which loaders are compared on which data, and the expected ratios."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOCAL, RAY = "ours, threads", "ours, Ray actors"
PROCESSES, STORE = "ours, processes", "ours, Ray actors, through the object store"
LOCAL_1, RAY_1 = "ours, 1 thread", "ours, 1 Ray actor"
PARTIAL, PARTIAL_RAY = "ours, threads, partial decode", "ours, Ray actors, partial decode"
WDS, WDS_OURS = "webdataset + DataLoader", "webdataset + DataLoader, our decoder"
WDS_TORCHVISION = "webdataset + DataLoader, torchvision's decoder"
RAY_DATA, MOSAIC, LIT = "Ray Data", "MosaicML streaming", "litdata"
SPDL, GRAIN, FFCV = "SPDL, threads", "grain, processes", "FFCV, its own format"
OWN_FORMAT = ("mosaic", "lit", "grain_loader", "ffcv_loader")
"""Modules that write the images in a format of their own first."""
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
    STORE: Contender("ours", {"backend": "ray", "store": True}),
    PROCESSES: Contender("ours", {"backend": "processes"}),
    LOCAL_1: Contender("ours", {"backend": "local", "workers": 1}),
    RAY_1: Contender("ours", {"backend": "ray", "workers": 1}),
    PARTIAL: Contender("ours", {"backend": "local"}, partial=True),
    PARTIAL_RAY: Contender("ours", {"backend": "ray"}, partial=True),
    WDS: Contender("wds"),
    WDS_TORCHVISION: Contender("wds", {"decoder": "torchvision"}),
    WDS_OURS: Contender("wds", {"decoder": "ours"}),
    SPDL: Contender("spdl_loader"),
    GRAIN: Contender("grain_loader"),
    FFCV: Contender("ffcv_loader", passes=2),
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
    STORE: Contender("ours", {"backend": "ray", "store": True}, passes=10),
    PROCESSES: Contender("ours", {"backend": "processes"}, passes=10),
    LOCAL_1: Contender("ours", {"backend": "local", "workers": 1}, passes=10),
    RAY_1: Contender("ours", {"backend": "ray", "workers": 1}, passes=10),
    FIRST: Contender("ours", {"backend": "local", "decoded": "fresh"}, passes=0.5),
    SECOND: Contender("ours", {"backend": "local", "decoded": "fresh"}, passes=10, settle=1),
    WDS: Contender("wds"),
    WDS_TORCHVISION: Contender("wds", {"decoder": "torchvision"}),
    WDS_OURS: Contender("wds", {"decoder": "ours"}, passes=4),
    SPDL: Contender("spdl_loader"),
    GRAIN: Contender("grain_loader"),
    FFCV: Contender("ffcv_loader", passes=10),
    RAY_DATA: Contender("raydata"),
    LIMIT_T: Contender("limit", {"with": "threads"}, passes=10),
    LIMIT_P: Contender("limit", {"with": "processes"}, passes=10),
}

Goal = tuple[str, str, float]
"""Ours, theirs, the target ratio."""

GOALS: dict[str, list[Goal]] = {
    "photos": [
        (LOCAL, WDS, 1.6),
        (LOCAL, WDS_TORCHVISION, 1.0),
        (LOCAL, WDS_OURS, 1.05),
        (LOCAL, SPDL, 1.0),
        (LOCAL, GRAIN, 1.0),
        (LOCAL, FFCV, 1.0),
        (LOCAL, RAY_DATA, 2.5),
        (LOCAL, MOSAIC, 1.0),
        (LOCAL, LIT, 1.0),
        (LOCAL, LIMIT_T, 0.95),
        (RAY, LOCAL, 0.95),
        (RAY, STORE, 1.0),
        (PROCESSES, LOCAL, 0.95),
        (RAY_1, LOCAL_1, 0.9),
        (PARTIAL, WDS, 1.6),
        (PARTIAL, LIMIT_PT, 0.95),
        (PARTIAL_RAY, PARTIAL, 0.95),
    ],
    "small": [
        (LOCAL, WDS, 6.0),
        (PROCESSES, WDS, 15.0),
        (PROCESSES, WDS_TORCHVISION, 1.0),
        (PROCESSES, SPDL, 1.0),
        (PROCESSES, GRAIN, 1.0),
        (PROCESSES, FFCV, 1.0),
        (SECOND, FFCV, 1.0),
        (LOCAL, RAY_DATA, 10.0),
        (RAY, LOCAL, 0.9),
        (RAY, STORE, 1.0),
        (RAY_1, LOCAL_1, 0.9),
        (SECOND, FIRST, 3.0),
    ],
}
