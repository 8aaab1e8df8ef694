"""Stems and teachers as the presets name them: across processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.unit.models.test_stem_teacher import PACKAGE


def test_without_a_network_pretrained_says_what_to_do(tmp_path: Path) -> None:
    """The variable is read on import, hence a separate process, started as a user would start it."""
    code = (
        "from cnn2gnn_dist.errors import UserError\n"
        "from cnn2gnn_dist.models.stem import build_stem\n"
        "from cnn2gnn_dist.models.teacher import build_teacher\n"
        "for build in (lambda: build_teacher('resnet18', 10, 32, pretrained=True),\n"
        "              lambda: build_stem('resnet18', 8, 32, pretrained=True)):\n"
        "    try:\n"
        "        build()\n"
        "    except UserError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": str(PACKAGE.parent),
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("pretrained weights of resnet18 can't be loaded") == 2
    assert done.stdout.count("remedy:") == 2
    assert "HF_HUB_OFFLINE" in done.stdout
    assert "teacher.weights" in done.stdout
