"""``ds_config.json``: located, checked and resolved for the given ranks. Pure; no DeepSpeed here.

DeepSpeed silently ignores unknown top-level keys, drops "auto" or keeps it as a string, and
clips at 1.0 by default; so every key is checked and every value written out.
"""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from cnn2gnn_dist.config import StudentConfig, TeacherConfig
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.training.adam_params import check_params, is_number
from cnn2gnn_dist.training.ds_keys import KNOWN_KEYS, check_keys
from cnn2gnn_dist.training.precision import choose

PACKAGE = Path(__file__).resolve().parent.parent

EXECUTION = KNOWN_KEYS - {
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "torch_autocast",
    "bf16",
    "fp16",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "data_types",
    "seq_parallel_communication_data_type",
}
"""Keys that change how a result is computed, or what is printed on the way. They include the batch
sizes: these must agree with the run's config, which sets them.
"""
_DEFAULTS = {
    "optimizer.type": "AdamW",
    "optimizer.params.betas": [0.9, 0.999],
    "optimizer.params.eps": 1e-8,
    "torch_autocast.dtype": "bfloat16",
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "bf16.enabled": False,
    "fp16.enabled": False,
}
_SAME_NUMBERS = {"optimizer.params.torch_adam"}


BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Keys of the batch sizes: of a step, of a rank's micro-batch, and their number."""
BFLOAT16 = ("bfloat16", "bf16", "torch.bfloat16")
"""DeepSpeed's names for bfloat16."""


