"""How well the stream's order shuffles, and what it costs, by window; compared with full permutations.

PYTHONPATH=. python benchmarks/shuffle.py [--picture docs/images/shuffle.png]    # 15 seconds on one core

No data is read: only the order is computed, at the size of ImageNet (1,024 shards of 1,250 samples, 1,000 classes,
batches of 1,024). Figures are of two consecutive epochs; docs/order.md says what they mean.
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading.shard_files import OPEN_SHARDS

SHARDS, SHARD, CLASSES, BATCH, SEED = 1024, 1250, 1000, 1024, 0


@dataclass(frozen=True)
class Quality:
    """Statistics of a pair of epochs; fractions are from 0 to 1.

    Attributes:
        median, low: median and 5 % quantile of the distance between samples that are adjacent
            in a shard, in positions of the epoch, as a fraction of N.
        sorted_tv, mixed_tv: total variation distance between the classes of a batch and those
            of the data set, mean over batches; for shards sorted by class, and of mixed classes.
        pairs: how often two samples of one batch meet again in a batch of the next epoch.
    """

    median: float
    low: float
    sorted_tv: float
    mixed_tv: float
    pairs: float


def quality(first_BG: np.ndarray, second_BG: np.ndarray, shard: int, classes: int) -> Quality:
    """Measure two epochs [batches, G] of ids in shards of ``shard`` samples."""
    total = int(first_BG.max()) + 1
    label_N = np.arange(total) * classes // total
    mixed_N = np.random.default_rng(SEED).permutation(label_N)
    near = distances(first_BG, shard) / total
    return Quality(
        float(np.median(near)),
        float(np.quantile(near, 0.05)),
        float(variation(first_BG, label_N).mean()),
        float(variation(first_BG, mixed_N).mean()),
        met_again(first_BG, second_BG),
    )


def distances(ids_BG: np.ndarray, shard: int) -> np.ndarray:
    """Positions between samples i and i+1 of one shard, for all pairs in the epoch."""
    place_N = _by_id(np.arange(ids_BG.size), ids_BG)
    left = np.flatnonzero((place_N[:-1] >= 0) & (place_N[1:] >= 0))
    left = left[(left + 1) % shard > 0]
    return np.abs(place_N[left + 1] - place_N[left])


def variation(ids_BG: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """[B] half the L1 distance between each batch's class frequencies and the data set's."""
    batches, size = ids_BG.shape
    classes = int(label_N.max()) + 1
    cell = np.arange(batches)[:, None] * classes + label_N[ids_BG]
    counts_BC = np.bincount(cell.ravel(), minlength=batches * classes).reshape(batches, classes)
    share_C = np.bincount(label_N, minlength=classes) / len(label_N)
    return np.abs(counts_BC / size - share_C).sum(1) / 2


def met_again(first_BG: np.ndarray, second_BG: np.ndarray) -> float:
    """The fraction of pairs in a batch of the first epoch that share a batch in the second."""
    batches, size = first_BG.shape
    numbers = np.repeat(np.arange(batches), size)
    one, two = _by_id(numbers, first_BG), _by_id(numbers, second_BG)
    both = np.flatnonzero((one[: len(two)] >= 0) & (two[: len(one)] >= 0))
    _, together = np.unique(one[both] * batches + two[both], return_counts=True)
    return float((together * (together - 1)).sum() / (batches * size * (size - 1)))


def _by_id(values: np.ndarray, ids_BG: np.ndarray) -> np.ndarray:
    found_N = np.full(int(ids_BG.max()) + 1, -1)
    found_N[ids_BG.ravel()] = values
    return found_N


@dataclass(frozen=True)
class Cost:
    """The order's cost for reader and host.

    Attributes:
        in_batch: distinct shards per batch, mean.
        opens: times that a shard is opened per sample read, for one reader that keeps OPEN_SHARDS open.
        batch_us: microseconds per consecutive batch.
        seek_ms: milliseconds to an arbitrary batch in another epoch, the worst of nine.
    """

    in_batch: float
    opens: float
    batch_us: float
    seek_ms: float


def cost(sizes: np.ndarray, batch: int, window: int, parts: Sequence[np.ndarray] | None) -> Cost:
    """Measure the order of shards of ``sizes``; opens over the epoch's first 262,144 reads."""
    how = {"seed": SEED, "global_batch": batch, "window": window, "parts": parts}
    order = Order(sizes, **how)
    began = time.perf_counter()
    ids_BG = epoch_of(order, 0)
    in_turn = (time.perf_counter() - began) / len(ids_BG)
    seeks = []
    for number in np.linspace(0, len(ids_BG) - 1, 9).astype(int):
        fresh = Order(sizes, **how)
        began = time.perf_counter()
        fresh.batch(1, int(number))
        seeks.append(time.perf_counter() - began)
    shard_BG = np.searchsorted(order.starts, ids_BG, side="right") - 1
    in_batch = float(np.mean([len(np.unique(row)) for row in shard_BG]))
    return Cost(in_batch, opened(shard_BG.ravel()[: 1 << 18]), in_turn * 1e6, max(seeks) * 1e3)


def opened(shards: np.ndarray) -> float:
    """Opens per read if the last OPEN_SHARDS shards are kept open."""
    kept: OrderedDict[int, None] = OrderedDict()
    opens = 0
    for shard in shards.tolist():
        opens += shard not in kept
        kept[shard] = None
        kept.move_to_end(shard)
        if len(kept) > OPEN_SHARDS:
            kept.popitem(last=False)
    return opens / len(shards)


