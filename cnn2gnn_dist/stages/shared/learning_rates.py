"""Which parameters of a model have their own learning rate (norm biases, the classifier, the stem), or start late."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cnn2gnn_dist.config import StudentConfig, TeacherConfig
from cnn2gnn_dist.models.teacher import classifier_names

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


@dataclass(frozen=True)
class Late:
    """Parameters that start at the beginning of an epoch, with a separate warm-up (in epochs)."""

    names: Collection[str]
    epoch: int
    warmup: float


def rates_of(
    model: nn.Module, settings: TeacherConfig | StudentConfig, gate_lr: float = 1.0
) -> dict[str, float]:
    """Factors of the learning rate by the names of parameters; those without one are left out.

    A norm's bias in the stem or classifier has the product of both factors. ``gate_lr`` is that of a student's
    gates, which have no weight decay, unlike the matrices that they open.
    """
    if isinstance(settings, TeacherConfig):
        part, factor = [f"cnn.{name}" for name in _classifier(model)], settings.head_lr
    else:
        part, factor = ["stem"], settings.stem_lr
    biases = {
        f"{name}.bias".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, _NORMS)
    }
    found = {}
    for name, _ in model.named_parameters():
        own = factor if any(name.startswith(f"{one}.") for one in part) else 1.0
        own *= gate_lr if name.startswith("gnn.gate") else 1.0
        rate = own * (settings.bias_lr if name in biases else 1.0)
        if rate != 1.0:
            found[name] = rate
    return found


def _classifier(model: nn.Module) -> list[str]:
    cnn = getattr(model, "cnn", None)
    return classifier_names(cnn) if isinstance(cnn, nn.Module) else []
