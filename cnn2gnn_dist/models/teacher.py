"""The teacher: any timm network, with its first layers adapted to small images."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnn2gnn_dist.compat import import_timm
from cnn2gnn_dist.errors import UserError, first_line
from cnn2gnn_dist.models import whitened_cnn

SMALL_IMAGE = 64  # pixels; up to this size ResNets keep their full resolution in the first layers

_log = logging.getLogger(__name__)


def build_teacher(
    arch: str,
    num_classes: int,
    image_size: int,
    *,
    pretrained: bool = False,
    weights: str | None = None,
    args: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a timm network: normalized images [B, 3, S, S] → logits [B, num_classes].

    For ``image_size`` up to 64, ResNet-like networks get a 3×3 first convolution of stride 1 and
    lose their max-pooling; other families are unchanged. Networks with a fixed input size
    (transformers) are built for ``image_size``.

    Args:
        arch: a timm name, with or without a pretrained tag, or ``whitened_cnn`` (args: ``widths``).
        num_classes: 0: no classifier, the network returns its pooled features.
        image_size: side of the square images, pixels.
        pretrained: start from timm's weights (needs the network or the Hugging Face cache).
        weights: start from a local file, .safetensors or torch; a classifier of a different size is
            skipped with a warning.
        args: further arguments of ``timm.create_model``.

    Raises:
        UserError: unknown name or argument, or weights that can't be reached or don't fit.
    """
    if pretrained and weights:
        raise UserError(
            "pretrained and weights are both set",
            where="teacher.pretrained, teacher.weights",
            remedy="keep one: weights is a local file, pretrained downloads timm's own",
        )
    check_name(arch)
    if arch == whitened_cnn.NAME:
        return _whitened(num_classes, image_size, pretrained, weights, dict(args or {}))
    network = _create(arch, num_classes, image_size, pretrained, dict(args or {}))
    if image_size <= SMALL_IMAGE:
        fit_small_images(network, warn=pretrained)
    if weights:
        load_state(network, read_weights(Path(weights)), weights)
    return network


def fit_small_images(network: nn.Module, *, warn: bool = False) -> bool:
    """Keep the resolution of small images in the first layers of a ResNet-like network.

    Works in place; returns False and changes nothing for other families. ``warn``: warn that a
    replaced first layer starts from new values.
    """
    first, pool = getattr(network, "conv1", None), getattr(network, "maxpool", None)
    if pool is None or not isinstance(first, nn.Conv2d | nn.Sequential):
        return False
    network.maxpool = nn.Identity()
    if isinstance(first, nn.Sequential):  # the deep stem: three 3×3 layers already
        if isinstance(first[0], nn.Conv2d):
            first[0].stride = (1, 1)
        return True
    small = nn.Conv2d(
        first.in_channels, first.out_channels, 3, stride=1, padding=1, bias=first.bias is not None
    )
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = small
    if warn:
        _log.warning("the first layer was replaced for small images and starts untrained")
    return True


def check_name(arch: str, others: Iterable[str] = ()) -> None:
    """Refuse an unknown timm name or tag, suggesting similar names (``others`` included).

    Raises:
        UserError: with up to five suggestions.
    """
    if arch == whitened_cnn.NAME:
        return
    timm = import_timm()
    name, _, tag = arch.partition(".")
    if not timm.is_model(name):
        known = [*others, whitened_cnn.NAME, *timm.list_models()]
        near = difflib.get_close_matches(arch, known, n=5, cutoff=0.5)
        raise UserError(
            f"timm has no network named '{arch}'",
            where="teacher.arch (or student.stem)",
            remedy=f"did you mean {', '.join(near)}?" if near else "see timm.list_models()",
        )
    tagged = timm.list_pretrained(f"{name}.*") if tag else []
    if tag and arch not in tagged:
        raise UserError(
            f"timm's {name} has no weights tagged '{tag}'",
            where="teacher.arch (or student.stem)",
            remedy=f"leave the tag out, or use one of {_few(tagged, 12)}",
        )


def _whitened(
    num_classes: int, image_size: int, pretrained: bool, weights: str | None, args: dict[str, Any]
) -> nn.Module:
    unknown = sorted(set(args) - {"widths"})
    if unknown or pretrained:
        raise UserError(
            f"{whitened_cnn.NAME} doesn't take {', '.join(unknown)}"
            if unknown
            else f"there are no pretrained weights of {whitened_cnn.NAME}",
            where="teacher.args (or student.stem_args)" if unknown else "teacher.pretrained",
            remedy="use only widths"
            if unknown
            else "set teacher.weights to a local file, or neither",
        )
    network = whitened_cnn.WhitenedCNN(num_classes, **args)
    network.check_size(image_size)
    if weights:
        load_state(network, read_weights(Path(weights)), weights)
    return network


