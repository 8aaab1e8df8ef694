"""What ``cnn2gnn audit`` finds on CIFAR-10: labels flipped on purpose, and near-duplicates of the test images.

    python benchmarks/audit.py FOLDER --known known.csv       (about 8 minutes on one core)

A small stem is trained for five epochs on the first 12,500 training images (its features are kept in FOLDER).
Of 20,000 others, 5, 20 and 40 % of the labels are flipped: to any other class, or to the class that the stem
confuses most with the true one. All methods get the same features and labels:

    audit, score      the order of ``cnn2gnn audit`` (inference/audit/scores.py), 19 neighbors
    audit, margin     the audit's column for flips between similar classes
    small loss        the loss of the same linear head alone
    cleanlab, *       its label quality scores, on probabilities of scikit-learn's logistic regression
                      over five folds, as its documentation advises

It prints the AUROC of flipped against unchanged labels, and the precision among as many images as were flipped; then
near-duplicates between the 10,000 test and 50,000 training images. ``--known``: a CSV with a column ``name`` of test
images (cat_0012.jpg) that are known to have one, counted as found or not. Needs $CNN2GNN_DATA/cifar10.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from cleanlab.rank import get_label_quality_scores
from kept_files import digest, made_from
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cnn2gnn_dist.data.images.decode import decode
from cnn2gnn_dist.inference.audit import scores as audit_scores
from cnn2gnn_dist.inference.audit.findings import HeldOut, TrainingSet, audit
from cnn2gnn_dist.inference.audit.linear_head import head_probabilities
from cnn2gnn_dist.models import stem

TRAINED, EPOCHS, JUDGED, CLASSES, BATCH = 12_500, 5, 20_000, 10, 256
NEIGHBOURS = 20


def images(part: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Pixels uint8 [N, 32, 32, 3], labels [N] and names of one part of CIFAR-10."""
    folder = Path(os.environ["CNN2GNN_DATA"]) / "cifar10"
    tables = [pq.read_table(path) for path in sorted(folder.glob(f"{part}*.parquet"))]
    records = [one for table in tables for one in table.column("image").to_pylist()]
    labels = np.concatenate([table.column("label").to_numpy() for table in tables])
    return np.stack([decode(r["bytes"]) for r in records]), labels, [r["path"] for r in records]


def normal(pixels: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.47) / 0.25


def train(pixels: np.ndarray, labels: np.ndarray, epochs: int, seed: int = 0) -> torch.nn.Module:
    """Train a stem with a linear head, crops and flips."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        stem.build_stem("resnet_tiny", 128, 32), torch.nn.Linear(128, CLASSES)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    steps = epochs * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=steps)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            x = F.pad(normal(pixels[rows.numpy()]), (4, 4, 4, 4), mode="reflect")
            top, left = torch.randint(0, 9, (2,)).tolist()
            x = x[:, :, top : top + 32, left : left + 32]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            loss = F.cross_entropy(model(x), torch.from_numpy(labels)[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            step += 1
    return model.eval()


@torch.no_grad()
def embed(model: torch.nn.Module, pixels: np.ndarray) -> np.ndarray:
    """float32 [N, 128]: the stem's features."""
    return np.concatenate([model[0](normal(b)).numpy() for b in np.array_split(pixels, 60)])


def features(folder: Path) -> dict[str, np.ndarray]:
    """x of all training and test images, labels, and the stem's mean probabilities by true class."""
    path = folder / "features.npz"
    data = (Path(os.environ["CNN2GNN_DATA"]) / "cifar10").glob("*.parquet")
    code = [Path(__file__), Path(stem.__file__)]
    with made_from(digest(files=[*data, *code]), path) as missing:
        if missing:
            (train_px, y, _), (test_px, test_y, _) = images("train"), images("test")
            model = train(train_px[:TRAINED], y[:TRAINED], EPOCHS)
            x, test_x = embed(model, train_px), embed(model, test_px)
            with torch.no_grad():
                p = model[1](torch.from_numpy(test_x)).softmax(1).numpy()
            print(f"stem: {(p.argmax(1) == test_y).mean():.1%} of the test images", flush=True)
            confusion = np.stack([p[test_y == c].mean(0) for c in range(CLASSES)])
            np.savez(path, x=x, y=y, test_x=test_x, test_y=test_y, confusion=confusion)
    return dict(np.load(path))


