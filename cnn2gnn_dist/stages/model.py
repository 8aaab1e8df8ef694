"""Stage ``model``: the student, its memory and its card, as a self-contained folder; on demand the control."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from cnn2gnn_dist import __version__, durable, ledger, log
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.index.relabel import rows_named, unique_keys
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.shard_files import CacheSpec
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.memory_model import THUMBNAILS_UP_TO
from cnn2gnn_dist.graph.search.valid_nodes import valid_nodes_of
from cnn2gnn_dist.graph.version import latest_version, open_version
from cnn2gnn_dist.inference import scoring
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.folder.artefact import GraphSpec, ModelConfig, StudentSpec, ViewsSpec
from cnn2gnn_dist.inference.folder.card import card
from cnn2gnn_dist.inference.memory import edits, store
from cnn2gnn_dist.inference.memory.decisions import record as record_decisions
from cnn2gnn_dist.inference.memory.rewiring import without
from cnn2gnn_dist.inference.memory.rewriting import classes_by_key
from cnn2gnn_dist.inference.memory.store import NewRows
from cnn2gnn_dist.inference.memory.view import Memory
from cnn2gnn_dist.inference.network import Network
from cnn2gnn_dist.models.student import Scope, Student
from cnn2gnn_dist.report.labels import CONTROL
from cnn2gnn_dist.stages import decisions
from cnn2gnn_dist.stages.audit_digest import digest
from cnn2gnn_dist.stages.earlier_models import edits_set_aside, forgotten_of_run
from cnn2gnn_dist.stages.shared.context import Context, RunPaths, chunks, load_manifest
from cnn2gnn_dist.stages.shared.networks import (
    build_student,
    check_built_on,
    load_model,
    untrained_args,
)

READ = 256
"""Images read at a time."""
THUMBNAIL, QUALITY = 64, 85
FILES = (artefact.CONFIG, artefact.WEIGHTS, artefact.CARD, artefact.CHECKSUMS)
RECORDED = (artefact.CONFIG, artefact.WEIGHTS, artefact.CHECKSUMS)
"""What the stage's record names. Not memory and card: whoever edits them does not make the stage incomplete."""


def run(context: Context) -> list[Path]:
    """Write ``RUN/model``, and the first page of its audit into the report.

    An existing model whose training has changed, or whose memory has been edited, has been set aside before.
    """
    write_model(context, context.folder)
    context.say(f"the model is in {context.folder}")
    _warn_of_edits(context)
    if context.paths.results.is_file():
        found = digest(context)
        if isinstance(found, str):
            context.say(f"the report has no section on the training images: {found}")
        else:
            # Imports matplotlib, which rank 0 alone needs.
            from cnn2gnn_dist.report.page import add_audit

            train = load_manifest(context.paths.train_manifest)
            add_audit(context.paths.root, train.classes, found)
    return [context.folder / name for name in RECORDED]


def _warn_of_edits(context: Context) -> None:
    memory = context.folder / artefact.MEMORY
    if not (memory / store.HEAD).is_file():
        return
    folder, changes = edits_set_aside(context.paths.root, classes_by_key(Memory.open(memory)))
    if changes:
        context.warn(
            f"the memory of {folder} was edited; in comparison with the new one it has {changes}: "
            "repeat the edits that are still wanted"
        )


def write_model(
    context: Context,
    target: Path,
    *,
    thumbnails: int | None = None,
    control: bool = False,
    forgotten: Sequence[str] = (),
) -> None:
    """Write the model of a run whose student (and graph) is finished, or its control.

    Images that the memory of one of the run's models has forgotten are left out.

    Args:
        context: of the run.
        target: folder; files of the pipeline in it stay, anything else is replaced.
        thumbnails: side in pixels, 0: none; None: as the config says.
        control: write the control instead: no graph and no memory.
        forgotten: keys of further images to leave out.

    Raises:
        UserError: what is to be written is not finished; the disk is full.
    """
    config, paths = context.config, context.paths
    train = load_manifest(paths.train_manifest)
    scope: Scope = "none" if control else config.graph.scope
    student = build_student(config, train.num_classes, scope, initial=False)
    load_model(student, paths.root, "control" if control else "student")
    left_out = list(dict.fromkeys([*forgotten, *forgotten_of_run(paths.root)]))
    decided = decisions.of_run(context)
    if decided is None:
        context.warn(
            "the relabel list that this run was trained with is gone: an audit of its model will not include it"
        )
    with durable.disk_full_reported(target):
        target.mkdir(parents=True, exist_ok=True)
        _clear(target, left_out)
        save_file(
            {name: value.contiguous() for name, value in student.state_dict().items()},
            target / artefact.WEIGHTS,
        )
        results = _results_of_control(paths) if control else _results(paths.results)
        made = _config(config, scope, train, results, decided)
        durable.write_text(target / artefact.CONFIG, made.model_dump_json(indent=1))
        # safetensors lets only the owner read its files; whoever may read the folder should be able to read all of it.
        shutil.copymode(target / artefact.CONFIG, target / artefact.WEIGHTS)
        rows = 0
        if scope == "dataset":
            rows = _memory(context, train, target / artefact.MEMORY, thumbnails, left_out)
            if lines := decisions.lines(context, decided or {}, left_out):
                record_decisions(target / artefact.MEMORY, lines)
        durable.write_text(target / artefact.CARD, card(made, results, rows))
        _calibration(context, student, made, target, left_out)
        artefact.write_checksums(target)


