"""Keys of a DeepSpeed config: what would be ignored or end in a traceback is refused by name."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.training import ds_config, ds_keys


def refusal(folder: Path, config: dict[str, Any]) -> UserError:
    file = folder / "ds.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        ds_config.load(file)
    return caught.value


@pytest.mark.parametrize(
    ("config", "where", "remedy"),
    [
        ({"zero_optimisation": {"stage": 3}}, "zero_optimisation", "'zero_optimization'"),
        ({"zero_optimization": {"stge": 3}}, "zero_optimization.stge", "'stage'"),
        ({"optimizer": {"type": "AdamW", "param": {"betas": [0.5, 0.9]}}}, "optimizer.param", "params"),
        ({"torch_autocast": {"enable": True}}, "torch_autocast.enable", "'enabled'"),
        ({"data_types": {"grad_accum": "fp32"}}, "data_types.grad_accum", "'grad_accum_dtype'"),
    ],
)  # fmt: skip
def test_a_misspelled_key_is_refused_also_inside_a_block(tmp_path, config, where, remedy):
    error = refusal(tmp_path, config)
    assert error.where == f"{tmp_path / 'ds.json'}: {where}"
    assert remedy in error.remedy


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"zero_optimization": {"reduce_bucket_size": "5e8"}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size"),
        ({"zero_optimization": {"sub_group_size": 1.5}}, "zero_optimization.sub_group_size"),
        ({"zero_optimization": {"reduce_scatter": "yes"}}, "zero_optimization.reduce_scatter"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_optimization.zero_quantized_weights"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow"),
        ({"steps_per_print": 0}, "steps_per_print"),
        ({"steps_per_print": "10"}, "steps_per_print"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled"),
        ({"fp16": {"enabled": "true"}}, "fp16.enabled"),
    ],
)  # fmt: skip
def test_a_value_that_would_end_in_a_traceback_is_refused(tmp_path, config, where):
    assert refusal(tmp_path, config).where.endswith(f": {where}")


def test_what_others_write_is_read(tmp_path):
    """Sizes such as 5e8, features that are switched off, the byte order mark of Windows editors."""
    zero = {"stage": 2, "reduce_bucket_size": 5e8, "zero_quantized_weights": False, "zenflow": None}
    config = {"zero_optimization": zero, "bf16": {"enabled": False}, "steps_per_print": 10}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(config), encoding="utf-8-sig")
    assert ds_config.load(file) == config


@pytest.mark.parametrize("stage", [True, "2", 4, 1.5])
def test_a_stage_is_one_of_four_numbers(stage):
    with pytest.raises(UserError, match="ZeRO has no stage"):
        ds_config.resolve(
            {"zero_optimization": {"stage": stage}},
            world_size=1, global_batch=8, accumulation=1, lr=0.1, weight_decay=0.0, clip=0.0, device="cpu",
        )  # fmt: skip


def test_zero_has_these_fields_of_these_types():
    """DeepSpeed's own class, read and not imported: a release that changes a field fails here."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.submodule_search_locations
    source = Path(spec.submodule_search_locations[0]) / "runtime" / "zero" / "config.py"
    classes = [n for n in ast.parse(source.read_text("utf-8")).body if isinstance(n, ast.ClassDef)]
    fields = next(one for one in classes if one.name == "DeepSpeedZeroConfig").body
    kinds: dict[str, str] = {}
    for field in fields:
        if not isinstance(field, ast.AnnAssign):
            continue
        kind = ast.unparse(field.annotation)
        aliases = re.findall(r"alias='(\w+)'", ast.unparse(field))
        for name in (ast.unparse(field.target), *aliases):
            kinds[name] = "flag" if "bool" in kind else kind
    assert set(ds_keys.BLOCKS["zero_optimization"]) == kinds.keys()
    lossy = ds_keys.ZERO_LOSSY
    assert {name for name, kind in kinds.items() if kind == "flag"} - lossy == ds_keys.ZERO_FLAGS
    assert {name for name, kind in kinds.items() if kind == "int"} == ds_keys.ZERO_NUMBERS
