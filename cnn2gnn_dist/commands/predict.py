"""``cnn2gnn predict``: classify image files with a finished run, and show what they attach to."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnn2gnn_dist import settings
from cnn2gnn_dist.data.images.decode import CorruptSample, decode
from cnn2gnn_dist.data.images.image_files import find_images, printable, read_file
from cnn2gnn_dist.data.images.views import CLEAN, render
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.version import latest_version, open_version
from cnn2gnn_dist.log import complain, output, progress
from cnn2gnn_dist.pipeline.keys import as_made
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.neighbours.neighbourhood import Neighbourhood, Query
from cnn2gnn_dist.stages.shared.context import Context, RunPaths, chunks, load_manifest
from cnn2gnn_dist.stages.shared.networks import build_student, check_built_on, load_model

_log = logging.getLogger(__name__)

BATCH = 64
SHOWN_NEIGHBOURS = 5


def command(run: Path, images: list[str], *, top: int, as_json: bool) -> int:
    """Print classes and neighbors of each image; returns 1 if some could not be read.

    Args:
        run: folder of a finished run; it may have been moved.
        images: files and folders.
        top: classes shown for each image.
        as_json: one JSON object per line instead of text.

    Raises:
        UserError: no finished run, a folder without images, ``top`` below 1.
    """
    if top < 1:
        raise UserError(f"no classes to show: {top}", where="--top", remedy="--top 1 or more")
    predictor = Predictor(run)
    files = list(_files(images))
    if predictor.context.config.graph.scope == "batch":
        _log.warning(
            f"graph.scope=batch: up to {BATCH} images are classified together and are "
            "each other's neighbours, so an answer depends on its company"
        )
    failed = 0
    # Batches of nearly equal size: a last image alone would have no neighbors.
    size = -(-len(files) // max(1, -(-len(files) // BATCH)))
    for rows in progress(
        list(chunks(len(files), max(1, size))), "predict", disable=len(files) <= BATCH
    ):
        batch = [files[row] for row in rows]
        pixels, good = [], []
        for path in batch:
            try:
                pixels.append(render(predictor.context.views(), decode(read_file(path)), 0, CLEAN))
                good.append(path)
            except (CorruptSample, OSError) as error:
                complain(f"{printable(path)}: not readable as an image: {_why(error)}")
                failed += 1
        if good:
            for path, found in zip(good, predictor(np.stack(pixels), top), strict=True):
                name = printable(path)
                output(json.dumps({"image": name, **found}) if as_json else _line(name, found))
    return 1 if failed else 0


@dataclass
class _Model:
    student: Any
    around: Neighbourhood | None


class Predictor:
    """A finished run, ready to classify: the student, and the bank that images attach to.

    Raises:
        UserError: the folder is not a finished run.
    """

    def __init__(self, run: Path) -> None:
        self.context = _context(run)
        config, paths = self.context.config, self.context.paths
        self.train: Manifest = load_manifest(paths.train_manifest)
        self.names = self.train.classes
        student = build_student(config, self.train.num_classes, config.graph.scope)
        load_model(student, paths.root, "student")
        student.to(self.context.device).eval()
        around = None
        if config.graph.scope == "dataset":
            check_built_on(paths.root, "graph", "student")
            version = latest_version(paths.root / "graph")
            if version is None:
                raise _unfinished(run, "it has no graph", "graph")
            around = Neighbourhood(self.context, open_version(version), None)
        self._model = _Model(student, around)

    @torch.no_grad()
    def __call__(self, images_BHWC: np.ndarray, top: int) -> list[dict[str, Any]]:
        """Classes and neighbors of uint8 images [B, size, size, 3]."""
        images = torch.from_numpy(images_BHWC).to(self.context.device)
        around = self._model.around
        query = around.around_unseen(len(images)) if around else None
        output = self._model.student(images, query)
        values, classes = output.logits_BC.softmax(1).topk(min(top, len(self.names)))
        found = []
        for row in range(len(images)):
            pairs = zip(classes[row].tolist(), values[row].tolist(), strict=True)
            one: dict[str, Any] = {
                "classes": [{"class": self.names[c], "probability": round(v, 4)} for c, v in pairs]
            }
            if query is not None:
                one["neighbours"] = self._neighbours(query, output.weights_BF[row], row)
            found.append(one)
        return found

    def _neighbours(self, query: Query, weights_F: torch.Tensor, row: int) -> list[dict[str, Any]]:
        order = weights_F.argsort(descending=True, stable=True)[:SHOWN_NEIGHBOURS].tolist()
        found = []
        for slot in order:
            sample, weight = int(query.first_BF[row, slot]), float(weights_F[slot])
            if sample >= 0 and weight > 0:
                name = self.names[int(self.train.label_N[sample])]
                key = self.train.key(sample)
                found.append({"key": key, "class": name, "weight": round(weight, 4)})
        return found


def _context(run: Path) -> Context:
    file = run / "config.yaml"
    if not file.is_file():
        raise _unfinished(run, "it has no config.yaml", "run")
    try:
        config = settings.of_run(run)
    except UserError as error:
        if str(file) in error.where:  # not a config at all
            raise _unfinished(run, "its config.yaml is damaged", "run") from None
        raise UserError(
            f"this run's config is not of this version: {error.what}",
            where=f"{file}: {error.where}",
            remedy="the version of cnn2gnn-dist that made the run, or make the run again",
        ) from None
    root = Path(str(config.run.dir))
    if not (root / "student" / "done.json").is_file():
        raise _unfinished(run, "its student is not trained", "run")
    config = as_made(config, root, "student")
    device = "cuda" if torch.cuda.is_available() and config.device != "cpu" else "cpu"
    return Context(config, Ranks(), RunPaths(root), root, "", device, False)


def _unfinished(run: Path, what: str, stage: str) -> UserError:
    return UserError(
        f"this folder is no finished run: {what}",
        where=str(run),
        remedy=f"`cnn2gnn {stage}` with the run's config, or name another folder",
    )


def _files(images: list[str]) -> Iterator[Path]:
    """The named files, and the images in the named folders: those that ``pack`` would take."""
    for name in images:
        path = Path(name)
        if not os.path.isdir(path):  # False, not an error, for names that are too long
            yield path
            continue
        found = find_images(path)
        if found.left_out:
            complain(f"{printable(path)}: left out: {found.summary()}")
        if not found.images:
            raise UserError(
                "no image in this folder", where=printable(path), remedy="name image files"
            )
        for image in found.images:
            yield path / image


def _why(error: CorruptSample | OSError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def _line(name: str, found: dict[str, Any]) -> str:
    classes = "  ".join(f"{c['class']} {c['probability']:.1%}" for c in found["classes"])
    lines = [f"{name}  {classes}"]
    for near in found.get("neighbours", []):
        lines.append(f"    {near['weight']:.2f}  {near['class']}  {near['key']}")
    return "\n".join(lines)
