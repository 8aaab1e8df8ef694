"""Imports preloaded in forked processes: the libraries, and the modules of the package that a run imports."""

import importlib

from cnn2gnn_dist import compat

compat.import_timm()  # provides the layers of the stem and the teacher
for _name in (
    "cnn2gnn_dist.launcher",
    "faiss",
    "matplotlib.figure",
    "safetensors.torch",
    "torch._dynamo",  # imported by the first optimizer step
    "torch.utils.tensorboard",
):
    importlib.import_module(_name)
