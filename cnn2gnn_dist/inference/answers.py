"""What a model answers: a class with its probability, and the training images it is based on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Neighbour:
    """A training image that an image attaches to.

    Attributes:
        key: of the training image.
        label: its class.
        weight: its share of the message, 0..1; the weights of an image's neighbors sum to 1.
        row: its row in the memory.
    """

    key: str
    label: str
    weight: float
    row: int
    _thumbnail: Callable[[int], bytes | None] = field(repr=False, compare=False)

    def thumbnail(self) -> bytes | None:
        """Return the bytes of its thumbnail; None if the model has none."""
        return self._thumbnail(self.row)

    def image(self) -> Image | None:
        """Return its thumbnail; None if the model has none."""
        import io

        from PIL import Image

        data = self.thumbnail()
        return None if data is None else Image.open(io.BytesIO(data))


@dataclass(frozen=True)
class Answer:
    """The answer for one image.

    Attributes:
        name: of the input: its path, or ``input N``.
        label, probability: the most probable class; None if the image could not be read.
        classes: (class, probability) by descending probability, as many as requested.
        neighbours: by descending weight.
        path: what decided: "graph" (the network with its neighbors), "network" (there are none:
            control, or an empty memory) or "new class" (a class added to the memory).
        scores: further numbers, such as those of how unlike the training images it is.
        error: why there is no answer.
    """

    name: str
    label: str | None = None
    probability: float | None = None
    classes: tuple[tuple[str, float], ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    path: str | None = None
    scores: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def top(self, count: int) -> tuple[tuple[str, float], ...]:
        """The ``count`` most probable classes with their probabilities."""
        return self.classes[:count]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as JSON lines have it."""
        if self.error is not None:
            return {"image": self.name, "error": self.error}
        found: dict[str, Any] = {
            "image": self.name,
            "classes": [{"class": c, "probability": round(p, 4)} for c, p in self.classes],
        }
        if self.path != "network":
            found["neighbours"] = [
                {"key": n.key, "class": n.label, "weight": round(n.weight, 4)}
                for n in self.neighbours
            ]
        return found | {"path": self.path} | self.scores
