"""Prometheus metrics of one server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cnn2gnn_dist.inference.classifier import Classifier

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The metrics of an app, in a separate registry: ``/metrics`` shows ``text()``."""

    def __init__(self) -> None:
        self.registry = made = CollectorRegistry()
        self.requests = Counter(
            "cnn2gnn_requests", "requests answered", ["path", "method", "status"], registry=made
        )
        self.seconds = Histogram(
            "cnn2gnn_request_seconds", "from the first byte of a request to the last of its answer",
            ["path"], buckets=_SECONDS, registry=made,
        )  # fmt: skip
        self.images = Counter("cnn2gnn_images", "images asked about", ["outcome"], registry=made)
        self.batch_images = Histogram(
            "cnn2gnn_batch_images", "images per batch", buckets=_IMAGES, registry=made
        )
        self.network_seconds = Histogram(
            "cnn2gnn_network_seconds", "network and neighbor search, per batch",
            buckets=_SECONDS, registry=made,
        )  # fmt: skip
        self.wait_seconds = Histogram(
            "cnn2gnn_wait_seconds", "longest time that a request of a batch waited for the network",
            buckets=_SECONDS, registry=made,
        )  # fmt: skip
        self.waiting = Gauge("cnn2gnn_images_waiting", "images in the queue", registry=made)
        self.in_flight = Gauge("cnn2gnn_requests_in_flight", "requests in progress", registry=made)
        self.edits = Counter(
            "cnn2gnn_memory_edits", "edits of the memory", ["action", "outcome"], registry=made
        )
        self.version = Gauge("cnn2gnn_memory_version", "version being served", registry=made)
        self.rows = Gauge("cnn2gnn_memory_images", "images in the memory", registry=made)
        self.swaps = Counter("cnn2gnn_memory_swaps", "changes of the version", registry=made)
        self._served: int | None = None

    def batch(self, images: int, network_s: float, wait_s: float) -> None:
        """Count a batch of the network."""
        self.batch_images.observe(images)
        self.network_seconds.observe(network_s)
        self.wait_seconds.observe(wait_s)

    def swapped(self, model: Classifier) -> None:
        """Record which version of the memory is served."""
        if model.memory is not None:
            number = model.memory.version.number
            self.version.set(number)
            self.rows.set(len(model.memory))
            if self._served not in (None, number):  # the first one replaces none
                self.swaps.inc()
            self._served = number

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
