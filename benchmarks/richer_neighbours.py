"""Would another graph beat the head at full labels? Neighbors by other features, and what else they could tell.

    python benchmarks/richer_neighbours.py RUN [RUN ...]         (finished runs, as of the preset cifar10)

The reference is the student's self path. To its log-probabilities are added beta times the logarithm of what an
image's k nearest training images say on average (weights: softmax of cosine / tau):

    neighbors by                                   what they say
    student's features                             their labels, or their soft targets (the teacher's)
    teacher's features, reached by a linear map    the same: ridge regression from the student's features of the
                                                   training images to the teacher's
    teacher's features of the image itself         the same; for comparison only: it takes the teacher at inference

k, tau and beta (which may be 0) are those of the smallest loss on the calibration images, which neither network was
trained on. Two more rows add a linear head to the log-probabilities, trained on the calibration images (its penalty,
and k and tau, by cross-validation there): over the neighbors' mean teacher features, as retrieval-augmented
classifiers do, and over the image's own student features, which tells what such a head is worth without neighbors.
Printed per run: accuracy on the test images and the paired difference from the self path with its standard error; for
several runs (seeds), mean and deviation of the differences.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cnn2gnn_dist import settings
from cnn2gnn_dist.data.images.views import CLEAN
from cnn2gnn_dist.data.reading.reader import Request
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.compared_models import self_path
from cnn2gnn_dist.stages.shared.context import Context, RunPaths, load_manifest
from cnn2gnn_dist.stages.shared.networks import Teacher, build_student, load_model

BATCH, CHUNK, EPS = 500, 1000, 1e-3
NEIGHBOURS, TAUS, BETAS = (5, 10, 20, 50), (0.02, 0.05, 0.1, 0.2), (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
PENALTIES, FOLDS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0), 5
Features = dict[str, Tensor]


def features(run: Path, part: str) -> Features:
    """student [N, D], teacher [N, T], self path's logits, teacher's logits, labels of a part's images."""
    config = settings.load(str(run / "config.yaml"), ["stream.backend=local"])
    context = Context(config, Ranks(), RunPaths(run), run, "", "cpu", False)
    manifest = getattr(context.paths, f"{part}_manifest")
    rows = load_manifest(manifest)
    student = build_student(config, rows.num_classes, config.graph.scope).eval()
    teacher = Teacher(config, rows.num_classes, initial=False).eval()
    for model, stage in ((student, "student"), (teacher, "teacher")):
        load_model(model, run, stage)
        model.compute_dtype = context.compute_dtype(stage)
    seen: list[Tensor] = []
    last = [module for module in teacher.modules() if isinstance(module, nn.Linear)][-1]
    last.register_forward_pre_hook(lambda _, given: seen.append(given[0].float()))
    found: dict[str, list[Tensor]] = {}
    places = np.array_split(np.arange(len(rows)), -(-len(rows) // BATCH))
    with context.stream(manifest, "features") as stream, torch.no_grad():
        for batch in stream.batches(Request(ids, CLEAN) for ids in places):
            images = torch.from_numpy(batch.images)
            made = {
                "student": student.embed(images)[0],
                "self": self_path_of(student, images),
                "said": teacher(images),
                "labels": torch.from_numpy(batch.labels),
            }
            for name, value in (made | {"teacher": seen.pop()}).items():
                found.setdefault(name, []).append(value)
    joined = {name: torch.cat(parts) for name, parts in found.items()}
    return {n: v if n == "labels" else v.float() for n, v in joined.items()}


def self_path_of(student: nn.Module, images: Tensor) -> Tensor:
    """Its logits in the precision of the run."""
    with student.autocast(images.device):
        return self_path(student, images)


def said_by_neighbours(
    query_QD: Tensor, bank_ND: Tensor, values: dict[str, Tensor]
) -> Iterator[tuple[tuple[int, float, str], Tensor]]:
    """(k, tau, what) → what the neighbors of each query say [Q, C], for all of the grid."""
    query_QD, bank_ND = (nn.functional.normalize(x, dim=1) for x in (query_QD, bank_ND))
    near = [(part @ bank_ND.T).topk(max(NEIGHBOURS), 1) for part in query_QD.split(CHUNK)]
    similar_QK = torch.cat([one.values for one in near])
    rows_QK = torch.cat([one.indices for one in near])
    for k, tau in product(NEIGHBOURS, TAUS):
        weight_QK = (similar_QK[:, :k] / tau).softmax(1)
        for what, value_NC in values.items():
            yield (k, tau, what), (weight_QK.unsqueeze(1) @ value_NC[rows_QK[:, :k]]).squeeze(1)


def right_with(
    queries: dict[str, Tensor], bank_ND: Tensor, calibration: Features, test: Features,
    values: dict[str, Tensor],
) -> dict[str, tuple[tuple[float, ...], Tensor]]:  # fmt: skip
    """What the neighbors say → the choice (k, tau, beta), and which test images are right with it."""
    best: dict[str, tuple[float, tuple[float, ...]]] = {}
    for (k, tau, what), said_QC in said_by_neighbours(queries["calibration"], bank_ND, values):
        for beta in BETAS:
            scores = calibration["self"].log_softmax(1) + beta * (said_QC + EPS).log()
            loss = float(nn.functional.cross_entropy(scores, calibration["labels"]))
            if what not in best or loss < best[what][0]:
                best[what] = (loss, (k, tau, beta))
    found = {}
    for (k, tau, what), said_QC in said_by_neighbours(queries["test"], bank_ND, values):
        if (k, tau) == best[what][1][:2]:
            scores = test["self"].log_softmax(1) + best[what][1][2] * (said_QC + EPS).log()
            found[what] = (best[what][1], scores.argmax(1) == test["labels"])
    return found


def linear_head(
    offset_NC: Tensor, input_ND: Tensor, label_N: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """Weights [D, C] and biases [C] that make softmax(offset + input @ weights + biases) fit the labels.

    Args:
        offset_NC: log-probabilities that are corrected.
        input_ND: features, of unit scale.
        label_N: the classes.
        penalty: that times the sum of the squared weights is added to the mean cross-entropy.
    """
    weight_DC = torch.zeros(input_ND.shape[1], offset_NC.shape[1], requires_grad=True)
    bias_C = torch.zeros(offset_NC.shape[1], requires_grad=True)
    search = torch.optim.LBFGS([weight_DC, bias_C], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        scores = offset_NC + input_ND @ weight_DC + bias_C
        made = nn.functional.cross_entropy(scores, label_N) + penalty * weight_DC.square().sum()
        made.backward()
        return made

    search.step(loss)
    return weight_DC.detach(), bias_C.detach()


def right_with_a_head(
    inputs: Iterator[tuple[str, Tensor, Tensor]], calibration: Features, test: Features
) -> tuple[str, Tensor]:
    """The choice, and which test images are right with a linear head over the best of several inputs.

    Args:
        inputs: name, and features of the calibration and of the test images.
        calibration, test: with the self path's logits, and labels.
    """
    known_NC, asked_QC = (part["self"].log_softmax(1) for part in (calibration, test))
    label_N = calibration["labels"]
    fold_N = torch.arange(len(label_N)) % FOLDS  # images of a manifest are in an arbitrary order
    best: tuple[float, str, Tensor] | None = None
    for name, known_ND, asked_QD in inputs:
        centre, scale = known_ND.mean(0), known_ND.std() * known_ND.shape[1] ** 0.5
        known_ND, asked_QD = ((one - centre) / scale for one in (known_ND, asked_QD))
        for penalty in PENALTIES:
            scores_NC = torch.empty_like(known_NC)
            for fold in range(FOLDS):
                rest, here = fold_N != fold, fold_N == fold
                weight, bias = linear_head(known_NC[rest], known_ND[rest], label_N[rest], penalty)
                scores_NC[here] = known_NC[here] + known_ND[here] @ weight + bias
            loss = float(nn.functional.cross_entropy(scores_NC, label_N))
            if best is None or loss < best[0]:
                weight, bias = linear_head(known_NC, known_ND, label_N, penalty)
                answer_Q = (asked_QC + asked_QD @ weight + bias).argmax(1)
                best = loss, f"{name}penalty {penalty:g}", answer_Q == test["labels"]
    assert best is not None
    return best[1:]


def teachers_of_neighbours(
    train: Features, calibration: Features, test: Features
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """For all of the grid: the mean teacher features of the neighbors by the student's features."""
    values = {"": train["teacher"]}
    made = [
        said_by_neighbours(part["student"], train["student"], values)
        for part in (calibration, test)
    ]
    for ((k, tau, _), known_ND), (_, asked_QD) in zip(*made, strict=True):
        yield f"k {k}, tau {tau:g}, ", known_ND, asked_QD


def one_run(run: Path) -> dict[str, tuple[float, float, float, str]]:
    """Row → accuracy, difference from the self path and its standard error, choice."""
    train, calibration, test = (features(run, part) for part in ("train", "calibration", "test"))
    classes = train["said"].shape[1]
    values = {
        "labels": nn.functional.one_hot(train["labels"], classes).float(),
        "soft targets": train["said"].softmax(1),
    }
    centre = train["student"].mean(0)
    inputs = train["student"] - centre
    gram = inputs.T @ inputs + 1e-3 * len(inputs) * torch.eye(inputs.shape[1])
    to_teacher = torch.linalg.solve(gram, inputs.T @ (train["teacher"] - train["teacher"].mean(0)))
    parts = {"calibration": calibration, "test": test}
    kinds = {
        "student's features": ({p: f["student"] for p, f in parts.items()}, train["student"]),
        "teacher's features, reached": (
            {p: (f["student"] - centre) @ to_teacher for p, f in parts.items()},
            train["teacher"] - train["teacher"].mean(0),
        ),
        "teacher's features of the image": (
            {p: f["teacher"] for p, f in parts.items()},
            train["teacher"],
        ),
    }
    own = test["self"].argmax(1) == test["labels"]

    def row(right: Tensor, choice: str) -> tuple[float, float, float, str]:
        gain = right.float() - own.float()
        error = float(gain.std()) / len(gain) ** 0.5
        return float(right.float().mean()), float(gain.mean()), error, choice

    rows = {"self path": row(own, "")}
    for kind, (queries, bank) in kinds.items():
        for what, (chosen, right) in right_with(queries, bank, calibration, test, values).items():
            rows[f"{kind}: {what}"] = row(right, "k {:.0f}, tau {:g}, beta {:g}".format(*chosen))
    heads = {
        "student's features: teacher's features, by a head": teachers_of_neighbours(
            train, calibration, test
        ),
        "no neighbors: the same head over the student's features": iter(
            [("", calibration["student"], test["student"])]
        ),
    }
    for name, given in heads.items():
        choice, right = right_with_a_head(given, calibration, test)
        rows[name] = row(right, choice)
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(2)
    found = [one_run(run) for run in given.runs]
    print(
        "| neighbors by: they say | accuracy | minus self path | chosen |\n| --- | --- | --- | --- |"
    )
    for name in found[0]:
        rows = [one[name] for one in found]
        accuracy, gain = (100 * np.mean([row[place] for row in rows]) for place in (0, 1))
        spread = np.std([row[1] for row in rows], ddof=1) if len(rows) > 1 else rows[0][2]
        chosen = "; ".join(row[3] for row in rows)
        print(f"| {name} | {accuracy:.2f} | {gain:+.2f} ± {100 * spread:.2f} | {chosen} |")


if __name__ == "__main__":
    main()
