"""cnn2gnn-dist: distil a CNN into a two-layer GNN over a graph learned from the images."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cnn2gnn_dist.inference.classifier import Classifier, load

__version__ = "0.1.0"
__all__ = ["Classifier", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Import the classifier when it is used: the package itself imports no torch."""
    if name in ("Classifier", "load"):
        from cnn2gnn_dist.inference import classifier

        return getattr(classifier, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
