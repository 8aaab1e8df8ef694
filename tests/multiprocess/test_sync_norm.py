"""SyncNorm: a network on several ranks equals the one in one process, whatever the stem's layers are."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cnn2gnn_dist.compat import import_timm
from cnn2gnn_dist.config import Config, StudentConfig
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.stem import build_stem
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.training import sync_norm
from cnn2gnn_dist.training.sync_norm import SyncNorm, is_synchronised, synchronise_norms
from tests.support import rank_group

# Small members of timm's families; the arguments make them even smaller.
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32]},
    "mobilenetv3_small_050": {},
    "tinynet_e": {},  # an EfficientNet
    "regnetx_002": {},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "vit_tiny_patch16_224": {"depth": 2},
    "ghostnet_050": {"drop_rate": 0.0},
    "rexnet_100": {"depth_mult": 0.5, "drop_rate": 0.0},
    "dla46_c": {},
    "repvgg_a0": {},
    "levit_128s": {},
    "ese_vovnet19b_slim_dw": {},
}
SIDE, BATCH, DIM = 32, 8, 16


def stem_of(name: str) -> nn.Module:
    """A stem with statistics as after some training, and with weights that are not all 0 or 1."""
    torch.manual_seed(0)
    stem = build_stem(name, DIM, SIDE, **FAMILIES[name])
    for tensor in (*stem.parameters(), *stem.buffers()):
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.data += 0.1 * torch.rand_like(tensor)
    return stem


def images() -> Tensor:
    return torch.randn(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def furthest(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


# --- one process ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_one_process_sees_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluation is bit-identical; training uses SyncNorm's own arithmetic, as on several ranks."""
    plain = stem_of(name)
    ours = synchronise_norms(deepcopy(plain))
    assert is_synchronised(ours)  # at least the readout has a BatchNorm1d
    assert list(ours.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(ours.eval()(images()), plain.eval()(images()))
        assert torch.equal(ours.train()(images()), plain.train()(images()))
    monkeypatch.setattr(SyncNorm, "forward", lambda self, x: self._normalised(x))
    plain, ours = plain.double(), ours.double()
    x = images().double()
    assert furthest(ours.train()(x), plain.train()(x)) < 1e-7
    for (key, mine), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert furthest(mine.double(), theirs.double()) < 1e-7, key


def test_timms_activation_and_drop_are_kept() -> None:
    import_timm()
    from timm.layers.norm_act import BatchNormAct2d

    def norm(rate: float) -> nn.Module:
        return BatchNormAct2d(3, act_layer="silu", drop_layer=lambda: nn.Dropout(rate))

    x = torch.randn(8, 3, 4, 4)
    plain, ours = norm(0.0), synchronise_norms(nn.Sequential(norm(0.0)))[0]
    ours.load_state_dict(plain.state_dict())
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x.clone()), plain.train(mode)(x.clone()))
    torch.testing.assert_close(ours.train()._normalised(x), plain.train()(x.clone()))
    dropped = synchronise_norms(nn.Sequential(norm(1.0)))[0].train()
    assert (dropped._normalised(x) == 0).all()  # silu(0)
    assert isinstance(ours, BatchNormAct2d)


def test_changing_twice_and_shared_layers() -> None:
    norm = nn.BatchNorm2d(3)
    net = synchronise_norms(synchronise_norms(nn.ModuleList([norm, norm])))
    assert net[0] is net[1] is norm
    assert isinstance(norm, SyncNorm)
    assert isinstance(norm, nn.BatchNorm2d)
    alone = synchronise_norms(nn.BatchNorm1d(3))
    assert isinstance(alone, SyncNorm)


def strange() -> dict[str, Callable[[], nn.Module]]:
    """Layers that use batch statistics and are not exactly a BatchNorm."""
    import_timm()
    from timm.layers import inplace_abn
    from timm.layers.evo_norm import EvoNorm2dB0
    from timm.layers.norm_act import SyncBatchNormAct
    from timm.layers.split_batchnorm import SplitBatchNorm2d
    from torch.nn.utils import parametrize
    from torchvision.ops.misc import FrozenBatchNorm2d

    class Own(nn.BatchNorm2d):
        """A user's subclass."""

    def parametrised() -> nn.Module:
        norm = nn.BatchNorm2d(3)
        parametrize.register_parametrization(norm, "weight", nn.Identity())
        return norm

    return {
        "Own": lambda: Own(3),
        "InplaceAbn": lambda: inplace_abn.InplaceAbn(3),
        "FrozenBatchNorm2d": lambda: FrozenBatchNorm2d(3),
        "SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
        "SyncBatchNormAct": lambda: SyncBatchNormAct(3),
        "SplitBatchNorm2d": lambda: SplitBatchNorm2d(3),
        "EvoNorm2dB0": lambda: EvoNorm2dB0(3),
        "LazyBatchNorm2d": lambda: nn.LazyBatchNorm2d(),
        "ParametrizedBatchNorm2d": parametrised,
    }


