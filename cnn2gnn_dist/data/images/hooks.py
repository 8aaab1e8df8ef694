"""Other libraries' transforms on finished views, as pure functions of (seed, sample, view).

timm's, torchvision's and most others draw from the global generators of ``random``, NumPy and torch. A
hook runs with all three seeded by the view's hash, and they are restored afterwards. That is safe among threads that
all use :func:`apply`; another thread that draws meanwhile (dropout on a CPU) would take the hook's numbers, and vice
versa. So a stream never runs hooks in threads of the training process (``data/reading/pool.py``).
"""

from __future__ import annotations

import importlib
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from cnn2gnn_dist.compat import import_timm
from cnn2gnn_dist.data.images.distort import Color
from cnn2gnn_dist.errors import UserError, first_line

Hook = Callable[[Image.Image], Image.Image]
WHERE = "views.hook"
_alone = threading.Lock()  # the generators belong to the process, readers are threads of it


@lru_cache(maxsize=8)
def hook_of(name: str, size: int, fill: Color) -> Hook:
    """The hook that a name stands for.

    Args:
        name: ``timm:CONFIG``: timm's RandAugment, AutoAugment or AugMix, as its ``--aa`` option reads CONFIG
            (``timm:rand-m9-mstd0.5-inc1``); ``MODULE:FUNCTION``: your own function, which takes an RGB
            PIL image and returns one of the same size.
        size: side of the images, in pixels: timm's translations are relative to it.
        fill: color of the area that timm's moves leave empty.

    Raises:
        UserError: there is no such function, or timm does not know the config.
    """
    module, separator, rest = name.partition(":")
    if not (module and separator and rest):
        raise UserError(
            f"{name!r} is neither timm:CONFIG nor MODULE:FUNCTION",
            where=WHERE,
            remedy="for example views.hook=timm:rand-m9-mstd0.5-inc1",
        )
    try:
        if module == "timm":
            return _of_timm(rest, size, fill)
        found: Hook = getattr(importlib.import_module(module), rest)
    except Exception as error:  # whatever importing a user's module, or timm's parser, raises
        raise UserError(
            f"{name!r} can't be used: {first_line(error) or type(error).__name__}",
            where=WHERE,
            remedy="name a function that every process of the run can import (PYTHONPATH), or a config of timm",
        ) from error
    return found


def _of_timm(config: str, size: int, fill: Color) -> Hook:
    import_timm()
    from timm.data.auto_augment import (
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )

    params = {
        "translate_const": int(size * 0.45),
        "img_mean": fill,
    }  # as timm's create_transform has it
    made: Any
    if config.startswith("rand"):
        made = rand_augment_transform(config, params)
    elif config.startswith("augmix"):
        made = augment_and_mix_transform(config, {**params, "translate_pct": 0.3})
    else:
        made = auto_augment_transform(config, params)
    groups = [made.ops] if hasattr(made, "ops") else made.policy
    for operation in (one for group in groups for one in group):
        keep_a_bit(operation)
    hook: Hook = made
    return hook


def keep_a_bit(operation: Any) -> None:
    """Let timm's posterize keep a bit if it draws none: current versions of Pillow reject zero, during training."""
    if operation.aug_fn.__name__ == "posterize":
        posterize = operation.aug_fn
        operation.aug_fn = lambda image, bits, **kwargs: posterize(image, max(1, bits), **kwargs)


def apply(hook: Hook, image_HWC: np.ndarray, seed: int) -> np.ndarray:
    """Apply a hook to an image uint8 [H, W, 3], with all global generators seeded with ``seed``.

    Raises:
        UserError: the hook failed, or did not return an RGB image of the same size.
    """
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    with _alone, _seeded(seed):
        try:
            made = hook(image)
        except Exception as error:
            raise UserError(
                f"the hook failed: {type(error).__name__}: {first_line(error)}", where=WHERE
            ) from error
    if not isinstance(made, Image.Image) or (made.mode, made.size) != ("RGB", image.size):
        what = f"{made.mode} {made.size}" if isinstance(made, Image.Image) else type(made).__name__
        raise UserError(
            f"the hook returned {what} for an RGB image {image.size}",
            where=WHERE,
            remedy="return an RGB PIL image of the same size",
        )
    return np.asarray(made)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import torch

    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
