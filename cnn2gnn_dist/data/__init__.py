"""Data: shards, their index, the order of samples, and the stream that reads them.

Another training script only needs ``from cnn2gnn_dist.data import Stream, ViewSpec``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnn2gnn_dist.data.images.views import ViewSpec
    from cnn2gnn_dist.data.stream import Stream

__all__ = ["Stream", "ViewSpec"]


def __getattr__(name: str) -> Any:
    """Import names lazily, so that building an index does not import torch."""
    if name == "Stream":
        from cnn2gnn_dist.data.stream import Stream

        return Stream
    if name == "ViewSpec":
        from cnn2gnn_dist.data.images.views import ViewSpec

        return ViewSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
