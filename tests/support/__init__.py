"""Support shared by tests: small inputs, real servers, groups of ranks, small complete runs."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPORARY = Path("/tmp")


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A new folder with a path short enough for Ray's sockets, whose paths have at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="h", dir=TEMPORARY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
