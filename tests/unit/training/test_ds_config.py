"""ds_config.json: what is accepted, what is refused, and the arithmetic of batches."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.training import ds_config
from cnn2gnn_dist.training.accumulation import accumulation_for, small_micro_batches

SHIPPED = ds_config.PACKAGE.parent / "ds_config.json"


def resolve(ds: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "world_size": 2,
        "global_batch": 16,
        "accumulation": 2,
        "lr": 0.003,
        "weight_decay": 0.05,
        "clip": 1.5,
        "device": "cpu",
    }
    return ds_config.resolve(ds, **{**settings, **changes})


def written(folder: Path, text: str) -> Path:
    path = folder / "ds.json"
    path.write_text(text, encoding="utf-8")
    return path


def leaves(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return [leaf for child in node.values() for leaf in leaves(child)]
    return [node]


def test_the_shipped_file_resolves_without_autos() -> None:
    found = resolve(ds_config.load(SHIPPED))
    assert "auto" not in leaves(found)
    assert found["train_batch_size"] == 16
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 1.5
    assert found["optimizer"]["params"]["lr"] == 0.003
    assert found["optimizer"]["params"]["weight_decay"] == 0.05
    assert found["zero_optimization"]["stage"] == 2


@pytest.mark.parametrize(("device", "on"), [("cpu", False), ("cuda", True)])
def test_autocast_and_overlap_are_for_gpus(device: str, on: bool) -> None:
    found = resolve(ds_config.load(SHIPPED), device=device)
    assert found["torch_autocast"] == {"enabled": on, "dtype": "bfloat16"}
    assert found["zero_optimization"]["overlap_comm"] is on


def test_explicit_values_of_the_file_win_and_it_is_left_alone() -> None:
    ds: dict[str, Any] = {
        "gradient_clipping": 0.1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "torch_adam": True}},
        "zero_optimization": {"stage": 1, "overlap_comm": False},
        "torch_autocast": {"enabled": False},
    }
    before = copy.deepcopy(ds)
    found = resolve(ds, device="cuda")
    assert ds == before
    assert found["gradient_clipping"] == 0.1
    assert found["optimizer"]["params"]["lr"] == 0.003
    assert found["zero_optimization"] == {"stage": 1, "overlap_comm": False}
    assert found["torch_autocast"]["enabled"] is False
    assert resolve(ds, stage=3)["zero_optimization"]["stage"] == 3


def test_an_empty_file_gets_every_value_that_deepspeed_would_choose_otherwise() -> None:
    found = resolve({}, clip=0.0)
    assert found["gradient_clipping"] == 0.0  # DeepSpeed: 1.0
    assert found["optimizer"]["params"]["torch_adam"] is True  # DeepSpeed: compiles its own


def test_torch_adam_is_the_default_on_the_cpu() -> None:
    found = resolve({"optimizer": {"type": "AdamW", "params": {}}})
    assert found["optimizer"]["params"]["torch_adam"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"grad_clipping": 1}', ["grad_clipping", "gradient_clipping"]),
        ('{"train_batchsize": 1}', ["train_batchsize", "train_batch_size"]),
        ('{"elasticity": {}}', ["elasticity"]),
        ('{"optimizer": {}, "optimizer": {}}', ["optimizer", "twice"]),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', ["stage", "twice"]),
        ('{"optimizer": ', ["not valid JSON"]),
        ("[1]", ["object"]),
        ('{"gradient_clipping": NaN}', ["NaN is not a finite number"]),
        ('{"optimizer": {"params": {"eps": Infinity}}}', ["Infinity is not a finite number"]),
        ('{"tensorboard": {"x": [-Infinity]}}', ["-Infinity is not a finite number"]),
        ('{"gradient_clipping": 1e999}', ["1e999 is not a finite number"]),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, text: str, words: list[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        ds_config.load(path)
    for word in [*words, str(path)]:
        assert word in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere"):
        ds_config.load(tmp_path / "nowhere.json")


def test_the_default_is_the_file_here_then_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ds_config.load() == json.loads(SHIPPED.read_text())
    (tmp_path / "ds_config.json").write_text('{"steps_per_print": 7}')
    assert ds_config.load() == {"steps_per_print": 7}
    (tmp_path / "ds_config.json").unlink()
    monkeypatch.setattr(ds_config, "PACKAGE", tmp_path)
    (tmp_path / "ds_config.json").write_text('{"steps_per_print": 8}')
    monkeypatch.chdir("/")
    assert ds_config.load() == {"steps_per_print": 8}


@pytest.mark.parametrize(
    ("ds", "words"),
    [
        ({"train_batch_size": 32}, ["32", "16 = 2 ranks x 2 accumulated x 4"]),
        ({"train_micro_batch_size_per_gpu": 8}, ["train_micro_batch_size_per_gpu", "8"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps", "1"]),
        ({"bf16": {"enabled": True}}, ["bf16", "BatchNorm", "torch_autocast"]),
        ({"fp16": {"enabled": True}}, ["fp16", "torch_autocast"]),
        ({"optimizer": {"type": "Lamb"}}, ["Lamb", "AdamW"]),
        ({"optimizer": {"type": "AdamW", "params": {"eps": "auto"}}}, ["optimizer.params.eps"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "4"]),
        ({"zero_optimization": 2}, ["zero_optimization"]),
        ({"bf16": True}, ["bf16"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "warmup_epochs"]),
    ],
)
def test_what_cannot_work_is_refused(ds: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        resolve(ds)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("lr", [9.0, 0.0031, "0.003", None])
def test_a_learning_rate_that_would_be_ignored_is_refused(lr: object) -> None:
    with pytest.raises(
        UserError, match=re.escape(f"0.003: the file's {lr!r} would have no effect")
    ) as caught:
        resolve({"optimizer": {"params": {"lr": lr}}})
    assert caught.value.where == "optimizer.params.lr"
    assert resolve({"optimizer": {"params": {"lr": 1}}}, lr=1.0)["optimizer"]["params"]["lr"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, "1", True, None, [1]])
def test_clipping_is_a_number_from_0(value: object) -> None:
    with pytest.raises(UserError, match=re.escape(f"can't be clipped at {value!r}:")) as caught:
        resolve({"gradient_clipping": value})
    assert caught.value.where == "gradient_clipping"
    assert resolve({"gradient_clipping": 0})["gradient_clipping"] == 0


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("betas", [0.9], "two numbers from 0 to below 1, not [0.9]"),
        ("betas", 0.9, "two numbers from 0 to below 1, not 0.9"),
        ("betas", [0.9, 1], "two numbers from 0 to below 1, not [0.9, 1]"),
        ("betas", [0.9, "x"], "two numbers from 0 to below 1, not [0.9, 'x']"),
        ("betas", [-0.1, 0.9], "two numbers from 0 to below 1, not [-0.1, 0.9]"),
        ("eps", "x", "a number above 0, not 'x'"),
        ("eps", 0, "a number above 0, not 0"),
        ("weight_decay", -1, "a number of at least 0, not -1"),
        ("weight_decay", None, "a number of at least 0, not None"),
    ],
)
def test_adams_numbers_are_checked_before_torch_meets_them(
    name: str, value: object, says: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolve({"optimizer": {"params": {name: value}}})
    assert (caught.value.what, caught.value.where) == (
        f"{name} must be {says}",
        f"optimizer.params.{name}",
    )
    fine = {"betas": [0, 0.5], "eps": 1e-4, "weight_decay": 0}
    assert resolve({"optimizer": {"params": fine}})["optimizer"]["params"] | fine == {
        **fine,
        "lr": 0.003,
        "torch_adam": True,
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["float16", "fp16", "half", "torch.float16", "int8", "bf17"])
def test_autocast_is_bfloat16_or_refused(name: str, device: str) -> None:
    for enabled in ({}, {"enabled": "auto"}, {"enabled": True}):
        with pytest.raises(UserError) as caught:
            resolve({"torch_autocast": {"dtype": name, **enabled}}, device=device)
        assert name in caught.value.what
        assert caught.value.where == "torch_autocast.dtype"
    for remedy in ({"dtype": "bfloat16"}, {"dtype": name, "enabled": False}):  # as it says
        found = resolve({"torch_autocast": remedy}, device=device)["torch_autocast"]
        assert found["enabled"] is (device == "cuda" and "enabled" not in remedy)


def test_autocast_without_a_dtype_is_not_left_to_torch() -> None:
    """Torch's default on GPUs is float16."""
    for ds in ({}, {"torch_autocast": {"enabled": True}}, {"torch_autocast": {"dtype": "auto"}}):
        assert resolve(ds, device="cuda")["torch_autocast"]["dtype"] == "bfloat16"