def test_everything_else_is_refused_by_name_and_nothing_is_changed() -> None:
    for kind, make in strange().items():
        net = nn.Sequential(nn.BatchNorm2d(3), nn.ModuleDict({"odd": make()}))
        with pytest.raises(UserError) as caught:
            synchronise_norms(net)
        assert kind in caught.value.what
        assert "1.odd" in caught.value.what
        assert "student.stem" in caught.value.where
        assert type(net[0]) is nn.BatchNorm2d, kind


def test_norms_of_single_images_are_left_alone() -> None:
    for norm in (
        nn.GroupNorm(1, 4),
        nn.LayerNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ):
        kind = type(norm)
        assert type(synchronise_norms(nn.Sequential(norm))[0]) is kind


def config_of(norm_layer: str) -> Config:
    student = StudentConfig(stem="regnetx_002", dim=DIM, stem_args={"norm_layer": norm_layer})
    return Config(student=student)


def test_it_is_refused_before_the_first_stage_and_the_remedy_works() -> None:
    """Only on several ranks: one rank has nothing to synchronize."""
    for stage in ("student", "control"):
        with pytest.raises(UserError, match="EvoNorm2dB0") as caught:
            preflight.check(config_of("evonormb0"), ["teacher", stage], 2)
    preflight.check(config_of("evonormb0"), ["teacher", "student"], 1)
    preflight.check(config_of("evonormb0"), ["teacher"], 2)
    for kind in ("batchnorm2d", "groupnorm1", "layernorm2d"):
        assert kind in caught.value.remedy
        preflight.check(config_of(kind), ["teacher", "student", "control"], 2)


# --- two ranks ------------------------------------------------------------------------------


def own_rows() -> slice:
    """Uneven shares of the batch."""
    return slice(0, 5) if collectives.rank() == 0 else slice(5, BATCH)


def against_one_process(plain: nn.Module, x: Tensor) -> dict[str, float]:
    """Differences in outputs, gradients and statistics between the ranks and one process with the whole batch."""
    plain.zero_grad()  # a copy includes the gradients
    ours = synchronise_norms(deepcopy(plain)).double().train()
    plain, x = plain.double().train(), x.double()
    expected = plain(x)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    (expected * upstream).sum().backward()
    found = ours(x[own_rows()])
    (found * upstream[own_rows()]).sum().backward()
    theirs = dict(plain.named_parameters())
    worst = {"output": furthest(found, expected[own_rows()]), "gradient": 0.0}
    largest = max((p.grad.abs().max() for p in theirs.values() if p.grad is not None), default=0)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        total = collectives.all_reduce_sum(parameter.grad)
        apart = float((total - theirs[name].grad).abs().max() / largest)
        worst["gradient"] = max(worst["gradient"], apart)
    pairs = zip(ours.buffers(), plain.buffers(), strict=True)
    worst["statistics"] = max(
        (furthest(a.double(), b.double()) for a, b in pairs if a.ndim), default=0.0
    )
    return worst


