"""What a forked process has loaded: the libraries, and the package as far as a run imports it."""

import importlib

from cnn2gnn_dist import compat

compat.import_timm()  # its layers are the stem's and the teacher's
for _name in (
    "cnn2gnn_dist.launcher",
    "faiss",
    "matplotlib.figure",
    "safetensors.torch",
    "torch._dynamo",  # the first step of an optimizer imports it
    "torch.utils.tensorboard",
):
    importlib.import_module(_name)