def _clear(target: Path, forgotten: Sequence[str]) -> None:
    """Remove an unfinished model; records of the pipeline stay, and so does the list of forgotten images."""
    memory = target / artefact.MEMORY
    if forgotten:  # before anything is removed: a kill must not lose it
        memory.mkdir(exist_ok=True)
        edits.record_forgotten(memory, forgotten)
    for name in (*FILES, artefact.CALIBRATION, scoring.FITTED):
        (target / name).unlink(missing_ok=True)
    for path in memory.iterdir() if memory.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != store.FORGOTTEN:
            path.unlink()
    if not forgotten:
        shutil.rmtree(memory, ignore_errors=True)


def _config(
    config: Config,
    scope: Scope,
    train: Manifest,
    results: dict[str, Any] | None,
    decided: Sized | None,
) -> ModelConfig:
    s, g, v = config.student, config.graph, config.views
    known = {} if decided is None else {artefact.RELABELLED: len(decided)}
    return ModelConfig(
        version=__version__,
        scope=scope,
        student=StudentSpec(
            stem=s.stem,
            stem_args=untrained_args(config),
            dim=s.dim,
            hidden=s.hidden,
            label_dim=s.label_dim,
            graph_dim=g.dim,
        ),
        graph=GraphSpec(
            neighbours=g.neighbours, fanout=g.sampling.fanouts[0], candidates=g.candidates
        ),
        views=ViewsSpec(size=v.size, resize=v.resize, mean=v.mean, std=v.std),
        label_names=list(train.classes),
        source={
            "name": f"{config.name} (control)" if scope == "none" else config.name,
            "seed": config.seed,
            "train_images": len(train),
            **known,
            "teacher": config.teacher.arch if config.targets.logits is None else "ready logits",
            "torch": torch.__version__,
            "accuracy": (
                None
                if results is None
                else results[CONTROL if scope == "none" else "student"]["accuracy"]
            ),
        },
    )


