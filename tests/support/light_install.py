"""An environment as after ``pip install .``: links to the base requirements' distributions, and nothing else.

A separate environment would have to download torch again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import REPOSITORY


def base_requirements() -> list[str]:
    """The requirements of the package without extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return list(project["dependencies"])


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of the distributions that these requirements install here, with all that those require."""
    found: dict[str, set[str]] = {}
    left = [(Requirement(one), {""}) for one in requirements]
    while left:
        wanted, extras = left.pop()
        name = canonicalize_name(wanted.name)
        if wanted.marker and not any(wanted.marker.evaluate({"extra": one}) for one in extras):
            continue
        new = {"", *wanted.extras} - found.setdefault(name, set())
        if new:
            found[name] |= new
            left += [(Requirement(one), new) for one in distribution(name).requires or ()]
    return set(found)


def link(folder: Path, requirements: Iterable[str]) -> Path:
    """Fill a folder with links to this package and to what these requirements install; for ``python -S``."""
    folder.mkdir()
    (folder / "cnn2gnn_dist").symlink_to(REPOSITORY / "cnn2gnn_dist")
    for name in sorted(closure(requirements)):
        installed = distribution(name)
        files = installed.files
        if files is None:
            raise PackageNotFoundError(f"{name} does not list its files")
        for top in {PurePosixPath(str(file)).parts[0] for file in files} - {"..", "__pycache__"}:
            place = folder / top
            if not place.is_symlink():
                place.symlink_to(Path(str(installed.locate_file(top))))
    return folder
