"""The benchmarks as modules, for tests of their arithmetic."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from tests.support import REPOSITORY


def benchmark(name: str) -> ModuleType:
    """A module of ``benchmarks/``, which may be in one of its packages (``remembering.episodes``)."""
    folder = str(REPOSITORY / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
