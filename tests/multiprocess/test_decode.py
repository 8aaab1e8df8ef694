"""Decoding: across processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.support.bombs import all_bombs

SURVIVES = {
    "png, body",
    "png, length of a chunk",
    "png, animation",
    "tiff, strip",
    "gif, frames",
}
"""Decompression bombs in which the image itself is small and complete."""


UNFOLD = """
import json, resource, sys, warnings
import numpy as np
from tests.support.bombs import all_bombs
from cnn2gnn_dist.data.images.decode import CorruptSample, decode
from cnn2gnn_dist.data.images.batch_views import fill_views
from cnn2gnn_dist.data.images.views import ViewSpec

warnings.simplefilter("ignore")
bombs = all_bombs()
spec = ViewSpec("random_resized_crop", 32)
import torch.nn.functional  # what is loaded once, such as for a resize, is loaded before the limit
for data in (b"", b"\\xff\\xd8"):
    fill_views(spec, [data], np.arange(1), 0, np.zeros((1, 32, 32, 3), np.uint8))
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (800 << 20),) * 2)
found = {}
for name, data in bombs.items():
    try:
        found[name] = list(decode(data).shape)
    except CorruptSample as error:
        found[name] = str(error)
    images = np.full((1, 32, 32, 3), 3, np.uint8)
    for view in (-1, 0):
        wrong = fill_views(spec, [data], np.arange(1), view, images)
        assert bool(wrong) == isinstance(found[name], str), (name, wrong)
        assert not wrong or (images == 3).all(), name
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit needs /proc")
def test_bombs_take_neither_memory_nor_time():
    """All bombs in a process limited to 800 MB more: about three images of the largest size."""
    run = subprocess.run(
        [sys.executable, "-c", UNFOLD],
        cwd=REPOSITORY,
        env={"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found.keys() == all_bombs().keys()
    assert {name for name, result in found.items() if isinstance(result, list)} == SURVIVES
    starved = {name: text for name, text in found.items() if "MemoryError" in text}
    assert not starved
    sizes = [name for name in found if name.endswith((", size", ", tile", ", high tile"))]
    assert all("pixels" in found[name] or "limit" in found[name] for name in sizes), found
