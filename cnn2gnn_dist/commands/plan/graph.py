"""``cnn2gnn plan``: what a graph of a number of images needs, before you rent a machine."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph import memory_model
from cnn2gnn_dist.log import output

PLACES: dict[memory_model.Place, str] = {
    "disk": "on disk, each version (graph.keep_versions of them)",
    "rank": "each rank, in training",
    "search": "each rank, during the candidate search",
    "partitioner": "the partitioner, on rank 0",
    "model": "the exported model (photographs; model.thumbnails=0: without thumbnails)",
}


def command(given: dict[str, Any], *, as_json: bool) -> int:
    """Print the plan; returns 0.

    Raises:
        UserError: numbers that don't describe a graph.
    """
    sizes = _sizes(given)
    found = memory_model.structures(sizes)
    if as_json:
        rows = [asdict(one) for one in found]
        output(json.dumps({"sizes": asdict(sizes), "structures": rows}, indent=1))
        return 0
    output(
        f"{sizes.images:,} images, features of {sizes.dim}, projections of {sizes.graph_dim}, "
        f"{sizes.candidates} candidates; {sizes.parts} partitions on {sizes.ranks} ranks\n"
        f"halos: {sizes.halo1:.2f} and {sizes.halo2:.2f} nodes per inner node "
        "(assuming weak homophily; --halo1 and --halo2 take your own, from `cnn2gnn graph`)"
    )
    for place, title in PLACES.items():
        output(f"\n{title}")
        for one in found:
            if one.place == place:
                output(
                    f"  {one.name:42} {size_of(one.bytes):>11} {one.bytes / sizes.images:9.1f} B/image"
                )
        if place != "partitioner":
            output(f"  {'total':42} {size_of(memory_model.total(found, place)):>11}")
    if sizes.images >= 2**31:
        output("\nnote: ids are int32: more than 2,147,483,647 images need a wider type")
    return 0


def _sizes(given: dict[str, Any]) -> memory_model.Sizes:
    sizes = memory_model.Sizes(**{k: v for k, v in given.items() if v is not None and k != "ranks"})
    sizes = replace(sizes, ranks=given.get("ranks") or sizes.parts)
    for name in ("images", "dim", "graph_dim", "candidates", "parts", "ranks"):
        if getattr(sizes, name) < 1:
            raise UserError(
                f"{name} = {getattr(sizes, name)}",
                where=f"--{name.replace('_', '-')}",
                remedy="at least 1",
            )
    if sizes.parts > sizes.images or sizes.ranks > sizes.parts:
        raise UserError(
            f"{sizes.parts} partitions of {sizes.images} images on {sizes.ranks} ranks",
            where="--parts",
            remedy="at most one per image, at least one per rank",
        )
    first, second = memory_model.halos(sizes.ranks)
    return replace(
        sizes,
        halo1=first if given.get("halo1") is None else given["halo1"],
        halo2=second if given.get("halo2") is None else given["halo2"],
    )


def size_of(count: float) -> str:
    """A number of bytes with its unit."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    step = min(int(math.log2(max(count, 1)) // 10), len(units) - 1)
    return f"{count / 1024**step:,.1f} {units[step]}"
