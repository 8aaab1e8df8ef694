"""A model as two graphs and arrays, for use without this package.

    encoder    images uint8 [B, S, S, 3] → x [B, D], z [B, d], self_logits [B, C]
    head       x, z, and of the F nearest rows of the memory near_x [B, F, D], near_z [B, F, d],
               near_mean [B, F, D], near_label [B, F] → logits [B, C], weights [B, F]
    memory.npz x, z, labels and mean (m_j = Σ_l p_jl x_l over the candidates l) of all rows
    meta.json  label_names, size, resize, fanout, temperature

The search in between is up to the user (``examples/onnx_predict.py`` uses faiss). The formats of the graphs
are those of ``onnx_export`` and ``torch_export``; both are compared with the model when they are written.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from cnn2gnn_dist import durable
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.inference.network import build
from cnn2gnn_dist.models.block import Block, nearest
from cnn2gnn_dist.models.graph_head import squared_distances
from cnn2gnn_dist.models.student import Student

_log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""Largest difference of a logit between a graph and the model, relative to the largest logit."""
ENCODED = ["x", "z", "self_logits"]
GATHERED = ["x", "z", "near_x", "near_z", "near_mean", "near_label"]
Tensors: TypeAlias = tuple[Tensor, ...]
Names: TypeAlias = list[str]
_ROWS = 4096
_TRIED = 5


class Encoder(nn.Module):
    """Images → features, projection, logits of the self path."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.student = student

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [B, S, S, 3] → x [B, D], z [B, d], self_logits [B, C]."""
        x, z = self.student.embed(images)
        return x, z, self.student.gnn(x)[1]


class Head(nn.Module):
    """Features and the nearest rows of the memory → logits and weights."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.gnn, self.k = student.gnn, student.k

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        near_x: Tensor,
        near_z: Tensor,
        near_mean: Tensor,
        near_label: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Shapes as in the module's docstring; float32, labels int64 (-1: a class without a logit)."""
        # The rows come nearest first, so no sort is needed: ONNX has no stable one.
        weights = weights_of_sorted(squared_distances(z, near_z), self.k)
        present = torch.ones_like(near_label, dtype=torch.bool)
        block = Block(
            present_BF=present,
            row_of_BF=None,
            x_UD=near_x.flatten(0, 1),
            z_Ud=near_z.flatten(0, 1),
            labels_U=near_label.flatten(),
            mean_UD=near_mean.flatten(0, 1),
            back_BF=torch.zeros_like(weights),
            seed_x_BD=torch.zeros_like(x),
        )
        logits, _ = self.gnn(x, weights, block)
        return logits, weights


def weights_of_sorted(d_BF: Tensor, k: int) -> Tensor:
    """``adaptive_neighbours`` of rows of ascending distances: p, float32 [B, F].

    k is at most one less than the number of columns. Rows of equal distances are uniform over the first k.
    """
    if d_BF.shape[1] == 1:
        return torch.ones_like(d_BF)
    k = min(k, d_BF.shape[1] - 1)
    border_B1 = d_BF[:, k : k + 1]
    gaps_BF = (border_B1 - d_BF).clamp(min=0)
    scale_B1 = gaps_BF.sum(1, keepdim=True)
    flat_B1 = scale_B1 <= 8 * torch.finfo(torch.float32).eps * k * border_B1.abs()
    first_F = (torch.arange(d_BF.shape[1]) < k).to(d_BF.dtype) / k
    return torch.where(flat_B1, first_F, gaps_BF / torch.where(flat_B1, 1.0, scale_B1))


