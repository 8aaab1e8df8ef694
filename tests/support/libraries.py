"""Imports preloaded in forked processes: the libraries, and the modules of the package that a run imports.

What is missing here is imported by every rank of every test: without deepspeed, its Muon (which imports
torch's compiler), scikit-learn and pandas, imports took half of a small run's processor time.
"""

import gc
import importlib

from cnn2gnn_dist import compat

compat.import_timm()  # has the layers of stem and teacher
for _name in (
    "cnn2gnn_dist.launcher",
    "cnn2gnn_dist.stages.evaluate",
    "cnn2gnn_dist.stages.model",
    "cnn2gnn_dist.stages.prepare",
    "cnn2gnn_dist.stages.student",
    "cnn2gnn_dist.stages.targets",
    "cnn2gnn_dist.stages.teacher",
    "deepspeed.module_inject.auto_ep_layer",  # this and the next two: imported by the first engine
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "faiss",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "pandas",  # imported by pyarrow where it is installed
    "safetensors.torch",
    "sklearn.datasets",
    "torch._dynamo",  # imported by the first optimizer step
    "torch.utils.tensorboard",
):
    importlib.import_module(_name)
gc.collect()
gc.freeze()  # a fork's collections then neither visit these objects nor copy their pages