def _create(
    arch: str, num_classes: int, image_size: int, pretrained: bool, args: dict[str, Any]
) -> nn.Module:
    timm = import_timm()
    known = timm.get_pretrained_cfg(arch, allow_unregistered=True)
    if getattr(known, "fixed_input_size", False):
        args.setdefault("img_size", image_size)
    try:
        return timm.create_model(arch, pretrained=pretrained, num_classes=num_classes, **args)
    except TypeError as failure:
        raise UserError(
            f"timm's {arch} doesn't take these arguments: {failure}",
            where=f"teacher.args {args}",
            remedy="correct or remove the argument",
        ) from failure
    except Exception as failure:  # hub, URL and file errors have no common ancestor
        if not pretrained:
            raise UserError(
                f"timm could not build {arch}: {failure}",
                where=f"teacher.arch, teacher.args {args}, images of {image_size} pixels",
                remedy="choose another network or arguments that fit the image size",
            ) from failure
        raise UserError(
            f"the pretrained weights of {arch} can't be loaded: {first_line(failure)}",
            where="teacher.pretrained",
            remedy="download them on a machine with network access (HF_HOME is the cache; "
            "HF_HUB_OFFLINE disables the network), or set teacher.weights to a local file, or "
            "set teacher.pretrained=false",
        ) from failure


def load_state(network: nn.Module, state: dict[str, Tensor], where: str) -> None:
    """Load named tensors; a classifier that does not fit is skipped with a warning.

    ``where``: the file, for messages.

    Raises:
        UserError: other tensors are missing, unknown or of another shape.
    """
    own = network.state_dict()
    heads = classifier_names(network)

    def is_head(name: str) -> bool:
        return any(name.startswith(f"{head}.") for head in heads)

    # A headless network (num_classes=0) has no classifier to load.
    fits = {n: t for n, t in state.items() if n in own and t.shape == own[n].shape}
    dropped = [n for n in state if n not in fits and is_head(n)]
    wrong = [
        f"{n} {tuple(t.shape)}, expected {tuple(own[n].shape) if n in own else 'none'}"
        for n, t in state.items()
        if n not in fits and not is_head(n)
    ]
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    missing = [n for n in missing if not is_head(n)]
    if wrong or missing:
        parts = [f"wrong shape or unknown: {_few(wrong)}"] if wrong else []
        parts += [f"missing: {_few(missing)}"] if missing else []
        raise UserError(
            f"the weights don't fit the network ({'; '.join(parts)})",
            where=where,
            remedy="use weights of the same teacher.arch, teacher.args and kind of first layer "
            f"(images up to {SMALL_IMAGE} pixels get a 3×3 one)",
        )
    if dropped:
        _log.warning("%s: the classifier (%s) doesn't fit and is skipped", where, _few(dropped))
    network.load_state_dict(fits, strict=False)


def check_classifier(network: nn.Module, weights: str) -> None:
    """Check that a file has the classifier of a network that is used without training.

    Raises:
        UserError: it is missing or of another shape.
    """
    state, own = read_weights(Path(weights)), network.state_dict()
    heads = tuple(f"{name}." for name in classifier_names(network))
    wrong = [
        n for n in own if n.startswith(heads) and (n not in state or state[n].shape != own[n].shape)
    ]
    if wrong:
        shapes = {n: tuple(state[n].shape) if n in state else "none" for n in wrong}
        raise UserError(
            f"the classifier doesn't fit: {_few([f'{n} {shapes[n]}, expected {tuple(own[n].shape)}' for n in wrong])}",
            where=weights,
            remedy="use weights of a network with these classes, or teacher.epochs of 1 or more to train it",
        )


def read_weights(path: Path, field: str = "teacher.weights") -> dict[str, Tensor]:
    """The named tensors of a file, .safetensors or torch's; ``field`` names it.

    Raises:
        UserError: missing, unreadable, or something else.
    """
    if not path.is_file():
        raise UserError(
            "the weights file does not exist", where=str(path), remedy=f"correct {field}"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as failure:  # safetensors, zip and unpickling errors all mean the same here
        raise UserError(
            f"the weights file can't be read: {first_line(failure)}",
            where=str(path),
            remedy="use a .safetensors file, or a torch file that contains only tensors",
        ) from failure
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(
            "the file does not contain a dict of named tensors",
            where=str(path),
            remedy="save model.state_dict() in it",
        )
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def classifier_names(network: nn.Module) -> list[str]:
    """Names of a timm network's last layers, as timm lists them."""
    known = getattr(network, "pretrained_cfg", None) or {}
    names = known.get("classifier") or "fc"
    return [names] if isinstance(names, str) else list(names)


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
