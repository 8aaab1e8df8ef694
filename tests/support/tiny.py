"""A tiny BatchNorm CNN, its data and its training, shared by the tests of ``training``."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training import ds_config
from cnn2gnn_dist.training.engine import Engine

GLOBAL_BATCH = 8
STAGES = (0, 1, 2, 3)
STEPS = 6
LR, WEIGHT_DECAY, MOMENTUM = 0.01, 0.1, 0.85


class TinyNet(nn.Module):
    """Maps images [B, 3, 8, 8] to logits [B, 4]; has matrices, vectors, a gate, and buffers of both kinds."""

    def __init__(self, seed: int = 0, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(seed)
        # No bias before BatchNorm: its gradient is rounding noise, which Adam amplifies.
        self.first = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, stride=2, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.gate = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(images)))
        x = F.relu(self.norm2(self.second(x))).mean((2, 3))
        return self.head(x + self.gate * x * x)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step: images [8, 3, 8, 8], labels [8]."""
    generator = torch.Generator().manual_seed(1000 + step)
    images = torch.randn(GLOBAL_BATCH, 3, 8, 8, generator=generator)
    return images, torch.randint(0, 4, (GLOBAL_BATCH,), generator=generator)


def share(step: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of the global batch."""
    rows = GLOBAL_BATCH // collectives.world_size()
    own = slice(collectives.rank() * rows, (collectives.rank() + 1) * rows)
    images, labels = batch(step)
    return images[own], labels[own]


def lr(step: int) -> float:
    """A learning rate that changes every step."""
    return LR / (1 + step)


def config(
    stage: int, accumulation: int = 1, clip: float = 0.0, optimizer: str = "adamw"
) -> dict[str, Any]:
    """The repository's ds_config.json, resolved for the current group."""
    return ds_config.resolve(
        ds_config.load(ds_config.PACKAGE.parent / "ds_config.json"),
        world_size=collectives.world_size(),
        global_batch=GLOBAL_BATCH,
        accumulation=accumulation,
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        clip=clip,
        device="cpu",
        stage=stage,
        optimizer=optimizer,
        momentum=MOMENTUM,
    )


def build(
    stage: int,
    *,
    seed: int = 0,
    model: nn.Module | None = None,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> Engine:
    """An engine around a TinyNet (or ``model``) in training mode; ``engine`` has further arguments for it."""
    built = Engine(model or TinyNet(seed), config(stage, **options), device="cpu", **(engine or {}))
    built.train()
    return built


def train(engine: Engine, steps: range) -> list[float]:
    """Run optimizer steps on this rank's shares; return the loss of every micro-batch."""
    losses = []
    for step in steps:
        images, labels = share(step)
        chunks = engine.accumulation
        for x, y in zip(images.chunk(chunks), labels.chunk(chunks), strict=True):
            loss = F.cross_entropy(engine(x), y)
            losses.append(float(loss))
            engine.backward(loss)
        engine.step(lr(step))
    return losses


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of names and bytes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def weights_only(tensors: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """The parameters among weights and buffers."""
    names = dict((model or TinyNet()).named_parameters())
    return {name: tensor for name, tensor in tensors.items() if name in names}
