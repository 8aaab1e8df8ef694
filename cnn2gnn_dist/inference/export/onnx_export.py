"""A model as ONNX: ``encoder.onnx`` and ``head.onnx``, compared with torch by onnxruntime (see ``graphs``)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.inference.export import graphs


def export(model: Classifier, folder: Path) -> None:
    """Write the model as ONNX graphs and arrays.

    Raises:
        UserError: see ``graphs.export``.
    """
    graphs.export(model, folder, _Onnx())


class _Onnx:
    suffix, runtime, packages = ".onnx", "onnxruntime", "torch, onnx and onnxruntime"

    def write(
        self,
        module: nn.Module,
        example: graphs.Tensors,
        path: Path,
        inputs: graphs.Names,
        outputs: graphs.Names,
    ) -> None:
        with warnings.catch_warnings():
            # Each input of the head names its batch axis; that they are one and the same is intended.
            warnings.filterwarnings("ignore", r"# The axis name: \w+ will not be used", UserWarning)
            # torch's own copy of a program does that, nothing of ours.
            warnings.filterwarnings(
                "ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning
            )
            torch.onnx.export(
                module, example, str(path), dynamo=True, dynamic_shapes=graphs.dynamic_batch(len(example)),
                verbose=False, input_names=inputs, output_names=outputs, external_data=False,
            )  # fmt: skip

    def run(self, path: Path, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        import onnxruntime

        found: list[np.ndarray] = onnxruntime.InferenceSession(path).run(None, dict(feeds))
        return found
