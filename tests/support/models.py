"""A small model in a folder: random weights, a memory of random images, no run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from cnn2gnn_dist.graph.search.knn import Index
from cnn2gnn_dist.inference import network, scoring
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.folder.artefact import GraphSpec, ModelConfig, StudentSpec, ViewsSpec
from cnn2gnn_dist.inference.memory import edits
from cnn2gnn_dist.inference.memory.store import NewRows
from tests.support.shards import encode_image

SIZE, WIDTH, NEAR, SLOTS = 16, 8, 3, 5


def config(scope: str = "dataset", classes: int = 3) -> ModelConfig:
    return ModelConfig(
        version="0",
        scope=scope,
        student=StudentSpec(
            stem="resnet_tiny",
            stem_args={"widths": [4, 8]},
            dim=12,
            hidden=10,
            label_dim=4,
            graph_dim=WIDTH,
        ),
        graph=GraphSpec(neighbours=NEAR, fanout=SLOTS, candidates=6),
        views=ViewsSpec(size=SIZE, resize=1.0, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)),
        label_names=[f"class {c}" for c in range(classes)],
        source={"name": "small", "train_images": 40},
    )


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """uint8 [count, SIZE, SIZE, 3]: coarse colored noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), np.uint8)
    return coarse.repeat(SIZE // 4, 1).repeat(SIZE // 4, 2)


def random_weights(made: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a student whose graph has an effect (its gates would start at 0)."""
    torch.manual_seed(seed)
    student = network.build(made)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if "gate" in name:
                value.fill_(0.7)
        student.train()
        for _ in range(4):  # for BatchNorm's statistics
            student.embed(torch.from_numpy(pictures(32, seed=1)))
    return {name: value.contiguous() for name, value in student.state_dict().items()}


def table_of(z_Nd: np.ndarray, width: int) -> np.ndarray:
    found = np.full((len(z_Nd), width), -1, np.int32)
    some = min(width, len(z_Nd) - 1)
    found[:, :some] = Index(z_Nd).search(z_Nd, some, exclude=np.arange(len(z_Nd)))[0]
    return found


def rows_of(made: network.Network, images: np.ndarray, labels: np.ndarray, keys: list[str]):
    x, z = made.embed(images)
    return NewRows(
        x=x.astype(np.float16),
        z=z,
        labels=labels.astype(np.int32),
        candidates=table_of(z, made.config.graph.candidates),
        keys=keys,
        sources=["train-000.tar"] * len(images),
        thumbnails=[encode_image(image) for image in images],
    )


def write_model(
    folder: Path, scope: str = "dataset", images: int = 40, classes: int = 3, seed: int = 0
) -> Path:
    """Write a model; image i of its memory is ``pictures(images)[i]``, with key ``img-i``."""
    made = config(scope, classes)
    weights = random_weights(made, seed)
    folder.mkdir(parents=True)
    save_file(weights, folder / artefact.WEIGHTS)
    (folder / artefact.CONFIG).write_text(made.model_dump_json())
    (folder / artefact.CARD).write_text("# small\n")
    if scope == "dataset":
        labels = np.arange(images) % classes
        rows = rows_of(
            network.Network(made, weights, "cpu"),
            pictures(images),
            labels,
            [f"img-{i}" for i in range(images)],
        )
        edits.create(folder / "memory", rows, made.label_names, "test", np.empty(0, np.int64))
    artefact.write_checksums(folder)
    return folder


def calibrate(folder, count=60):
    """Give a model calibration images, most of whose labels are the model's own answers."""
    model = Classifier.open(folder, device="cpu")
    out = model.network(pictures(count, seed=3), model.memory)
    rng = np.random.default_rng(0)
    label = np.where(rng.random(count) < 0.8, out.logits.argmax(1), rng.integers(0, 3, count))
    np.savez(
        folder / artefact.CALIBRATION, logits=out.logits, self_logits=out.self_logits, x=out.x,
        z=out.z, label=label, near_distance=out.distances, near_weight=out.weights,
        near_label=np.zeros_like(out.rows), key=np.array([f"apart-{i}" for i in range(count)]),
    )  # fmt: skip
    scoring.write(folder)
    artefact.write_checksums(folder)
    return Classifier.open(folder, device="cpu")
