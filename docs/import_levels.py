"""Import levels: what imports nothing of ours is on level 1, everything else one level above the highest it imports.

    python docs/import_levels.py                              the packages and modules of cnn2gnn_dist
    python docs/import_levels.py cnn2gnn_dist.data            those of a package in it
    python docs/import_levels.py cnn2gnn_dist.data --modules  its modules one by one, whatever their package
    python docs/import_levels.py --svg docs/images/import-levels.svg    the same as a picture

A package counts as one module: its level is that of all its modules together. Imports only for type checkers don't
count; imports inside functions do. For another commit: PYTHONPATH=CHECKOUT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import grimp


def levels(package: str, modules: bool = False) -> list[list[str]]:
    """Names below a package by level, the lowest first.

    Raises:
        ValueError: some import each other in a cycle, so that they have no level.
    """
    graph = grimp.build_graph(package.partition(".")[0], exclude_type_checking_imports=True)
    found = graph.find_descendants(package) if modules else graph.find_children(package)
    if modules:
        found = {name for name in found if not graph.find_children(name)}
    owner = {inner: name for name in found for inner in (name, *graph.find_descendants(name))}
    needs: dict[str, set[str]] = {name: set() for name in found}
    for inner, name in owner.items():
        imported = (
            owner.get(other, name) for other in graph.find_modules_directly_imported_by(inner)
        )
        needs[name] |= {other for other in imported if other != name}
    placed: list[list[str]] = []
    while needs:
        free = sorted(name for name, others in needs.items() if not others & needs.keys())
        if not free:
            raise ValueError(f"a circle among {', '.join(sorted(needs))}")
        placed.append([name.removeprefix(f"{package}.") for name in free])
        needs = {name: others for name, others in needs.items() if name not in free}
    return placed


def draw(placed: list[list[str]], title: str, path: Path) -> None:
    """One row of boxes for each level, the highest on top, as SVG or PNG by the suffix of ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "levels", "svg.fonttype": "none"})
    from matplotlib import pyplot

    widest = max(map(len, placed))
    figure, axes = pyplot.subplots(figsize=(1.5 * widest + 0.5, 0.6 * len(placed) + 0.4))
    for height, names in enumerate(placed):
        axes.text(-0.55, height, str(height + 1), ha="right", va="center", color="grey", fontsize=9)
        for place, name in enumerate(names):
            box = {"boxstyle": "round,pad=0.4", "facecolor": "#e8f1f5", "edgecolor": "#2b7a91"}
            left = place + (widest - len(names)) / 2
            axes.text(left, height, name, ha="center", va="center", fontsize=9, bbox=box)
    axes.set(xlim=(-0.7, widest - 0.3), ylim=(-0.6, len(placed) - 0.4))
    axes.set_title(title, fontsize=10)
    axes.axis("off")
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, bbox_inches="tight", metadata=metadata)


def main() -> None:
    """Print the levels, and draw them if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", nargs="?", default="cnn2gnn_dist")
    parser.add_argument("--modules", action="store_true", help="modules one by one")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw it, too (.svg or .png)")
    options = parser.parse_args()
    placed = levels(options.package, options.modules)
    for height, names in reversed(list(enumerate(placed, 1))):
        print(f"{height:3}  {' · '.join(names)}")
    if options.svg:
        draw(placed, f"{options.package}: all imports lead downward", options.svg)


if __name__ == "__main__":
    main()
