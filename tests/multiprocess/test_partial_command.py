"""The command that builds the partial decoder and says which one is in use."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.multiprocess.test_partial import library  # noqa: F401 (fixture)
from tests.support import REPOSITORY


def run(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command on a copy of the few package files that it needs, in which no library is built."""
    package = folder / "cnn2gnn_dist"
    if not package.exists():
        (package / "data" / "images").mkdir(parents=True)
        for name in (
            "__init__.py",
            "errors.py",
            "log.py",
            "durable.py",
            "data/images/partial.py",
            "data/images/partial.c",
            "data/images/turbo_crop.py",
        ):
            shutil.copy(REPOSITORY / "cnn2gnn_dist" / name, package / name)
        for inner in ("data", "data/images"):
            (package / inner / "__init__.py").touch()
    return subprocess.run(
        [sys.executable, "-m", "cnn2gnn_dist.data.images.partial", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
    )


def test_the_command_builds_and_says_how_things_stand(library, tmp_path):
    says = run(tmp_path)
    assert (says.returncode, says.stdout[:13]) == (0, "not available")
    done = run(tmp_path, "build")
    assert done.returncode == 0, done.stderr
    made = [path.name for path in (tmp_path / "cnn2gnn_dist" / "data" / "images").iterdir()]
    assert sum(name.endswith(".so") for name in made) == 1
    assert not [name for name in made if name.startswith(".")]
    assert run(tmp_path).stdout.startswith("in use: ")
    assert "not in use" in run(tmp_path, CNN2GNN_PARTIAL="0").stdout
    source = tmp_path / "cnn2gnn_dist" / "data" / "images" / "partial.c"
    source.write_text(source.read_text() + "\n")  # the library does not match the changed source
    assert run(tmp_path).stdout.startswith("not available")


def test_without_compiler_or_header_the_command_says_so(library, tmp_path):
    for environment in ({"CC": "no-such-compiler"}, {"CC": f"{shutil.which('cc')} -nostdinc"}):
        failed = run(tmp_path, "build", **environment)
        assert failed.returncode == 2
        assert "remedy: install a compiler and libjpeg-turbo's header" in failed.stderr
        assert "Traceback" not in failed.stderr
        assert not list((tmp_path / "cnn2gnn_dist" / "data" / "images").glob("*.so"))
