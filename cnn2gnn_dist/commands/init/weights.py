"""Available pretrained weights: a given file, or one in timm's cache. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnn2gnn_dist.compat import import_timm
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.teacher import SMALL_IMAGE, build_teacher

ARCHITECTURES = ("resnet18", "resnet26", "resnet34", "resnet50", "mobilenetv3_small_100",
                 "mobilenetv3_large_100", "efficientnet_b0", "convnext_atto", "convnext_tiny")  # fmt: skip
"""Networks to try on a file whose name says nothing, and to look for in the cache."""
_SMALLEST = 96  # pixels: below this, pretrained filters see too little, and ResNets have another first layer


def from_file(path: str) -> dict[str, Any]:
    """``arch``, ``weights`` and smallest ``size`` for a file: by its name, else whichever network fits.

    Raises:
        UserError: the file is missing or damaged; no known network fits it.
    """
    file = Path(path).expanduser().absolute()
    if not file.is_file():
        raise UserError("there is no such weights file", where=path, remedy="correct --weights")
    timm = import_timm()
    words = file.name.lower().replace("-", "_").replace(".", "_")
    named = sorted((n for n in timm.list_models() if words.startswith(n)), key=len, reverse=True)[
        :1
    ]
    failure: UserError | None = None
    for arch in dict.fromkeys([*named, *ARCHITECTURES]):
        try:
            build_teacher(arch, 0, 2 * SMALL_IMAGE, weights=str(file))
        except UserError as error:
            if "don't fit" not in error.what:
                raise
            failure = failure or error
        else:
            return {"arch": arch, "weights": _escaped(str(file)), "size": _SMALLEST}
    raise UserError(
        f"the weights fit none of {', '.join(dict.fromkeys([*named, *ARCHITECTURES]))}",
        where=str(file),
        remedy="leave --weights out, and set teacher.arch and teacher.weights in the config yourself",
    ) from failure


def cached() -> dict[str, Any] | None:
    """The first of the known networks whose weights the Hugging Face cache holds; None if there are none."""
    timm = import_timm()
    from huggingface_hub import try_to_load_from_cache

    for arch in ARCHITECTURES:
        known = timm.get_pretrained_cfg(arch)
        if known is None or not known.hf_hub_id:
            continue
        found = try_to_load_from_cache(known.hf_hub_id, "model.safetensors")
        if isinstance(found, str):
            return {"arch": arch, "weights": _escaped(found), "size": _SMALLEST}
    return None


def _escaped(path: str) -> str:
    """A path as a config has it, where a dollar sign begins a variable."""
    return path.replace("$", "$$")
