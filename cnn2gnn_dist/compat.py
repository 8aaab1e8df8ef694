"""The import shims that two libraries need with a current torch, and nothing else.

``torchvision`` from PyPI is linked against CUDA: with a CPU build of torch its operators are
missing and ``import torchvision`` (hence ``import timm``) fails. ``dgl`` 2.1.0, the last on PyPI,
imports ``dgl.graphbolt``, which needs a compiled library for each torch release.
Import both libraries through the functions below.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
from typing import Any

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_keep_alive: list[Any] = []


def import_timm() -> Any:
    """Import timm, defining torchvision's two missing operators if its own do not load."""
    import_torchvision()
    return importlib.import_module("timm")


def import_torchvision() -> Any:
    """Import torchvision, defining its missing operators first if the plain import fails.

    Raises:
        RuntimeError: it fails for another reason.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as failure:
        if "torchvision::nms" not in str(failure):
            raise
    import torch

    for name in [n for n in sys.modules if n == "torchvision" or n.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}{_NMS}")
    _keep_alive.append(library)  # the definitions live as long as the object
    return importlib.import_module("torchvision")


def import_dgl() -> Any:
    """Import dgl with graphbolt stubbed out (its wheels do not load with a current torch)."""
    os.environ.setdefault("DGLBACKEND", "pytorch")  # otherwise it asks on stderr and writes to HOME
    if "dgl.graphbolt" not in sys.modules:
        stub = types.ModuleType("dgl.graphbolt")
        stub.__path__ = []

        class FusedCSCSamplingGraph:
            """Named in an isinstance check of dgl; never instantiated."""

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            raise NotImplementedError(f"dgl.graphbolt.{name} is stubbed out by cnn2gnn_dist.compat")

        stub.FusedCSCSamplingGraph = FusedCSCSamplingGraph  # type: ignore[attr-defined]
        stub.__getattr__ = missing  # type: ignore[method-assign]
        sys.modules["dgl.graphbolt"] = stub
    return importlib.import_module("dgl")
