"""Data: shards, their index, the order of samples, and the stream that reads them.

Another training script only needs ``from cnn2gnn_dist.data import Stream, ViewSpec``; ``Crops`` and ``multi_crop`` for
several views of a sample, ``mix_pairs`` for mixup and cutmix.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnn2gnn_dist.data.images.crops import Crops, multi_crop
    from cnn2gnn_dist.data.images.views import ViewSpec
    from cnn2gnn_dist.data.mixing import mix_pairs
    from cnn2gnn_dist.data.stream import Stream

__all__ = ["Crops", "Stream", "ViewSpec", "mix_pairs", "multi_crop"]

_WHERE = {
    "Crops": "images.crops",
    "Stream": "stream",
    "ViewSpec": "images.views",
    "mix_pairs": "mixing",
    "multi_crop": "images.crops",
}


def __getattr__(name: str) -> Any:
    """Import names lazily, so that building an index does not import torch."""
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
