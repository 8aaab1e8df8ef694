"""``optimizer.params`` of a DeepSpeed config: the names that our Adam takes, and their values."""

from __future__ import annotations

import difflib
import math
from typing import Any

from cnn2gnn_dist.errors import UserError

KNOWN = (
    "lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "amsgrad", "foreach", "fused",
)  # fmt: skip
"""Parameters that torch's Adam and AdamW accept under DeepSpeed, except ``maximize`` and the like, which would
change the objective."""


def check_params(params: dict[str, Any]) -> None:
    """Check names and values; torch raises tracebacks for wrong ones, or trains to NaN.

    Args:
        params: with lr and weight decay resolved.

    Raises:
        UserError: an unknown name, or an invalid value.
    """  # noqa: DOC501
    for name in params:
        if name not in KNOWN:
            raise _unknown(name)
    if params.get("amsgrad"):
        raise UserError(
            "amsgrad keeps a third moment, which checkpoints don't have: a resumed run would differ",
            where="optimizer.params.amsgrad",
            remedy='"amsgrad": false, or remove it',
        )
    for name in ("torch_adam", "adam_w_mode", "amsgrad", "foreach", "fused"):
        if not isinstance(params.get(name, False), bool):
            raise UserError(
                f"{name} must be true or false, not {params[name]!r}",
                where=f"optimizer.params.{name}",
                remedy=f'"{name}": true, for example',
            )
    _check_numbers(params)


def _unknown(name: str) -> UserError:
    if name == "max_grad_norm":
        remedy = 'remove it; "gradient_clipping": "auto" and clip in the run\'s config do this'
    else:
        near = difflib.get_close_matches(name, KNOWN, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(KNOWN)}"
    return UserError(
        f"Adam has no parameter {name!r} here", where=f"optimizer.params.{name}", remedy=remedy
    )


def _check_numbers(params: dict[str, Any]) -> None:
    betas = params.get("betas", [0.9, 0.999])
    pair = isinstance(betas, list) and len(betas) == 2
    wanted = {
        "betas": (pair and all(is_number(beta, 0) and beta < 1 for beta in betas), "[0.9, 0.999]"),
        "eps": (is_number(params.get("eps", 1e-8), 0) and params.get("eps", 1e-8) > 0, "1e-8"),
        "weight_decay": (is_number(params["weight_decay"], 0), '"auto"'),
    }
    says = {
        "betas": "two numbers from 0 to below 1",
        "eps": "a number above 0",
        "weight_decay": "a number of at least 0",
    }
    for name, (right, example) in wanted.items():
        if not right:
            raise UserError(
                f"{name} must be {says[name]}, not {params[name]!r}",
                where=f"optimizer.params.{name}",
                remedy=f'"{name}": {example}, for example',
            )


def is_number(value: Any, least: float) -> bool:
    """Whether a value of a JSON file is a finite number of at least ``least``."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value) and value >= least