def test_gradients_in_float16_are_refused() -> None:
    with pytest.raises(UserError, match="float16"):
        resolve({"communication_data_type": "fp16"})
    assert resolve({"communication_data_type": "bf16"})["communication_data_type"] == "bf16"


def test_what_agrees_with_the_arithmetic_is_fine() -> None:
    ds = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": False}}
    assert resolve(ds)["train_micro_batch_size_per_gpu"] == 4


@pytest.mark.parametrize(
    ("batch", "world", "accumulation"), [(16, 3, 1), (16, 2, 3), (1, 2, 1), (6, 4, 1)]
)
def test_batches_that_do_not_divide(batch: int, world: int, accumulation: int) -> None:
    with pytest.raises(UserError) as caught:
        resolve({}, global_batch=batch, world_size=world, accumulation=accumulation)
    assert f"{batch} is not {world} ranks x {accumulation}" in str(caught.value)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("share", [1, 2, 12, 30, 31])
@pytest.mark.parametrize("most", [1, 2, 5, 8, 64])
def test_accumulation_is_the_smallest_that_fits(world: int, share: int, most: int) -> None:
    found = accumulation_for(world * share, world, most)
    fits = [a for a in range(1, share + 1) if share % a == 0 and share // a <= most]
    assert found == min(fits)
    resolved = resolve({}, global_batch=world * share, world_size=world, accumulation=found)
    assert resolved["train_batch_size"] == (
        resolved["train_micro_batch_size_per_gpu"] * found * world
    )


@pytest.mark.parametrize(("world", "share", "most"), [(2, 127, 64), (1, 130, 64), (3, 31, 8)])
def test_tiny_micro_batches_are_named_with_a_batch_that_has_none(
    world: int, share: int, most: int
) -> None:
    sizes = world * share, world
    said = small_micro_batches(*sizes, accumulation_for(*sizes, most), most, "teacher.global_batch")
    assert said is not None
    better = int(said.rpartition("teacher.global_batch=")[2]), world
    assert better[0] >= sizes[0]
    found = accumulation_for(*better, most)
    assert most / 2 <= better[0] / world / found <= most
    assert small_micro_batches(*better, found, most, "") is None


@pytest.mark.parametrize(("share", "most"), [(128, 64), (1, 256), (100, 64), (8, 256), (3, 2)])
def test_micro_batches_as_large_as_they_can_be_are_not_named(share: int, most: int) -> None:
    found = accumulation_for(share, 1, most)
    assert small_micro_batches(share, 1, found, most, "") is None


def test_accumulation_says_the_arithmetic() -> None:
    with pytest.raises(UserError) as caught:
        accumulation_for(100, 3, 64)
    assert "100 / 3 = 33.33" in str(caught.value)
    assert "102" in str(caught.value)


def test_deepspeed_knows_every_key_we_let_through() -> None:
    """Every name in the list of accepted keys occurs in DeepSpeed's source."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None
    assert spec.submodule_search_locations
    source = "".join(
        path.read_text(encoding="utf-8", errors="replace")
        for path in Path(spec.submodule_search_locations[0]).rglob("*.py")
        if path.name in ("constants.py", "config.py")
    )
    unknown = [k for k in ds_config.KNOWN_KEYS if not re.search(f"[\"']{k}[\"']", source)]
    assert unknown == []


def test_sgd_takes_the_place_of_the_files_adam_with_its_weight_decay() -> None:
    shipped = ds_config.load(SHIPPED)
    found = resolve(shipped, optimizer="sgd", momentum=0.85)
    assert found["optimizer"] == {
        "type": "SGD",
        "params": {"lr": 0.003, "weight_decay": 0.05, "momentum": 0.85, "nesterov": True},
    }
    assert found["zero_allow_untested_optimizer"] is True
    shipped["optimizer"]["params"]["weight_decay"] = 0.25
    assert resolve(shipped, optimizer="sgd")["optimizer"]["params"]["weight_decay"] == 0.25
    assert "zero_allow_untested_optimizer" not in resolve(shipped)


def test_sgd_in_the_file_is_refused_with_the_field_that_sets_it() -> None:
    shipped = ds_config.load(SHIPPED)
    shipped["optimizer"]["type"] = "SGD"
    with pytest.raises(UserError, match=r"teacher\.optimizer=sgd"):
        resolve(shipped)


@pytest.mark.parametrize(
    ("params", "remedy"),
    [
        ({"weight_decy": 0.1}, "did you mean 'weight_decay'?"),
        ({"beta": [0.9, 0.999]}, "did you mean 'betas'?"),
        ({"max_grad_norm": 1.0}, "gradient_clipping"),
        ({"maximize": True}, "one of lr, betas"),
        ({"amsgrad": True}, '"amsgrad": false'),
        ({"torch_adam": "yes"}, '"torch_adam": true'),
    ],
)
def test_parameters_that_adam_does_not_take(params: dict[str, Any], remedy: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve({"optimizer": {"params": params}})
    assert caught.value.where == f"optimizer.params.{next(iter(params))}"
    assert remedy in caught.value.remedy
    resolve({"optimizer": {"params": {"amsgrad": False, "foreach": True}}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"optimizer": {"params": {"weight_decy": 0.1}}}', "no parameter 'weight_decy'"),
        ('{"train_batch_size": 7}', "train_batch_size is 7 in the file"),
        ('{"fp16": {"enabled": true}}', "casts BatchNorm weights"),
        ('{"zero_optimization": {"stage": 4}}', "ZeRO has no stage 4"),
    ],
)
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_a_config_is_refused_before_anything_is_paid_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, content: str, message: str
) -> None:
    from cnn2gnn_dist import cli

    file = written(tmp_path, content)
    call = ["run", "--config", "demo", f"run.dir={tmp_path}/run", f"{model}.ds_config={file}"]
    assert cli.main([*call, "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert f"{file}: " in told
