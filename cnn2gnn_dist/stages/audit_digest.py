"""The audit's first page, for the report: what is most likely wrong with the training images of a run.

Read from the model that the run has just written: its memory, and the held-out images embedded by it. The
complete audit, with all entries and forms for decisions, is ``cnn2gnn audit``.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np

from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.shard_files import CacheSpec
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.audit import look_alike
from cnn2gnn_dist.inference.audit.files import evidence
from cnn2gnn_dist.inference.audit.findings import Findings, HeldOut, TrainingSet, audit
from cnn2gnn_dist.inference.audit.memory import Thumbnails, training_set
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.report.audit_page import jpeg_uri
from cnn2gnn_dist.stages.shared.context import Context, chunks, load_manifest

LABELS, OTHERS = 10, 8
"""Cards of doubtful labels; pictures of outliers and of hubs."""
READ = 256


def digest(context: Context) -> dict[str, Any] | str:
    """What the report's section on the training images shows, or why there is none."""
    model = Classifier.open(context.folder, device=context.device)
    if model.memory is None:
        return "the model has no memory of the training images"
    pictures = Thumbnails(model.memory)
    if not pictures.any:
        return "the model has no thumbnails"
    training = training_set(model.memory)
    held = _held_out(context, model)
    try:
        found = audit(
            training,
            held,
            look=pictures.look,
            look_held=lambda rows: _read(context, rows, look_alike.SIDE)[0],
        )
    except UserError as error:  # too few images
        return error.what
    keys = model.memory.keys(model.memory.live_ids)
    return _section(training, found, keys, pictures, held)


def _held_out(context: Context, model: Classifier) -> HeldOut | None:
    manifest = load_manifest(context.paths.test_manifest)
    if not len(manifest):
        return None
    dims = model.spec.student
    x_QD = np.zeros((len(manifest), dims.dim), np.float16)
    z_Qd = np.zeros((len(manifest), dims.graph_dim), np.float32)
    for rows in chunks(len(manifest), READ):
        at = np.arange(rows.start, rows.stop)
        images, good = _read(context, at, None)
        if good.any():
            x_QD[at[good]], z_Qd[at[good]] = model.network.embed(images[good])
    return HeldOut(x_QD, z_Qd, manifest.label_N)


def _read(context: Context, rows: np.ndarray, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Held-out images uint8 [n, S, S, 3] and which are readable; ``size``: None: as the model sees them."""
    stream = context.config.stream
    views = context.views() if size is None else ViewSpec(kind="none", size=size, flip=False)
    spec = ReaderSpec(
        str(context.paths.test_manifest), views, 0, CacheSpec(stream.cache_dir, stream.cache_bytes)
    )
    parts = []
    with closing(Reader(spec)) as reader:
        for some in chunks(len(rows), READ):
            ids = np.asarray(rows[some.start : some.stop], np.int64)
            parts.append(reader.read(Request(ids, CLEAN)))
    side = views.size
    return (
        np.concatenate([np.empty((0, side, side, 3), np.uint8), *(p.images for p in parts)]),
        np.concatenate([np.empty(0, bool), *(p.valid for p in parts)]),
    )


def _section(
    training: TrainingSet,
    found: Findings,
    keys: list[str],
    pictures: Thumbnails,
    held: HeldOut | None,
) -> dict[str, Any]:
    labels_N, names, scores = training.labels_N, training.classes, found.labels
    doubtful = found.doubtful(labels_N)
    first = doubtful[:LABELS].tolist()
    near = {row: evidence(found, row) for row in first}
    readable = np.isfinite(scores.score_N) & np.isfinite(found.reach_N)
    far = [r for r in np.argsort(-found.reach_N, kind="stable").tolist() if readable[r]][:OTHERS]
    hubs = np.argsort(-found.degree_N, kind="stable")[:OTHERS].tolist()
    shown = sorted({*first, *far, *hubs, *(other for one in near.values() for other, _ in one)})
    images = dict(zip(shown, map(jpeg_uri, pictures.jpegs(shown)), strict=True))

    def card(row: int) -> dict[str, Any]:
        return {"key": keys[row], "image": images[row], "class": names[labels_N[row]]}

    bleeding = next(zip(*found.bleeding, strict=True), None)
    across = found.across
    return {
        "images": len(keys),
        "doubtful": len(doubtful),
        "agree": int(scores.agree_N[doubtful].sum()),
        "labels": [
            card(row)
            | {
                "suggested": names[scores.suggested_N[row]],
                "head": float(scores.head_N[row]),
                "vote": float(scores.vote_N[row]),
                "near": [
                    card(other) | {"weight": weight, "same": labels_N[other] == labels_N[row]}
                    for other, weight in near[row]
                ],
            }
            for row in first
        ],
        "held": 0 if held is None else len(held.labels_Q),
        "across": 0 if across is None else len(across.a_P),
        "leaked": 0 if across is None else len(np.unique(across.a_P)),
        "within": len(found.twins_P2) + len(found.within.a_P),
        "outliers": [card(row) for row in far],
        "hubs": [card(row) | {"degree": int(found.degree_N[row])} for row in hubs],
        "bleeding": bleeding and (names[bleeding[0]], names[bleeding[1]], float(bleeding[2])),
    }