def _results(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _results_of_control(paths: RunPaths) -> dict[str, Any] | None:
    """The results, if they are those of the control that is there now: it may have been trained after them."""
    evaluated = ledger.finished(paths.root / "evaluation")
    trained = ledger.finished(paths.root / "control")
    if evaluated is None or trained is None or evaluated.inputs.get("control") != trained.digest:
        return None
    return _results(paths.results)


def _memory(
    context: Context,
    train: Manifest,
    target: Path,
    thumbnails: int | None,
    forgotten: Sequence[str],
) -> int:
    """Write the memory from the last graph, without forgotten images; return the number of its rows."""
    root = context.paths.root
    check_built_on(root, "graph", "student")
    found = latest_version(root / "graph")
    if found is None:
        raise UserError(
            "the run has no graph", where=str(root), remedy="run `cnn2gnn graph` with its config"
        )
    version = open_version(found)
    corrupt = np.ones(len(train), bool)
    corrupt[valid_nodes_of(version.z)] = False
    side = _thumbnail_side(context.config, len(train)) if thumbnails is None else thumbnails
    gone = rows_named(train, forgotten)
    rows = NewRows(
        x=version.x,
        z=version.z,
        labels=version.labels,
        candidates=version.candidates,
        keys=unique_keys(train),
        sources=[os.path.basename(train.shards[shard].path) for shard in train.shard_N.tolist()],
        thumbnails=_thumbnails(context, train, corrupt | gone, side),
    )
    if gone.any():
        context.say(
            f"{gone.sum():,} images that the memory of this model has forgotten are left out"
        )
        rows = _without(rows, ~corrupt, gone)
    edits.create(
        target,
        rows,
        train.classes,
        f"export of the run {context.config.name}",
        np.flatnonzero(corrupt[~gone]),
    )
    return len(train) - int((corrupt | gone).sum())


def _without(rows: NewRows, live: np.ndarray, gone: np.ndarray) -> NewRows:
    """Rows with candidates among those that stay; see ``rewiring.without``."""
    assert rows.candidates is not None
    kept = np.flatnonzero(~gone)
    return NewRows(
        x=rows.x[kept],
        z=rows.z[kept],
        labels=rows.labels[kept],
        candidates=without(rows.candidates, rows.z, live, gone),
        keys=[rows.keys[row] for row in kept.tolist()],
        sources=[rows.sources[row] for row in kept.tolist()],
        thumbnails=[rows.thumbnails[row] for row in kept.tolist()],
    )


def _thumbnail_side(config: Config, images: int) -> int:
    if config.model.thumbnails is not None:
        return config.model.thumbnails
    return THUMBNAIL if images <= THUMBNAILS_UP_TO else 0


def _thumbnails(
    context: Context, train: Manifest, corrupt: np.ndarray, side: int
) -> list[bytes | None]:
    if not side:
        return [None] * len(train)
    from PIL import Image

    views = ViewSpec(kind="none", size=side, flip=False)
    reader = _reader(context, context.paths.train_manifest, views)
    found: list[bytes | None] = []
    try:
        for rows in log.progress(list(chunks(len(train), READ)), desc="thumbnails", unit="batch"):
            batch = reader.read(Request(np.arange(rows.start, rows.stop), CLEAN))
            for row, image in enumerate(batch.images):
                if corrupt[rows[row]] or not batch.valid[row]:
                    found.append(None)
                    continue
                data = io.BytesIO()
                Image.fromarray(image).save(data, "JPEG", quality=QUALITY)
                found.append(data.getvalue())
    finally:
        reader.close()
    return found


def _reader(context: Context, manifest: Path, views: ViewSpec) -> Reader:
    stream = context.config.stream
    return Reader(
        ReaderSpec(str(manifest), views, 0, CacheSpec(stream.cache_dir, stream.cache_bytes))
    )


@dataclass
class _Columns:
    """Columns of ``calibration.npz``, batch by batch."""

    parts: dict[str, list[np.ndarray]]

    def add(self, **columns: np.ndarray) -> None:
        for name, column in columns.items():
            self.parts.setdefault(name, []).append(column)

    def joined(self) -> dict[str, np.ndarray]:
        return {name: np.concatenate(parts) for name, parts in self.parts.items()}


def _calibration(
    context: Context,
    student: Student,
    made: ModelConfig,
    target: Path,
    forgotten: Sequence[str],
) -> None:
    """Run the model over the images set apart (``data.calibration``) and not forgotten, as it will run in use."""
    path = context.paths.calibration_manifest
    if not path.is_file() or not len(apart := Manifest.load(path)):
        return
    network = Network(made, student.state_dict(), context.device)
    memory = Memory.open(target / artefact.MEMORY) if made.scope == "dataset" else None
    columns = _Columns({})
    train = load_manifest(context.paths.train_manifest)
    in_use = train.keys.to_pylist()
    keys = np.array(unique_keys(apart, beside=in_use))
    kept = ~rows_named(apart, forgotten, beside=in_use)
    for images, label, rows in _batches(context, path, kept):
        out = network(images, memory)
        columns.add(
            logits=out.logits, self_logits=out.self_logits, x=out.x, z=out.z, label=label,
            near_distance=out.distances, near_weight=out.weights, key=keys[rows],
        )  # fmt: skip
        if memory is not None:
            near = np.where(out.rows >= 0, memory.labels[out.rows.clip(min=0)], -1)
            columns.add(near_label=near.astype(np.int32))
    if columns.parts:
        np.savez(target / artefact.CALIBRATION, **columns.joined())  # type: ignore[arg-type]
        scoring.write(target)


def _batches(
    context: Context, manifest: Path, kept: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images uint8 [b, S, S, 3], labels and rows int64 [b], of the rows in ``kept`` (bool); a seeded random order.

    Corrupt images are left out. In ``batch`` scope the images of a batch influence each other: batches of one class
    would score too well.
    """
    views = context.views()
    reader = _reader(context, manifest, views)
    order = np.random.default_rng(context.config.seed).permutation(len(kept))
    order = order[kept[order]]
    try:
        for rows in chunks(len(order), 64):
            ids = order[rows.start : rows.stop]
            batch = reader.read(Request(ids, CLEAN))
            if batch.valid.any():
                yield batch.images[batch.valid], batch.labels[batch.valid], ids[batch.valid]
    finally:
        reader.close()
