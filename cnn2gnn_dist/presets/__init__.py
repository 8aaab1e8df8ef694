"""The configs that come with the package."""

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of these configs."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