def load(path: str | Path | None = None) -> dict[str, Any]:
    """Read a DeepSpeed config; by default ``./ds_config.json``, else the packaged one.

    Raises:
        UserError: missing, not JSON, a duplicate or unknown key, a value of the wrong kind, a number that is
            not finite.
    """
    file = Path(path) if path is not None else _default()
    try:
        raw = json.loads(
            file.read_text(encoding="utf-8-sig"),  # Windows editors write a BOM
            object_pairs_hook=_no_duplicates,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except OSError as error:
        raise UserError(
            f"the DeepSpeed config can't be read: {error.strerror}",
            where=str(file),
            remedy="name an existing file, or none: teacher.ds_config=null student.ds_config=null",
        ) from None
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", where=str(file), remedy="fix it") from None
    if not isinstance(raw, dict):
        raise UserError(
            "a DeepSpeed config must be an object", where=str(file), remedy="see ds_config.json"
        )
    try:
        check_keys(raw)
    except UserError as error:
        raise UserError(error.what, where=f"{file}: {error.where}", remedy=error.remedy) from None
    return raw


def outcome(ds: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config (as read) that results depend on, by dotted path.

    Only those that differ from what they would be without the file. "auto" takes its value from the run's
    config, so it is not among them.
    """
    found: dict[str, Any] = {}

    def collect(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                collect(child, f"{path}.{key}")
        elif node != "auto" and path not in _SAME_NUMBERS and node != _DEFAULTS.get(path):
            found[path] = node

    for key in sorted(ds.keys() - EXECUTION):
        collect(ds[key], key)
    return found


def resolve(
    ds: dict[str, Any],
    *,
    world_size: int,
    global_batch: int,
    accumulation: int,
    lr: float,
    weight_decay: float,
    clip: float,
    device: str,
    stage: int | None = None,
    precision: str = "auto",
    optimizer: str = "adamw",
    momentum: float = 0.9,
) -> dict[str, Any]:
    """Fill in every "auto"; the batch stays global = micro x accumulation x ranks.

    Args:
        ds: as returned by ``load``.
        world_size: number of ranks.
        global_batch: samples of an optimizer step over all ranks.
        accumulation: micro-batches per optimizer step and rank.
        lr: peak learning rate, from the run's config.
        weight_decay: from the run's config.
        clip: maximum gradient norm, 0 = off.
        device: "cpu" or "cuda"; on the CPU overlapped communication is off, and so is DeepSpeed's autocast,
            which also rounds gradients: there the models cast (``models.precision``).
        stage: ZeRO stage, overriding the file's.
        precision: the run's ``precision``: auto, float32 or bfloat16.
        optimizer: "adamw", as the file describes it, or "sgd", for which the file may only set the weight decay.
        momentum: of sgd.

    Raises:
        UserError: the file fixes a batch size or learning rate that contradicts, a mode that can't
            work, or a value that is not a number.
    """
    config = deepcopy(ds)
    _resolve_batches(config, world_size, global_batch, accumulation)
    _refuse_modes(config)
    zero = _block(config, "zero_optimization")
    zero["stage"] = stage if stage is not None else _auto(zero.get("stage", "auto"), 2)
    if isinstance(zero["stage"], bool) or zero["stage"] not in (0, 1, 2, 3):
        raise UserError(
            f"ZeRO has no stage {zero['stage']!r}",
            where="zero_optimization.stage",
            remedy="0, 1, 2 or 3",
        )
    on_gpu = device == "cuda"
    zero["overlap_comm"] = on_gpu and _auto(zero.get("overlap_comm", "auto"), True)
    autocast = _block(config, "torch_autocast")
    _refuse_half(autocast, config)
    autocast["enabled"] = on_gpu and choose(precision, device, ds) == torch.bfloat16
    _resolve_clipping(config, clip)
    _resolve_optimizer(_block(config, "optimizer"), lr, weight_decay, on_gpu)
    if optimizer == "sgd":
        _use_sgd(config, momentum)
    config.setdefault("steps_per_print", 10**9)
    _refuse_auto(config, "")
    return config


def resolve_for(
    ds: dict[str, Any],
    settings: TeacherConfig | StudentConfig,
    world_size: int,
    accumulation: int,
    device: str,
    *,
    precision: str,
) -> dict[str, Any]:
    """``resolve`` for the training of a model with these settings."""
    return resolve(
        ds,
        world_size=world_size,
        global_batch=settings.global_batch,
        accumulation=accumulation,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        device=device,
        stage=settings.zero_stage,
        precision=precision,
        optimizer=settings.optimizer,
        momentum=settings.momentum,
    )


def _resolve_batches(
    config: dict[str, Any], world_size: int, global_batch: int, accumulation: int
) -> None:
    micro, rest = divmod(global_batch, world_size * accumulation)
    if rest or not micro:
        raise UserError(
            f"global batch {global_batch} is not {world_size} ranks x {accumulation} "
            "micro-batches x an integer",
            where="global_batch",
            remedy="a multiple of ranks x accumulation",
        )
    for key, value in zip(BATCHES, (global_batch, micro, accumulation), strict=True):
        if config.get(key, "auto") not in ("auto", value):
            raise UserError(
                f"{key} is {config[key]} in the file, but {global_batch} = {world_size} ranks x "
                f"{accumulation} accumulated x {micro} requires {value}",
                where=key,
                remedy='set it to "auto", or change the global batch',
            )
        config[key] = value


def _refuse_modes(config: dict[str, Any]) -> None:
    for mode in ("fp16", "bf16"):
        if mode in config and _block(config, mode).get("enabled") is True:
            raise UserError(
                f'"{mode}" casts BatchNorm weights but not its buffers, and crashes',
                where=f"{mode}.enabled",
                remedy='use "torch_autocast": {"enabled": "auto", "dtype": "bfloat16"}',
            )
    if "scheduler" in config:
        raise UserError(
            "the learning rate is set at every step, so a scheduler would have no effect",
            where="scheduler",
            remedy="remove it; see lr, warmup_epochs and epochs in the run's config",
        )


def _refuse_half(autocast: dict[str, Any], config: dict[str, Any]) -> None:
    """Allow only bfloat16, also on the CPU, where the same file would pass without effect."""
    # DeepSpeed would leave the choice to torch, whose default on GPUs is float16.
    dtype = autocast["dtype"] = _auto(autocast.get("dtype", "auto"), "bfloat16")
    if autocast.get("enabled", "auto") is not False and dtype not in BFLOAT16:
        raise UserError(
            f"autocast to {dtype!r} is not supported: float16 needs loss scaling, without which "
            "small gradients vanish and training diverges",
            where="torch_autocast.dtype",
            remedy='"dtype": "bfloat16", or "enabled": false',
        )
    for key in ("communication_data_type", "seq_parallel_communication_data_type"):
        if str(config.get(key)).lower() == "fp16":
            raise UserError(
                "gradients can't be summed in float16: without loss scaling small ones vanish",
                where=key,
                remedy='"fp32" or "bf16", or remove it',
            )


def _resolve_clipping(config: dict[str, Any], clip: float) -> None:
    clipping = config["gradient_clipping"] = _auto(config.get("gradient_clipping", "auto"), clip)
    if not is_number(clipping, 0):
        raise UserError(
            f"gradients can't be clipped at {clipping!r}: the largest norm must be at least 0 (off)",
            where="gradient_clipping",
            remedy='"auto", for the clip of the run\'s config, or a number of at least 0',
        )


def _resolve_optimizer(
    optimizer: dict[str, Any], lr: float, weight_decay: float, on_gpu: bool
) -> None:
    kind = optimizer.setdefault("type", "AdamW")
    if kind not in ("Adam", "AdamW"):
        raise UserError(
            f"the optimizer {kind!r} is not supported: checkpoints name Adam's moments",
            where="optimizer.type",
            remedy='"AdamW" with "torch_adam": true, here; for SGD teacher.optimizer=sgd or '
            "student.optimizer=sgd in the run's config",
        )
    params = _block(optimizer, "params", "optimizer.params")
    params["lr"] = _auto(params.get("lr", "auto"), lr)
    if params["lr"] != lr:
        raise UserError(
            f"the learning rate is set at every step from the run's config, where it is {lr:g}: "
            f"the file's {params['lr']!r} would have no effect",
            where="optimizer.params.lr",
            remedy='"auto", and lr in the run\'s config',
        )
    params["weight_decay"] = _auto(params.get("weight_decay", "auto"), weight_decay)
    check_params(params)
    if not on_gpu:
        # Otherwise DeepSpeed compiles its own Adam, for more than a minute.
        params["torch_adam"] = True
    params.setdefault("torch_adam", True)


def _use_sgd(config: dict[str, Any], momentum: float) -> None:
    """Replace Adam by SGD with Nesterov's momentum, with the same learning rate and weight decay."""
    adam = config["optimizer"]["params"]
    kept = {name: adam[name] for name in ("lr", "weight_decay")}
    config["optimizer"] = {
        "type": "SGD",
        "params": {**kept, "momentum": momentum, "nesterov": True},
    }
    config["zero_allow_untested_optimizer"] = (
        True  # ZeRO would refuse it; our tests cover all stages
    )


def _block(config: dict[str, Any], key: str, where: str = "") -> dict[str, Any]:
    """The object under a key, created when missing."""
    found = config.setdefault(key, {})
    if not isinstance(found, dict):
        raise UserError(
            f"{key} must be an object, not {found!r}",
            where=where or key,
            remedy="see the ds_config.json that comes with the package",
        )
    return found


def _auto(value: Any, default: Any) -> Any:
    return default if value == "auto" else value


def _refuse_auto(node: Any, where: str) -> None:
    if node == "auto":
        raise UserError('no value is known for this "auto"', where=where[1:], remedy="give one")
    for key, child in node.items() if isinstance(node, dict) else ():
        _refuse_auto(child, f"{where}.{key}")


def _default() -> Path:
    here = Path("ds_config.json")
    packaged = PACKAGE / "ds_config.json"
    if here.is_file():
        return here
    return packaged if packaged.is_file() else PACKAGE.parent / "ds_config.json"


def _finite(text: str) -> float:
    """Parse a number of the file; Python would also accept NaN, Infinity and 1e999, which JSON does not have."""
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is not a finite number")
    return float(text)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} appears twice")
        found[key] = value
    return found
