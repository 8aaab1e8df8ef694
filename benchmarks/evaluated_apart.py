"""Models of a run evaluated in another way than by its own stage ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cnn2gnn_dist import settings
from cnn2gnn_dist.report.labels import CONTROL

SHUFFLED = 2
"""Version of ``shuffled_accuracy``, to be raised with it. 1: the neighbors' projections were replaced, too."""


def shuffled_accuracy(run: Path) -> float:
    """Accuracy of the student when every neighbor's features and label are those of an arbitrary node.

    Neighbors are found and weighted as they were.
    """
    import torch

    from cnn2gnn_dist.stages.compared_models import compared_models
    from cnn2gnn_dist.stages.shared.context import load_manifest
    from cnn2gnn_dist.stages.shared.predictions import evaluate

    context = _context(run)
    train = load_manifest(context.paths.train_manifest)
    model = next(m for m in compared_models(context, train.num_classes, False) if m.with_bank)
    assert model.with_bank is not None
    around = model.with_bank.around
    holder = around.holder
    place = np.random.default_rng(context.config.seed).permutation(len(train))
    rows = holder.rows

    def arbitrary(ids: np.ndarray) -> tuple[Any, Any, Any]:
        # Not their projections: of several arbitrary nodes the head would choose the nearest, which are often
        # of the image's class.
        (x_VD, _, label_V), (_, z_Vd, _) = rows(place[ids]), rows(ids)
        return x_VD, z_Vd, label_V

    holder.rows = arbitrary  # type: ignore[method-assign]
    if around.second is not None:  # the second hop's averages are the arbitrary node's, too
        around.second.mean_KD = around.second.mean_KD[torch.from_numpy(place)]
    found = evaluate(context, model.answer, context.paths.test_manifest).found["student"]
    return float((found.predicted_N == found.label_N).mean())


def control_scores(run: Path) -> dict[str, float]:
    """Accuracy, balanced accuracy and calibration error of the control of a run that may have no student."""
    from cnn2gnn_dist.stages.compared_models import control_model
    from cnn2gnn_dist.stages.shared.context import load_manifest
    from cnn2gnn_dist.stages.shared.predictions import evaluate

    context = _context(run)
    classes = load_manifest(context.paths.train_manifest).num_classes
    model = control_model(context, classes)
    found = evaluate(context, model.answer, context.paths.test_manifest).found[CONTROL]
    return found.scores(classes)


def _context(run: Path) -> Any:
    """A finished run as a stage of one rank sees it."""
    import torch

    from cnn2gnn_dist.runtime.ranks import Ranks
    from cnn2gnn_dist.stages.shared.context import Context, RunPaths

    torch.set_num_threads(1)
    config = settings.load(str(run / "config.yaml"), ["stream.backend=local"])
    return Context(config, Ranks(), RunPaths(run), run, "", "cpu", False)