def plain_norms() -> dict[str, nn.Module]:
    """BatchNorms for every way of keeping statistics, after two batches."""
    return {
        "cumulative": nn.BatchNorm2d(3, momentum=None),
        "untracked": nn.BatchNorm2d(3, track_running_stats=False),
        "no affine": nn.BatchNorm2d(3, affine=False),
        "one axis": nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * SIDE * SIDE)),
        "sequence": nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(3)),
        "volume": nn.Sequential(nn.Unflatten(2, (2, SIDE // 2)), nn.BatchNorm3d(3)),
    }


def compared() -> dict[str, dict[str, float]]:
    """All comparisons in one group of ranks."""
    torch.manual_seed(0)
    found = {name: against_one_process(stem_of(name), images()) for name in FAMILIES}
    for name, norm in plain_norms().items():
        net = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
        for scale in (1.0, 1.5):  # the second batch distinguishes cumulative from running means
            found[f"{name} {scale}"] = against_one_process(net, images() * scale)
    # With a mean of 1,000 and a spread of 1, sums of squares in float32 would give noise.
    norm = nn.Sequential(nn.BatchNorm2d(3))
    x = images() + 1000.0
    single = norm(x)
    ours = synchronise_norms(deepcopy(norm))(x[own_rows()])
    found["large mean"] = {"output": furthest(ours, single[own_rows()])}
    return found


def bfloat16_rows() -> dict[str, float]:
    """Largest differences between a bfloat16 batch in channels_last and float64 over the whole batch."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3)
    plain.weight.data.uniform_(0.5, 2)
    x = (3 * images() + torch.tensor([0.0, 5.0, -20.0]).view(3, 1, 1)).bfloat16()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    reference = deepcopy(plain).double()
    whole = x.double().requires_grad_()
    expected = reference(whole)
    (expected * upstream.double()).sum().backward()
    ours = synchronise_norms(plain)
    own = x[own_rows()].to(memory_format=torch.channels_last).requires_grad_()
    found = ours(own)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last)
    found.backward(upstream[own_rows()])
    sums = {
        name: furthest(
            collectives.all_reduce_sum(getattr(ours, name).grad).double(),
            getattr(reference, name).grad,
        )
        for name in ("weight", "bias")
    }
    statistics = {
        name: furthest(getattr(ours, name).double(), getattr(reference, name))
        for name in ("running_mean", "running_var")
    }
    output = {"output": furthest(found.double(), expected[own_rows()])}
    return output | {"dx": furthest(own.grad.double(), whole.grad[own_rows()])} | sums | statistics


def test_bfloat16_is_rounded_only_where_it_is_stored() -> None:
    """Moments and sums are float32; outputs and gradients differ by no more than the last bit of bfloat16."""
    for rank in rank_group.run(bfloat16_rows, 2):
        for name in ("running_mean", "running_var", "weight", "bias"):
            assert rank[name] < 1e-5, (name, rank)
        assert rank["output"] < 2**-8, rank
        assert rank["dx"] < 2**-7, rank


def test_two_ranks_are_one_process_over_the_whole_batch() -> None:
    for rank in rank_group.run(compared, 2):
        assert set(FAMILIES) < set(rank)
        for name, worst in rank.items():
            bound = 1e-3 if name == "large mean" else 1e-7
            assert all(value < bound for value in worst.values()), (name, worst)


def with_nothing_on_one_rank() -> dict[str, float]:
    """Largest differences between one process and two ranks, all samples being on rank 0."""
    plain = nn.BatchNorm2d(3)
    reference, x = deepcopy(plain), images()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    ours = synchronise_norms(plain)
    rows = slice(None) if collectives.rank() == 0 else slice(BATCH, None)
    whole, own = x.clone().requires_grad_(), x[rows].clone().requires_grad_()
    reference(whole).backward(upstream)
    ours(own).backward(upstream[rows])
    assert own.grad.shape == own.shape
    found = {
        name: furthest(
            collectives.all_reduce_sum(getattr(ours, name).grad), getattr(reference, name).grad
        )
        for name in ("weight", "bias")
    }
    found |= {
        name: furthest(getattr(ours, name), getattr(reference, name))
        for name in ("running_mean", "running_var")
    }
    return found | ({"dx": furthest(own.grad, whole.grad)} if len(own) else {})


def test_a_rank_without_samples_keeps_up_with_the_others() -> None:
    for rank in rank_group.run(with_nothing_on_one_rank, 2):
        assert all(value < 1e-5 for value in rank.values()), rank


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA's kernels: one for each layout")
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows", "rows of nothing"])
def test_every_layout_has_a_kernel_on_a_gpu(layout: str, kind: torch.dtype) -> None:
    x = images()
    if layout.startswith("rows"):
        x = x.flatten(1)[:, :3]
    x = x[: 0 if layout.endswith("nothing") else BATCH].to(kind)
    weight, bias = torch.rand(3) + 0.5, torch.rand(3)
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(kind)
    whole = x.double().requires_grad_()
    expected = nn.functional.batch_norm(
        whole, None, None, weight.double(), bias.double(), training=True
    ) if len(x) else whole  # fmt: skip
    expected.backward(upstream.double())
    own = x.cuda()
    if layout == "channels_last":
        own = own.to(memory_format=torch.channels_last)
    own.requires_grad_()
    found, _, _, count = sync_norm._JointNorm.apply(own, weight.cuda(), bias.cuda(), 1e-5)
    found.backward(upstream.cuda())
    if not len(x):
        assert own.grad.shape == x.shape
        assert count.item() == 0
        return
    bound = 1e-4 if kind == torch.float32 else 2**-6
    assert furthest(found.double().cpu(), expected) < bound
    assert furthest(own.grad.double().cpu(), whole.grad) < bound
