"""A model as programs of ``torch.export``: ``encoder.pt2`` and ``head.pt2``, which run with torch alone.

Inputs and outputs are those of ``graphs``, in the same order::

    encoder = torch.export.load("encoder.pt2").module()
    x, z, self_logits = encoder(images)
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.export import graphs


def export(model: Classifier, folder: Path) -> None:
    """Write the model as exported programs and arrays.

    Raises:
        UserError: see ``graphs.export``.
    """
    graphs.export(model, folder, _Program())


class _Program:
    suffix, runtime, packages = ".pt2", "torch.export", "torch"

    def write(
        self,
        module: nn.Module,
        example: graphs.Tensors,
        path: Path,
        inputs: graphs.Names,
        outputs: graphs.Names,
    ) -> None:
        shapes = graphs.dynamic_batch(len(example))
        data = io.BytesIO()  # torch's own writer reports a full disk as a failed assertion
        torch.export.save(torch.export.export(module, example, dynamic_shapes=shapes), data)
        path.write_bytes(data.getbuffer())

    def run(self, path: Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        program = torch.export.load(path).module()
        with torch.no_grad():
            found = program(*(torch.from_numpy(array) for array in feeds.values()))
        return [one.numpy() for one in found]
