"""Which precision is chosen, and what bfloat16 changes in the models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnn2gnn_dist import settings
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.precision import MixedPrecision
from cnn2gnn_dist.models.student import Student
from cnn2gnn_dist.pipeline import key_defaults, keys
from cnn2gnn_dist.pipeline.registry import stages_of
from cnn2gnn_dist.stages.shared.networks import Teacher
from cnn2gnn_dist.training import ds_config, precision
from tests.support.runs import MICRO


def file(enabled: Any) -> dict[str, Any]:
    return {"torch_autocast": {"enabled": enabled, "dtype": "bfloat16"}}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("has", [False, True])
def test_auto_follows_the_device_unless_the_file_says_no(
    monkeypatch: pytest.MonkeyPatch, device: str, has: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has, raising=False)
    low = torch.bfloat16 if has or device == "cuda" else torch.float32
    for ds in ({}, file("auto"), file(True)):
        assert precision.choose("auto", device, ds) == low
    assert precision.choose("auto", device, file(False)) == torch.float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_set_holds_and_a_contradiction_is_refused(device: str) -> None:
    assert precision.choose("bfloat16", device, file("auto")) == torch.bfloat16
    assert precision.choose("float32", device, file("auto")) == torch.float32
    assert precision.choose("float32", device, file(False)) == torch.float32
    for name, enabled in (("float32", True), ("bfloat16", False)):
        with pytest.raises(UserError, match=f"precision={name}.*{str(enabled).lower()}"):
            precision.choose(name, device, file(enabled))


def test_deepspeed_casts_on_gpus_only() -> None:
    how: dict[str, Any] = {"world_size": 1, "global_batch": 2, "accumulation": 1, "lr": 1.0}
    how.update(weight_decay=0.0, clip=0.0)
    for name, device, on in (
        ("bfloat16", "cuda", True), ("float32", "cuda", False), ("bfloat16", "cpu", False),
    ):  # fmt: skip
        found = ds_config.resolve({}, device=device, precision=name, **how)
        assert found["torch_autocast"]["enabled"] is on


def teacher() -> MixedPrecision:
    torch.manual_seed(0)
    return Teacher(settings.load("demo", MICRO), 10, initial=False)


def student(scope: Any) -> MixedPrecision:
    torch.manual_seed(0)
    stem = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 24), nn.ReLU(),
    )  # fmt: skip
    return Student(stem, 24, 8, 16, 10, 0, 3, scope, (0.5,) * 3, (0.25,) * 3)


def images() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (16, 16, 16, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("build", [teacher, lambda: student("none"), lambda: student("batch")])
def test_bfloat16_rounds_activations_and_nothing_that_is_kept(build: Any) -> None:
    model = build()
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.compute_dtype = dtype
        model.zero_grad()
        seen: list[torch.dtype] = []
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        hook = conv.register_forward_hook(lambda m, i, out, seen=seen: seen.append(out.dtype))
        output = model(images())
        hook.remove()
        logits = output if isinstance(output, Tensor) else output.logits_BC
        logits.float().logsumexp(1).sum().backward()
        assert seen == [dtype]
        assert not torch.is_autocast_enabled("cpu")
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert all(g.dtype == torch.float32 for g in gradients.values())
        if not isinstance(output, Tensor):
            assert output.z_Bd.dtype == torch.float32
            if output.weights_BF is not None:
                assert output.weights_BF.dtype == torch.float32
        found[dtype] = logits.float().detach(), gradients
    exact, rounded = found[torch.float32], found[torch.bfloat16]
    assert not torch.equal(exact[0], rounded[0])
    assert (exact[0] - rounded[0]).abs().max() < 0.05 * exact[0].abs().max()
    every = [torch.cat([g.flatten() for g in one[1].values()]) for one in (exact, rounded)]
    assert torch.nn.functional.cosine_similarity(*every, dim=0) > 0.99


def test_it_is_in_the_keys_of_what_computes_and_only_where_it_is_set() -> None:
    auto = settings.load("demo", MICRO)
    low = settings.load("demo", [*MICRO, "precision=bfloat16"])
    for stage in stages_of(auto):
        before, after = (
            keys.key_of(stage, keys.parts(config, stage, {}), {}) for config in (auto, low)
        )
        assert (before != after) == (stage.name not in ("pack", "index", "model")), stage.name
    assert key_defaults.DEFAULTS["precision"] == "auto"  # as before the field existed
    with pytest.raises(UserError, match="precision"):
        settings.load("demo", [*MICRO, "precision=float16"])