def epoch_of(order: Order, epoch: int) -> np.ndarray:
    """[batches, G] of one epoch."""
    return np.stack([order.batch(epoch, number) for number in range(order.batches_per_epoch)])


def windowed(shards: int, window: int) -> Quality:
    """Quality of our order for that many samples in ``shards`` shards."""
    size = SHARDS * SHARD // shards
    order = Order(np.full(shards, size), seed=SEED, global_batch=BATCH, window=window)
    return quality(epoch_of(order, 0), epoch_of(order, 1), size, CLASSES)


def permuted() -> Quality:
    """Quality of two full permutations."""
    rng = np.random.default_rng(SEED)
    epochs = [rng.permutation(SHARDS * SHARD).reshape(-1, BATCH) for _ in range(2)]
    return quality(epochs[0], epochs[1], SHARD, CLASSES)


def main(picture: Path | None) -> None:
    """Print the tables; draw the charts."""
    full = permuted()
    windows = [2**power for power in range(11)]
    print(f"{SHARDS} shards of {SHARD}, {CLASSES} classes, batches of {BATCH}, seed {SEED}\n")
    print("Quality: distance of shard neighbors, classes of a batch, pairs that meet again")
    print(_line("W", "W/S", "median", "5 %", "TV sorted", "TV mixed", "pairs x full"))
    found = {}
    for window in windows:
        found[window] = windowed(SHARDS, window)
        print(_quality_line(f"{window}", window / SHARDS, found[window], full))
    print(_quality_line("full", 1.0, full, full))

    print("\nThe same share of an epoch in a window, other sizes of shards: TV sorted")
    counts = (256, 1024, 4096)
    cut = {s: {w / 1024: windowed(s, w * s // 1024) for w in windows[2:]} for s in counts}
    print(_line("W/S", *(f"{s} shards" for s in counts)))
    for share in cut[1024]:
        print(_line(f"{share:.4f}", *(f"{cut[s][share].sorted_tv:.3f}" for s in counts)))

    print("\nCost: of one core and one reader")
    print(_line("W", "parts", "shards/batch", "opens/read", "us/batch", "seek ms"))
    sizes = np.full(SHARDS, SHARD)
    part_N = np.random.default_rng(SEED).integers(0, 8, SHARDS * SHARD)
    eight = [np.flatnonzero(part_N == part) for part in range(8)]
    for window in (1, 8, 16, 32, 64, 128, 1024):
        for parts in (None, eight):
            spent = cost(sizes, BATCH, window, parts)
            row = (f"{spent.in_batch:.0f}", f"{spent.opens:.4f}")
            times = (f"{spent.batch_us:.0f}", f"{spent.seek_ms:.1f}")
            print(_line(str(window), str(len(parts or [0])), *row, *times))
    if picture is not None:
        draw(picture, found, cut, full)


def _quality_line(name: str, share: float, got: Quality, full: Quality) -> str:
    shares = (f"{value:.4f}" for value in (share, got.median, got.low))
    classes = (f"{value:.3f}" for value in (got.sorted_tv, got.mixed_tv))
    return _line(name, *shares, *classes, f"{got.pairs / full.pairs:.2f}")


def _line(*cells: str) -> str:
    return "".join(f"{cell:>13}" for cell in cells)


def draw(
    path: Path, found: dict[int, Quality], cut: dict[int, dict[float, Quality]], full: Quality
) -> None:
    """Three charts over the window; black dots are a full permutation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    far, classes, pairs = axes
    windows = list(found)
    far.loglog(windows, [q.median for q in found.values()], "o-", label="median")
    far.loglog(windows, [q.low for q in found.values()], "s-", label="5 % quantile")
    for value in (full.median, full.low):
        far.axhline(value, color="black", linestyle=":")
    far.set(title="Distance of neighbors in a shard", ylabel="share of the epoch")
    far.set(xlabel=f"window W (of {SHARDS} shards)")
    for shards, row in cut.items():
        tv = [q.sorted_tv for q in row.values()]
        classes.semilogx(list(row), tv, "o-", label=f"sorted, {shards} shards")
    mixed = [q.mixed_tv for q in found.values()]
    classes.semilogx([w / SHARDS for w in windows], mixed, "^-", label="mixed shards")
    classes.axhline(full.sorted_tv, color="black", linestyle=":")
    classes.set(
        title="Class mix of a batch against the data set", ylabel="total variation distance"
    )
    classes.set(xlabel="window as a share of all shards", ylim=(0, 1.02))
    pairs.loglog(windows, [q.pairs / full.pairs for q in found.values()], "o-", label="measured")
    pairs.loglog(
        windows, [expected_pairs(SHARDS, w) for w in windows], "--", label="formula (order.md)"
    )
    pairs.axhline(1, color="black", linestyle=":", label="full permutation")
    pairs.set(
        title="Pairs of a batch that meet again next epoch", ylabel="times a full permutation's"
    )
    pairs.set(xlabel=f"window W (of {SHARDS} shards)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


def expected_pairs(shards: int, window: int) -> float:
    """Expected pairs that meet again, relative to a full permutation: partners of one shard stay together."""
    if shards == 1:
        return 1.0
    own, other = 1 / window, (window - 1) / window
    return shards / window * (own + other * (window - 1) / (shards - 1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path)
    main(parser.parse_args().picture)
