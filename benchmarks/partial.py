"""What partial decoding saves: processor time of random resized crops, with full decoding and with the extras.

    PYTHONPATH=. python benchmarks/partial.py     # a minute

Every crop is decoded by each decoder in turn, several times, in one thread; the fastest time of each counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from cnn2gnn_dist.data.images import partial, turbo_crop
from cnn2gnn_dist.data.images.views import ViewSpec, boxes
from cnn2gnn_dist.data.tar.samples import samples

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.01)
Decoder = Callable[..., Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=os.environ.get("CNN2GNN_DATA", "../shared/data"))
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    ways = {"full": lambda data, *box: simplejpeg.decode_jpeg(data, strict=True), **extras()}
    shares, seconds = measured(photographs(Path(args.data)), ways, args.views, args.repeats)
    print(
        "| crop's share of the image | crops | " + " | ".join(f"{way}, µs" for way in ways) + " |"
    )
    print("| --- | ---: |" + " ---: |" * len(ways))
    for low, top in [*pairwise(SHARES), (SHARES[0], SHARES[-1])]:
        rows = (shares >= low) & (shares < top)
        means = seconds[rows].mean(axis=0) * 1e6
        cells = [f"{mean:,.0f} ({mean / means[0]:.2f})" for mean in means]
        print(f"| {low:g} to {min(top, 1):g} | {rows.sum()} | " + " | ".join(cells) + " |")


def extras() -> dict[str, Decoder]:
    """The installed ones; the wheel's with and without leaving large crops to the full decoder."""
    found: dict[str, Decoder] = {}
    compiled = partial._decoder()
    if compiled is not None:
        found["compiled"] = partial.crop
    turbo = turbo_crop.find()
    if turbo is None:
        print("no libturbojpeg 3 here, or not faster: pip install '.[partial]'")
        return found
    whole = lambda data: simplejpeg.decode_jpeg(data, strict=True)  # noqa: E731
    found["wheel, every crop"] = lambda *box: turbo.cut(*box)
    found["wheel"] = lambda data, *box: whole(data) if (c := turbo(data, *box)) is None else c
    return found


def photographs(data: Path) -> list[bytes]:
    found = []
    for shard in sorted((data / "imagenet-sample").glob("*.tar")):
        with open(shard, "rb") as file:
            for sample in samples(shard):
                file.seek(sample.fields["jpg"].offset)
                found.append(file.read(sample.fields["jpg"].size))
    if not found:
        raise SystemExit(f"no photographs: {data}/imagenet-sample/*.tar (see --data)")
    return found


def measured(
    blobs: list[bytes], ways: dict[str, Decoder], views: int, repeats: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each crop's share of its image [N], and seconds [N, ways]."""
    spec, shares, seconds = ViewSpec("random_resized_crop", 224), [], []
    for number, data in enumerate(blobs):
        high, wide = simplejpeg.decode_jpeg(data).shape[:2]
        for view in range(views):
            box = boxes(spec, np.array([number]), np.array([high]), np.array([wide]), view)
            corner = tuple(int(column[0]) for column in box[:4])
            best = [float("inf")] * len(ways)
            for _ in range(repeats):
                for place, decode in enumerate(ways.values()):
                    began = time.thread_time()
                    decode(data, high, wide, *corner)
                    best[place] = min(best[place], time.thread_time() - began)
            shares.append(corner[2] * corner[3] / (high * wide))
            seconds.append(best)
    return np.array(shares), np.array(seconds)


if __name__ == "__main__":
    main()
