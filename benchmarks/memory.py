"""What a memory of training images is good for: new classes without training, sets answered together, odd images.

    python benchmarks/memory.py FOLDER --data cifar10:cat,ship --new --sets --odd --draws 20
    python benchmarks/memory.py FOLDER --data mini-imagenet --new --sets --draws 5
    python benchmarks/memory.py FOLDER --data mini-imagenet --gated        (rivals behind the learned gate)

Features come from a small student that sees the old classes alone (about six minutes on one core, the first
time; kept in FOLDER). Rules are fitted on calibration images of the old classes, never on test images.
Prints Markdown; ± is 1.96 standard errors over draws. Needs $CNN2GNN_DATA.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from remembering import additions, features, gated, sets
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from cnn2gnn_dist.inference.calibration import Calibration, calibration_error, softmax
from cnn2gnn_dist.inference.sets.learned import LearnedSets
from cnn2gnn_dist.inference.sets.together import Together

SHOTS = (1, 5, 20, 100)
K = 10
STRANGERS = 10
"""Times as many sets of strangers: they may lose 0.2 points, which 400 sets would not resolve."""
FITTED_ON = 60
"""Sets of calibration images of each kind, on which rivals' constants are chosen."""


def new_classes(of: additions.Setting, draws: int, shots: list[int]) -> None:
    """Old and new accuracy of every rule, for 1 to 100 images per class."""
    print(
        "| images | rule | old | new | harmonic mean | AUROC | rule R finds of its new | predicted new |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for each in shots:
        rows: dict[str, list[list[float]]] = {}
        predicted = []
        for number in tqdm(range(draws), desc=f"{each} images a class", disable=None):
            drawn = of.draw(each, number)
            scores, trades = additions.ours(of, drawn)
            chosen = next(t for t in trades if t.old_loss == 1.0)
            predicted.append(np.nan if chosen.new is None else chosen.new)
            rows.setdefault("rule R", []).append(additions.judged(of, scores, 1.0, own=False))
            for name, rival in additions.RIVALS.items():
                _judge(of, name, rival(of, drawn), rows)
        for name, values in rows.items():
            mean = np.mean(values, 0)
            error = 1.96 * np.std(values, 0) / max(len(values) - 1, 1) ** 0.5
            cells = [f"{m:.1f} ± {e:.1f}" for m, e in zip(mean, error, strict=True)]
            found = additions.share([v[1] for v in rows["rule R"]], [v[1] for v in values])
            shown = name != "rule R" and np.isfinite(found[0])
            cells.append(f"{found[0]:.0f} % ± {found[1]:.0f}" if shown else "")
            said = f"{np.mean(predicted):.1f}" if name == "rule R" else ""
            print(f"| {each} | {name} | " + " | ".join([*cells, said]) + " |", flush=True)


def _judge(
    of: additions.Setting, name: str, scores: additions.Scores, rows: dict[str, list[list[float]]]
) -> None:
    """Add to the rows of a rival: as it is, with one point lost, and one point lost from the head's accuracy."""
    if name in additions.UNCALIBRATED:
        judged = additions.judged(of, scores, None, own=False)
        rows.setdefault(f"{name}, no offset", []).append(judged)
    if name not in additions.KEEPS_HEAD:
        judged = additions.judged(of, scores, 1.0, own=True)
        rows.setdefault(f"{name}, from its own accuracy", []).append(judged)
    rows.setdefault(name, []).append(additions.judged(of, scores, 1.0, own=False))


def together(of: additions.Setting, count: int) -> None:
    """Points gained by answering the images of a set together."""
    labels = of.labels["calibration"]
    fitted = of.logits["calibration"], of.f["calibration"], labels
    rule, started = Together.fit(*fitted), time.process_time()
    learned = LearnedSets.fit(*fitted)
    print(f"\nlearned in {time.process_time() - started:.0f} s of processor time")
    print(f"\nT = {rule.temperature:.3f}, edges σ({rule.slope:.2f} cos + {rule.offset:.2f})\n")
    means = additions.unit(of.means)
    constants = sets.fit(rule, means, *fitted, sets=FITTED_ON)
    print(f"soft k-means: scale {constants.scale:g}; LaplacianShot: λ {constants.strength:g}\n")
    test = of.logits["test"], of.f["test"], of.labels["test"]
    ways = sets.answers(rule, means, constants)
    columns = ["learned", *ways]
    print(
        f"Points gained over alone ± standard error, paired by set; {count} sets, of strangers ",
        end="",
    )
    print(
        f"{STRANGERS} times as many. In brackets: less the learned answer's gain, ± standard error.\n"
    )
    print("| " + " | ".join(["set", "alone", "fired", *columns]) + " |")
    print("|" + " --- |" * (len(columns) + 3))
    for name, found in sets.judged(learned, ways, *test, count, strangers=STRANGERS):
        cells = [name, f"{100 * found['alone'].mean():.2f}", f"{found['fired'].mean():.2f}"]
        for way in columns:
            cells.append("{:.2f} ± {:.2f}".format(*sets.difference(found[way], found["alone"])))
            if way != "learned":
                less = sets.difference(found[way], found["learned"])
                cells[-1] += " ({:+.2f} ± {:.2f})".format(*less)
        print("| " + " | ".join(cells) + " |", flush=True)


def behind_gate(of: additions.Setting, count: int) -> None:
    """Points gained by rivals behind the learned gate, on small bursts and on strangers."""
    labels = of.labels["calibration"]
    fitted = gated.Images(of.logits["calibration"], of.f["calibration"], labels)
    test = gated.Images(of.logits["test"], of.f["test"], of.labels["test"])
    learned, rule = LearnedSets.fit(*fitted), Together.fit(*fitted)
    means = additions.unit(of.means)
    ways = sets.answers(rule, means, sets.fit(rule, means, *fitted, sets=FITTED_ON))
    chosen = {name: ways[name] for name in ("mean of logits", "EM prior", "LaplacianShot")}
    always = replace(learned, thresholds=(-1e9,) * len(learned.sizes))
    ours = {"learned": lambda logits, z: always(logits, z).posterior_mC.argmax(1)}
    print(f"Points ± standard error; {count} bursts, {STRANGERS * count} sets of strangers.\n")
    for row in gated.rows(learned, ours | chosen, fitted, test, count, STRANGERS * count):
        print(row, flush=True)


def odd(of: additions.Setting, kept: dict[str, np.ndarray]) -> None:
    """AUROC of shifted and unknown images against the test images; calibration and coverage."""
    labels = of.labels["calibration"]
    bank = of.f["train"]

    def looked(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near, cos = additions.nearest(f, bank, K)
        vote = np.zeros((len(f), of.old))
        np.add.at(vote, (np.arange(len(f))[:, None], of.labels["train"][near]), 1 / K)
        return 2 - 2 * cos.min(1), vote

    model = Calibration.fit(of.logits["calibration"], labels, looked(of.f["calibration"])[0])
    p = model.probabilities(of.logits["test"])
    before, after = softmax(of.logits["test"]), p
    truth = of.labels["test"]
    errors = [100 * calibration_error(q.max(1), q.argmax(1) == truth) for q in (before, after)]
    print(
        f"\nT = {model.temperature:.3f}; calibration error {errors[0]:.2f} % → {errors[1]:.2f} %\n"
    )
    print("| coverage asked | reached | classes in a set | answered | right of those |")
    print("| --- | --- | --- | --- | --- |")
    for coverage in (0.8, 0.9, 0.95, 0.99):
        inside = model.sets.sets(p, coverage)
        answered = inside.sum(1) == 1
        right = (p.argmax(1) == truth)[answered].mean()
        reached = inside[np.arange(len(truth)), truth].mean()
        figures = [reached, inside.sum(1).mean(), answered.mean(), right]
        print(f"| {coverage} | " + " | ".join(f"{v:.3f}" for v in figures) + " |")
    known = model.unusual(p, *looked(of.f["test"]))
    print("\n| images | softmax | distance | vote | accuracy |\n| --- | --- | --- | --- | --- |")
    shifted = [
        name
        for name in ("noise_15", "noise_40", "blur_1", "blur_2", "other")
        if f"{name}/x" in kept
    ]
    mean_D = kept["train/x"].mean(0)
    for name in ["new_test", *shifted]:
        f = additions.unit(kept[f"{name}/x"] - mean_D)
        found = model.unusual(model.probabilities(kept[f"{name}/logits"]), *looked(f))
        areas = []
        for kind in ("softmax_B", "distance_B", "vote_B"):
            both = np.concatenate([getattr(known, kind), getattr(found, kind)])
            areas.append(roc_auc_score(np.repeat([0, 1], [len(truth), len(f)]), both))
        right = ""
        if name.startswith(("noise", "blur")):
            right = f"{(kept[f'{name}/logits'].argmax(1) == truth[::2]).mean():.3f}"
        print(f"| {name} | " + " | ".join(f"{a:.3f}" for a in areas) + f" | {right} |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where features are kept")
    parser.add_argument(
        "--data", default="cifar10:cat,ship", help="cifar10:NEW,NEW or mini-imagenet"
    )
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS))
    parser.add_argument("--count", type=int, default=400, help="sets of each kind")
    parser.add_argument("--new", action="store_true", help="new classes without training")
    parser.add_argument("--sets", action="store_true", help="sets answered together")
    parser.add_argument("--gated", action="store_true", help="rivals behind the learned gate")
    parser.add_argument("--odd", action="store_true", help="confidence and unusual images")
    given = parser.parse_args()
    file = given.folder / f"{given.data.replace(':', '-').replace(',', '-')}.npz"
    kept = features.load(file, Path(os.environ["CNN2GNN_DATA"]), given.data)
    of = additions.Setting(kept)
    right = (of.logits["test"].argmax(1) == of.labels["test"]).mean()
    print(f"{given.data}: {of.old} old classes at {100 * right:.1f} %, {of.new} new\n", flush=True)
    if given.new:
        new_classes(of, given.draws, given.shots)
    if given.sets:
        together(of, given.count)
    if given.gated:
        behind_gate(of, given.count)
    if given.odd:
        odd(of, kept)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
