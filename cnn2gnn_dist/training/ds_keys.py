"""Keys of a DeepSpeed config: which exist, and what kinds of value they take. Pure; no DeepSpeed here.

DeepSpeed ignores a misspelled key at the top, in the optimizer and in the autocast block without a word, and
raises a traceback for one in ZeRO's block, after the images have been packed and indexed.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from cnn2gnn_dist.errors import UserError

KNOWN_KEYS = frozenset(
    [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        "scheduler",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "torch_autocast",
        "bf16",
        "fp16",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "steps_per_print",
        "wall_clock_breakdown",
        "dump_state",
        "memory_breakdown",
        "flops_profiler",
        "tensorboard",
        "csv_monitor",
        "wandb",
        "comms_logger",
        "activation_checkpointing",
        "checkpoint",
        "data_types",
        "dataloader_drop_last",
        "seq_parallel_communication_data_type",
        "compile",
    ]
)

ZERO_FLAGS = frozenset(
    [
        "contiguous_gradients",
        "reduce_scatter",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "cpu_offload",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "gather_16bit_weights_on_model_save",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "use_all_reduce_for_fetch_params",
        "stage3_use_all_reduce_for_fetch_params",
        "allgather_sequential",
        "stage3_allgather_sequential",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "parameter_alignment",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
    ]
)
ZERO_NUMBERS = frozenset(
    [
        "reduce_bucket_size",
        "allgather_bucket_size",
        "sub_group_size",
        "zero_hpz_partition_size",
        *(
            f"{prefix}{name}"
            for prefix in ("", "stage3_")
            for name in (
                "prefetch_bucket_size",
                "param_persistence_threshold",
                "model_persistence_threshold",
                "max_live_parameters",
                "max_reuse_distance",
                "module_granularity_threshold",
            )
        ),
    ]
)
"""Whole numbers of at least 0."""
ZERO_LOSSY = frozenset(
    [
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "zenflow",
    ]
)
"""What changes results: weights or gradients are rounded on their way, or arrive steps late."""
_ZERO = {"stage", "offload_param", "offload_optimizer", "leaf_module"}

BLOCKS: dict[str, Collection[str]] = {
    "zero_optimization": _ZERO | ZERO_FLAGS | ZERO_NUMBERS | ZERO_LOSSY,
    "optimizer": ("type", "params", "legacy_fusion"),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
    "data_types": ("grad_accum_dtype",),
}
"""The keys of the blocks whose misspelled keys would change results or end a run late."""


def check_keys(config: dict[str, Any]) -> None:
    """Check the keys of a config as read, and the values of those that DeepSpeed would not explain.

    Raises:
        UserError: an unknown key, also in a block; a value of the wrong kind; ``where`` is the dotted key.
    """  # noqa: DOC501
    for key in config:
        if key not in KNOWN_KEYS:
            raise _unknown(key, key, KNOWN_KEYS)
    for block, known in BLOCKS.items():
        inside = config.get(block)
        for key in inside if isinstance(inside, dict) else ():
            if key not in known:
                raise _unknown(f"{block}.{key}", key, known)
    zero = config.get("zero_optimization")
    if isinstance(zero, dict):
        _check_zero(zero)
    printed = config.get("steps_per_print", 1)
    if not (_is_whole(printed) and printed >= 1):
        raise UserError(
            f"steps_per_print must be a whole number of at least 1, not {printed!r}",
            where="steps_per_print",
            remedy='"steps_per_print": 1000000000 prints nothing',
        )
    for mode in ("bf16", "fp16"):
        inside = config.get(mode)
        enabled = inside.get("enabled", False) if isinstance(inside, dict) else False
        if not isinstance(enabled, bool) and enabled != "auto":
            raise UserError(
                f"enabled must be true or false, not {enabled!r}",
                where=f"{mode}.enabled",
                remedy='"enabled": false',
            )


def _check_zero(zero: dict[str, Any]) -> None:
    for key, value in zero.items():
        if value == "auto":  # whether one is known is decided later
            continue
        where = f"zero_optimization.{key}"
        if key in ZERO_LOSSY and value not in (False, None):
            raise UserError(
                f"{key} changes the results, and a run's records would not say so",
                where=where,
                remedy="remove it",
            )
        if key in ZERO_FLAGS and not isinstance(value, bool):
            raise UserError(
                f"{key} must be true or false, not {value!r}", where=where, remedy=f'"{key}": true'
            )
        least = 1 if key == "reduce_bucket_size" else 0
        if key in ZERO_NUMBERS and not (_is_whole(value) and value >= least):
            raise UserError(
                f"{key} must be a whole number of at least {least}, not {value!r}",
                where=where,
                remedy=f'"{key}": 50000000, for example',
            )


def _is_whole(value: Any) -> bool:
    """Whether a value of a JSON file is a whole number; 5e8 is one, though a float."""
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, int) and not isinstance(value, bool)


def _unknown(where: str, key: str, known: Collection[str]) -> UserError:
    near = difflib.get_close_matches(key, known, 1)
    block = where.rpartition(".")[0]
    what = f"DeepSpeed has no key {key!r}" + (f" in {block}" if block else "")
    if block != "zero_optimization":
        what += " (it would silently ignore it)"
    return UserError(
        what, where=where, remedy=f"did you mean {near[0]!r}?" if near else "remove it"
    )
