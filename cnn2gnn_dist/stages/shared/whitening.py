"""The fixed first layer of a ``whitened_cnn``, set from training images before training begins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist.data.images.views import CLEAN
from cnn2gnn_dist.data.reading.reader import Reader, Request
from cnn2gnn_dist.models.student import Student
from cnn2gnn_dist.models.whitened_cnn import WhitenedCNN
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.shared.context import Context
from cnn2gnn_dist.stages.shared.networks import Teacher

IMAGES = 5000
"""Training images from which the covariance of patches is estimated."""


def whiten_first_layers(context: Context, model: Teacher | Student) -> None:
    """Set the first layers of ``WhitenedCNN``s in the model (collective); nothing happens if there are none.

    Nor if ``student.stem_args`` has loaded them from a file: the first layer there belongs to the others.

    Uses clean views of up to ``IMAGES`` readable training images, spread evenly over the set; computed on
    rank 0, so that all ranks are bit-identical.
    """
    networks = [m for m in model.modules() if isinstance(m, WhitenedCNN)]
    loaded = isinstance(model, Student) and context.config.student.stem_args.get("weights")
    if loaded or not networks:
        return

    def weights() -> list[Tensor]:
        reader = Reader(context.reader_spec(context.paths.train_manifest))
        total = len(reader.manifest)
        ids = np.unique(np.linspace(0, total - 1, min(total, IMAGES)).astype(np.int64))
        batch = reader.read(Request(ids, CLEAN))
        images = model.normalise(torch.from_numpy(batch.images[batch.valid]))
        for network in networks:
            if len(images):  # else training will find that nothing can be read
                network.whiten(images)
        return [network.first.weight for network in networks]

    for network, weight in zip(networks, collectives.alone(weights), strict=True):
        network.first.weight.copy_(weight)