class Format(Protocol):
    """A format of graphs."""

    suffix: str
    runtime: str
    """What runs such a graph, for error messages."""
    packages: str
    """Packages on which it depends whether a graph answers as the model does."""

    def write(
        self, module: nn.Module, example: Tensors, path: Path, inputs: Names, outputs: Names
    ) -> None:
        """Write a module with a dynamic batch."""

    def run(self, path: Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run a graph; ``feeds``: arrays by input, in the order of the inputs."""


def export(model: Classifier, folder: Path, kind: Format) -> None:
    """Write the graphs and arrays of a model, and compare them with the model.

    Args:
        model: of scope dataset or none.
        folder: to write; it appears once it is complete.
        kind: format of the graphs.

    Raises:
        UserError: the scope is batch; the folder exists, or can't be written; the disk is full; a package of
            the format is not installed; the graphs' answers differ from the model's.
    """
    _check(model, folder)
    durable.create_folder(folder.parent)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with durable.disk_full_reported(folder):
            temporary.mkdir()
            _write(model, temporary, kind)
            temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(model: Classifier, folder: Path, kind: Format) -> None:
    student = build(model.spec).eval()
    student.load_state_dict(model.network.student.state_dict())
    encoder, head = (folder / f"{name}{kind.suffix}" for name in ("encoder", "head"))
    with torch.no_grad():
        kind.write(Encoder(student).eval(), (_images(model, 2),), encoder, ["images"], ENCODED)
    memory = model.memory
    if memory is not None and model.spec.scope == "dataset":
        arrays = memory_arrays(memory, student.k)
        np.savez(folder / "memory.npz", **arrays)  # type: ignore[arg-type]
        example = _example(model, arrays)
        with torch.no_grad():
            kind.write(Head(student).eval(), example, head, GATHERED, ["logits", "weights"])
    calibration = model.scoring.calibration
    meta = {
        "label_names": model.spec.label_names,
        "size": model.spec.views.size,
        "resize": model.spec.views.resize,
        "fanout": model.spec.graph.fanout,
        "temperature": 1.0 if calibration is None else calibration.temperature,
    }
    durable.write_text(folder / "meta.json", json.dumps(meta, indent=1))
    _compare(model, folder, encoder, head, kind)


def dynamic_batch(inputs: int) -> Any:
    """``dynamic_shapes`` of ``torch.export``: the first dimension of every input is the batch."""
    batch = torch.export.Dim("batch", min=1)
    return tuple({0: batch} for _ in range(inputs))


def memory_arrays(memory: Memory, k: int) -> dict[str, np.ndarray]:
    """x, z, labels and second-hop means of the live rows of a memory, for a search over them.

    Args:
        memory: the version.
        k: neighbors with a weight above zero.
    """
    ids = memory.live_ids
    x, z = memory.x(ids).astype(np.float32), memory.z(ids)
    place = np.full(memory.rows, -1, np.int64)
    place[ids] = np.arange(len(ids))
    mean = np.empty_like(x)
    for start in range(0, len(ids), _ROWS):
        rows = slice(start, start + _ROWS)
        table = memory.candidates(ids[rows]).astype(np.int64)
        near = np.where(table >= 0, place[table.clip(min=0)], -1)
        present = torch.from_numpy(near >= 0)
        there = near.clip(min=0)
        apart = torch.from_numpy(np.square(z[there] - z[rows][:, None]).sum(-1))
        p = nearest(apart, k, present).p_BM.numpy()
        mean[rows] = np.einsum("nm,nmd->nd", p, x[there])
    labels = memory.labels[ids].astype(np.int64)
    labels[labels >= memory.trained] = -1
    return {"x": x, "z": z, "labels": labels, "mean": mean}


def _check(model: Classifier, folder: Path) -> None:
    if model.spec.scope == "batch":
        raise UserError(
            "a model of graph.scope=batch answers from the other images of a batch",
            where=str(model.folder),
            remedy="export a model of scope dataset or none",
        )
    if model.memory is not None and not len(model.memory):
        raise UserError(
            "the memory is empty", where=str(model.folder), remedy="add images to it first"
        )
    if model.memory is not None and model.memory.new_classes is not None:
        _log.warning(
            "new classes of the memory are not in the graphs: what is exported answers with the "
            f"{len(model.spec.label_names)} trained ones"
        )
    if folder.exists():
        raise UserError(
            "something already exists here",
            where=str(folder),
            remedy="name a folder that does not exist",
        )


def _images(model: Classifier, count: int) -> Tensor:
    size = model.spec.views.size
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, size, size, 3), np.uint8))


def _example(
    model: Classifier, arrays: dict[str, np.ndarray], count: int = 2
) -> tuple[Tensor, ...]:
    out = model.network(_images(model, count).numpy(), None)
    fanout = min(model.spec.graph.fanout, len(arrays["z"]))
    near = np.stack([np.argsort(np.square(arrays["z"] - z).sum(1))[:fanout] for z in out.z])
    columns = [arrays[name][near] for name in ("x", "z", "mean", "labels")]
    return tuple(torch.from_numpy(column) for column in (out.x, out.z, *columns))


def _compare(model: Classifier, folder: Path, encoder: Path, head: Path, kind: Format) -> None:
    """Compare the graphs with the model.

    Raises:
        UserError: they differ.
    """
    images = _images(model, _TRIED).numpy()
    ours = model.network(images, model.memory)
    x, z, logits = kind.run(encoder, {"images": images})
    expected = ours.self_logits
    if head.is_file():
        with np.load(folder / "memory.npz") as kept:
            arrays = dict(kept)
        assert model.memory is not None
        place = np.searchsorted(model.memory.live_ids, ours.rows)
        near = {f"near_{name}": arrays[name][place] for name in ("x", "z", "mean")}
        feeds = {"x": x, "z": z, **near, "near_label": arrays["labels"][place]}
        logits, expected = kind.run(head, feeds)[0], ours.logits
    apart = float(np.abs(logits - expected).max() / max(np.abs(expected).max(), 1e-6))
    if not apart <= TOLERANCE:
        raise UserError(
            f"{kind.runtime}'s logits differ from torch's by {apart:.1e} of the largest",
            where=str(folder),
            remedy=f"export with the pinned versions of {kind.packages}",
        )
