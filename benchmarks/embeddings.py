"""Synthetic nodes with the traits of real embeddings: overlapping classes, tails, duplicates, hubs; seeded.

Row i depends only on the seed and its block of rows, so any number of nodes is written block by block, and
the first rows of a large set are those of a small one.

    python benchmarks/embeddings.py FOLDER --nodes 200000 --homophily 0.65
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

CLASSES = 1000
DIM, FEATURES = 64, 128
LATENT, TILT, NOISE = 12, 0.3, 0.1
"""Directions in which nodes differ (the k-NN problem is about as hard as in this many dimensions), the size of
the last one relative to the first, and the noise added in all others."""
BLOCK = 50_000
SPREAD = {0.65: 0.485, 0.9: 0.29}
"""Spread of a class, by the fraction of same-class edges that it gives at 1,281,167 nodes and M = 16."""
DUPLICATES, HUBS, TAILS = 0.01, 0.005, 0.05
FILES = {"x": (FEATURES, np.float16), "z": (DIM, np.float32), "labels": (None, np.int32)}


class World:
    """What all rows share: class centers in a few latent directions, and the embedding of these."""

    def __init__(self, homophily: float, seed: int) -> None:
        rng = np.random.default_rng([seed, 0])
        self.scale_R = np.linspace(1.0, TILT, LATENT)
        self.centre_CR = rng.standard_normal((CLASSES, LATENT)) * self.scale_R
        self.lift_Rd = np.linalg.qr(rng.standard_normal((DIM, LATENT)))[0].T
        self.lift_dD = rng.standard_normal((DIM, FEATURES)) / DIM**0.5
        self.spread, self.seed = SPREAD[homophily], seed

    def block(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """x, z and labels of the rows from ``number`` · BLOCK."""
        rng = np.random.default_rng([self.seed, 1, number])
        labels = rng.integers(0, CLASSES, BLOCK, dtype=np.int32)
        size = np.exp(0.25 * rng.standard_normal(BLOCK))
        kind = rng.random(BLOCK)
        size[kind < HUBS] *= 0.15
        size[kind > 1 - TAILS] *= 1.8
        within_BR = rng.standard_normal((BLOCK, LATENT)) * self.scale_R
        latent_BR = self.centre_CR[labels] + (size * self.spread)[:, None] * within_BR
        z = latent_BR @ self.lift_Rd + NOISE * rng.standard_normal((BLOCK, DIM))
        copies = rng.choice(BLOCK, int(DUPLICATES * BLOCK), replace=False)
        half = len(copies) // 2
        z[copies[:half]], labels[copies[:half]] = (
            z[copies[half : 2 * half]],
            labels[copies[half : 2 * half]],
        )
        x = np.maximum(z @ self.lift_dD, 0) + 0.05 * rng.standard_normal((BLOCK, FEATURES))
        x[copies[:half]] = x[copies[half : 2 * half]]
        return x.astype(np.float16), _unit(z).astype(np.float32), labels


def make(nodes: int, homophily: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x float16 [N, 128], z float32 [N, 64] of unit length, labels int32 [N]."""
    world = World(homophily, seed)
    blocks = [world.block(number) for number in range(-(-nodes // BLOCK))]
    x, z, labels = (np.concatenate(column)[:nodes] for column in zip(*blocks, strict=True))
    return x, z, labels


def write(
    folder: Path, nodes: int, homophily: float, seed: int = 0, *, features: bool = True
) -> None:
    """Write ``x.npy``, ``z.npy``, ``labels.npy`` to a folder, block by block; existing files are kept."""
    if (folder / "labels.npy").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    world = World(homophily, seed)
    names = [name for name in FILES if features or name != "x"]
    files = {}
    for name in names:
        width, kind = FILES[name]
        shape = (nodes,) if width is None else (nodes, width)
        files[name] = open_memmap(folder / f"{name}.tmp", "w+", dtype=kind, shape=shape)
    for number in tqdm(range(-(-nodes // BLOCK)), desc="nodes", unit="block", leave=False):
        start = number * BLOCK
        for name, rows in zip(FILES, world.block(number), strict=True):
            if name in files:
                files[name][start : start + BLOCK] = rows[: nodes - start]
    for name in names:  # the labels come last: they mark completion
        files[name].flush()
        (folder / f"{name}.tmp").replace(folder / f"{name}.npy")


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=1_281_167)
    parser.add_argument("--homophily", type=float, choices=sorted(SPREAD), default=0.65)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.folder, given.nodes, given.homophily, given.seed)