def flipped(
    y: np.ndarray, kind: str, share: float, confusion: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels after flips, and which of them are wrong."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(y)) < share
    other = (y + rng.integers(1, CLASSES, len(y))) % CLASSES
    if kind == "similar":
        other = (confusion - 9 * np.eye(CLASSES)).argmax(1)[y]
    return np.where(wrong, other, y), wrong


def scores(
    x: np.ndarray, labels: np.ndarray, near: tuple[np.ndarray, ...]
) -> dict[str, np.ndarray]:
    """Doubt [N] by each method: higher is more doubtful."""
    rows = np.arange(len(labels))
    head = head_probabilities(x, labels, CLASSES)
    ids, weight = near
    votes = audit_scores.vote(ids, weight, labels, CLASSES)
    soft = audit_scores.soft_vote(ids, weight, lambda some: head[some], CLASSES)
    ours = audit_scores.label_scores(head, (votes + soft) / 2, labels)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200))
    crossed = cross_val_predict(model, x, labels, cv=5, method="predict_proba")
    found = {
        "audit, score": ours.score_N,
        "audit, margin": ours.margin_N,
        "small loss": -head[rows, labels],
        "neighbours alone": -votes[rows, labels],
    }
    for name in ("self_confidence", "normalized_margin"):
        found[f"cleanlab, {name}"] = -get_label_quality_scores(labels, crossed, method=name)
    return found


def label_errors(data: dict[str, np.ndarray], seeds: list[int]) -> None:
    rows = slice(TRAINED, TRAINED + JUDGED)
    x, y = data["x"][rows], data["y"][rows]
    ids, far = audit_scores.neighbours(audit_scores.unit(x), NEIGHBOURS)
    near = ids, audit_scores.vote_weights(far)
    for kind in ("uniform", "similar"):
        for share in (0.05, 0.2, 0.4):
            table: dict[str, list[tuple[float, float]]] = {}
            for seed in seeds:
                labels, wrong = flipped(y, kind, share, data["confusion"], seed)
                for name, doubt in scores(x, labels, near).items():
                    first = np.argsort(-doubt, kind="stable")[: wrong.sum()]
                    pair = roc_auc_score(wrong, doubt), wrong[first].mean()
                    table.setdefault(name, []).append(pair)
            print(f"\n{kind}, {share:.0%} flipped: AUROC / precision ({len(seeds)} draws)")
            for name, pairs in table.items():
                print("  {:28} {:.3f} / {:.3f}".format(name, *np.mean(pairs, axis=0)), flush=True)


def leakage(data: dict[str, np.ndarray], known: Path | None, folder: Path) -> None:
    """Near-duplicates between test and training images, as the command finds them."""
    (train_px, y, _), (test_px, test_y, names) = images("train"), images("test")
    started = time.process_time()
    mean = data["x"].mean(0)
    z, test_z = (x - mean for x in (data["x"], data["test_x"]))
    z, test_z = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, test_z))
    table, _ = audit_scores.neighbours(z, NEIGHBOURS)
    given = TrainingSet(data["x"], z, y, table, None, [str(c) for c in range(CLASSES)])
    held = HeldOut(data["test_x"], test_z, test_y)
    found = audit(
        given, held, look=lambda rows: train_px[rows], look_held=lambda rows: test_px[rows]
    )
    pairs = found.across
    print(f"\nnear-duplicates ({time.process_time() - started:.0f} s of CPU, all of the audit):")
    print(f"  {len(np.unique(pairs.a_P)):,} of {len(test_y):,} test images have one among the training "
          f"images, {len(pairs.a_P):,} pairs; likeness from {pairs.threshold:.2f}; "
          f"{(y[pairs.b_P] != test_y[pairs.a_P]).sum()} pairs of two classes")  # fmt: skip
    print(f"  {len(found.within.a_P):,} pairs within the training images")
    if known is not None:
        with open(known, encoding="utf-8", newline="") as file:
            wanted = {line["name"] for line in csv.DictReader(file)}
        there = {names[row] for row in pairs.a_P}
        print(f"  of {len(wanted)} known ones {len(wanted & there)} are found")
    shown = np.linspace(0, len(pairs.a_P) - 1, 48).astype(int)
    sheet = Image.new("RGB", (16 * 68, 3 * 140), "white")
    for place, pair in enumerate(shown):
        left, top = place % 16 * 68, place // 16 * 140
        for down, pixels in ((0, test_px[pairs.a_P[pair]]), (66, train_px[pairs.b_P[pair]])):
            sheet.paste(Image.fromarray(pixels).resize((64, 64)), (left, top + down))
    sheet.save(folder / "pairs.png")
    print(f"  48 of them, from the most to the least alike: {folder / 'pairs.png'}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--known", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    data = features(given.folder)
    label_errors(data, given.seeds)
    leakage(data, given.known, given.folder)
    print(f"\n{time.process_time():.0f} s of CPU")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
