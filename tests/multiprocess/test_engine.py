"""The engine on real DeepSpeed and gloo, compared with plain torch in every ZeRO stage."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training.engine import Engine, inner_optimizer, without_overlap
from cnn2gnn_dist.training.sync_norm import synchronise_norms
from tests.support import late_parameters, rank_group, tiny

# --- cases: run on every rank ---------------------------------------------------------------


def plain_torch(clip: float = 0.0) -> tuple[list[float], dict[str, Tensor], list[float]]:
    """DistributedDataParallel + AdamW, written out: losses, weights, gradient norms."""
    model = tiny.TinyNet()
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": matrices, "weight_decay": tiny.WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=tiny.LR)
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    losses, norms = [], []
    for step in range(tiny.STEPS):
        images, labels = tiny.share(step)
        for group in optimizer.param_groups:
            group["lr"] = tiny.lr(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(images), labels)
        loss.backward()
        largest = clip or float("inf")
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), largest)))
        optimizer.step()
        losses.append(float(loss))
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}, norms


def engine_against_torch(stage: int, clip: float) -> dict[str, Any]:
    """One stage's losses, weights and norms in the same six steps."""
    engine = tiny.build(stage, clip=clip)
    losses, norms, rates = [], [], []
    for step in range(tiny.STEPS):
        images, labels = tiny.share(step)
        loss = F.cross_entropy(engine(images), labels)
        losses.append(float(loss))
        engine.backward(loss)
        info = engine.step(tiny.lr(step))
        norms.append(info.grad_norm)
        rates.append([group["lr"] for group in inner_optimizer(engine).param_groups])
    weights = tiny.weights_only(engine.weights())
    decay = [g["weight_decay"] for g in engine.deepspeed.optimizer.param_groups]
    return {
        "losses": losses,
        "weights": weights,
        "norms": norms,
        "rates": rates,
        "decay": decay,
        "steps": engine.steps,
    }


def accumulated(stage: int, accumulation: int) -> dict[str, Tensor]:
    """Weights of a model without BatchNorm after four steps in that many micro-batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 8), nn.ReLU(), nn.Linear(8, 4))
    engine = tiny.build(stage, model=model, accumulation=accumulation)
    tiny.train(engine, range(4))
    return engine.weights()


def refusal(engine: Engine, loss: Tensor) -> str | None:
    """The engine's error for a loss."""
    engine.backward(loss)
    try:
        engine.step(0.01)
    except UserError as error:
        return str(error)
    return None


def not_finite(stage: int) -> dict[str, Any]:
    """First rank 1 alone has a NaN loss; then a finite loss has a gradient that is not finite."""
    engine = tiny.build(stage, engine={"name": "teacher"})
    tiny.train(engine, range(1))
    before = tiny.digest(tiny.weights_only(engine.weights()))
    images, labels = tiny.share(1)
    loss = F.cross_entropy(engine(images), labels)
    said = refusal(engine, loss * float("nan") if collectives.rank() == 1 else loss)
    after = tiny.digest(tiny.weights_only(engine.weights()))

    engine = tiny.build(stage, engine={"name": "control"})
    gate = engine(images).square().sum()
    # sqrt has an infinite slope at 0: value finite, gradient not.
    said_gradient = refusal(engine, torch.sqrt(gate * 0.0))
    return {"said": said, "untouched": before == after, "said_gradient": said_gradient}


def unused_parameter(stage: int) -> bool:
    """A weight that no loss depends on doesn't keep the others from learning."""
    model = tiny.TinyNet()
    model.register_parameter("idle", nn.Parameter(torch.ones(3, 3)))
    engine = tiny.build(stage, model=model)
    tiny.train(engine, range(2))
    return bool(torch.isfinite(engine.weights()["idle"]).all())


def buffers_by_rank() -> dict[str, Any]:
    """Running statistics of both ranks before and after averaging."""
    engine = tiny.build(0)
    tiny.train(engine, range(3))
    before = {n: b.clone() for n, b in engine.module.named_buffers()}
    engine.average_buffers()
    return {"before": before, "after": {n: b.clone() for n, b in engine.module.named_buffers()}}


def norm_over_ranks() -> dict[str, Tensor]:
    """SyncNorm on uneven shares (6 and 2 rows): output, gradients, statistics."""
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    holder = synchronise_norms(nn.Sequential(norm))
    images = tiny.batch(0)[0] * 2 + 5
    own = slice(0, 6) if collectives.rank() == 0 else slice(6, 8)
    x = images[own].clone().requires_grad_()
    y = holder(x)
    (y * torch.sin(images[own])).sum().backward()
    found = {n: b for n, b in holder.named_buffers()}
    for name, parameter in holder.named_parameters():
        assert parameter.grad is not None
        found["grad " + name] = collectives.all_reduce_sum(parameter.grad)
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **found}


def unknown_communication() -> str:
    """The message about a value that only DeepSpeed knows to be wrong."""
    try:
        Engine(tiny.TinyNet(), tiny.config(2) | {"communication_data_type": "int8"}, device="cpu")
    except UserError as error:
        return str(error)
    return ""


def everything() -> dict[Any, Any]:
    """All cases in one group, so that the processes start once."""
    torch.manual_seed(0)
    found: dict[Any, Any] = {
        "world": (collectives.rank(), collectives.world_size(), dist.get_backend()),
        "torch": plain_torch(),
        "torch clipped": plain_torch(clip=0.3),
        "torch late": late_parameters.late_in_torch(),
        "buffers": buffers_by_rank(),
        "norm": norm_over_ranks(),
        "communication": unknown_communication(),
        "gathered": collectives.all_gather_object(collectives.rank() * 10),
        "broadcast": collectives.broadcast_object({"from": collectives.rank()}),
    }
    for stage in tiny.STAGES:
        found["stage", stage] = engine_against_torch(stage, 0.0)
        found["clipped", stage] = engine_against_torch(stage, 0.3)
        found["accumulated", stage] = (accumulated(stage, 1), accumulated(stage, 2))
        found["finite", stage] = not_finite(stage)
        found["idle", stage] = unused_parameter(stage)
        found["late", stage] = (
            late_parameters.late_start(stage, late_parameters.IDLE),
            late_parameters.late_start(stage, 0),
            late_parameters.not_yet(stage),
        )
        found["late resumed", stage] = late_parameters.late_resumed(stage)
        found["plain adam", stage] = late_parameters.under_plain_adam(stage)
    return found


# --- tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return rank_group.run(everything, 2)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_every_zero_stage_is_bit_identical_to_ddp(ranks: list[dict], stage: int) -> None:
    for rank in ranks:
        losses, weights, _ = rank["torch"]
        found = rank["stage", stage]
        assert found["losses"] == losses
        for name, tensor in weights.items():
            assert torch.equal(found["weights"][name], tensor), name
        assert found["steps"] == tiny.STEPS


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_clipping_and_gradient_norms_match_torch(ranks: list[dict], stage: int) -> None:
    losses, weights, norms = ranks[0]["torch clipped"]
    assert max(norms) > 0.3, "the clip must bite"
    found = ranks[0]["clipped", stage]
    assert found["norms"] == pytest.approx(norms, rel=1e-4)
    assert found["losses"] == pytest.approx(losses, rel=1e-4)
    for name, tensor in weights.items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_lr_reaches_all_groups_and_vectors_are_not_decayed(ranks: list[dict], stage: int) -> None:
    found = ranks[1]["stage", stage]
    assert found["rates"] == [[tiny.lr(s)] * 2 for s in range(tiny.STEPS)]
    assert sorted(found["decay"]) == [0.0, tiny.WEIGHT_DECAY]


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_two_micro_batches_are_one_big_one(ranks: list[dict], stage: int) -> None:
    whole, halves = ranks[0]["accumulated", stage]
    for name, tensor in whole.items():
        torch.testing.assert_close(halves[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_nan_on_one_rank_stops_all_before_the_weights_change(ranks: list[dict], stage: int) -> None:
    for rank in ranks:
        found = rank["finite", stage]
        assert "not finite at step 1" in found["said"]
        assert (
            "teacher.lr=… (lower), teacher.warmup_epochs=… (more) or teacher.clip=…"
            in found["said"]
        )
        assert "with --force: training resumes" in found["said"]
        assert found["untouched"]


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_infinite_gradient_of_a_finite_loss_is_refused(ranks: list[dict], stage: int) -> None:
    for rank in ranks:
        said = rank["finite", stage]["said_gradient"] or ""
        assert "gradient" in said
        assert "where:  control" in said
        assert "student.lr=…" in said  # the control has the student's fields
        assert "with --update: the student" in said
        assert "--force" not in said


def test_what_deepspeed_itself_refuses_is_no_traceback(ranks: list[dict]) -> None:
    for rank in ranks:
        assert (
            "DeepSpeed refuses its config: Invalid communication_data_type" in rank["communication"]
        )


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_unused_parameter_is_harmless(ranks: list[dict], stage: int) -> None:
    assert all(rank["idle", stage] for rank in ranks)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_late_parameters_step_as_under_an_adam_of_their_own(ranks: list[dict], stage: int) -> None:
    """Their steps are not six times too long, as with the bias correction of the 1,500 steps before them."""
    expected = ranks[0]["torch late"]
    for rank in ranks:
        late, at_once, stayed = rank["late", stage]
        assert stayed
        for name in late_parameters.LATE:
            torch.testing.assert_close(late[name], expected[name], rtol=1e-4, atol=2e-6)
            first = dict(tiny.TinyNet().named_parameters())[name].detach()
            steps = late[name].diff(dim=0, prepend=first[None]).abs() / 1e-3
            wrong = at_once[name].diff(dim=0, prepend=first[None]).abs() / 1e-3
            assert steps.max() < 1.1  # in units of the learning rate
            assert wrong.max() > 4


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_late_parameters_resume_bit_identically(ranks: list[dict], stage: int) -> None:
    assert all(rank["late resumed", stage] for rank in ranks)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_late_parameters_gather_no_moments_of_their_decay(ranks: list[dict], stage: int) -> None:
    """Plain Adam adds the decay to the gradient, also of parameters that are not to move yet."""
    expected = late_parameters.plain_adam_in_torch()
    for rank in ranks:
        for found, wanted in zip(rank["plain adam", stage], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_buffers_become_the_mean_over_ranks(ranks: list[dict]) -> None:
    first, second = (rank["buffers"] for rank in ranks)
    mean, other = first["before"]["norm.running_mean"], second["before"]["norm.running_mean"]
    assert not torch.equal(mean, other)
    for name in first["after"]:
        assert torch.equal(first["after"][name], second["after"][name]), name
    torch.testing.assert_close(first["after"]["norm.running_mean"], (mean + other) / 2)
    assert int(first["after"]["norm.num_batches_tracked"]) == 3


def test_norm_over_ranks_is_batchnorm_of_all_rows(ranks: list[dict]) -> None:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(3)
    nn.init.uniform_(norm.weight)
    nn.init.uniform_(norm.bias)
    images = (tiny.batch(0)[0] * 2 + 5).requires_grad_()
    y = norm(images)
    (y * torch.sin(images.detach())).sum().backward()
    found = [rank["norm"] for rank in ranks]
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    close(torch.cat([f["y"] for f in found]), y.detach())
    close(torch.cat([f["dx"] for f in found]), images.grad)
    for name in ("weight", "bias"):
        expected = getattr(norm, name).grad
        close(found[0]["grad 0." + name], expected)
    for name, buffer in norm.named_buffers():
        close(found[1]["0." + name], buffer)


def test_collectives(ranks: list[dict]) -> None:
    assert [rank["world"] for rank in ranks] == [(0, 2, "gloo"), (1, 2, "gloo")]
    assert [rank["gathered"] for rank in ranks] == [[0, 10]] * 2
    assert [rank["broadcast"] for rank in ranks] == [{"from": 0}] * 2


def test_communication_overlaps_only_where_the_model_has_no_collectives() -> None:
    """With collectives in the model, two NCCL communicators would be active at once."""
    config = {"zero_optimization": {"stage": 2, "overlap_comm": True}, "gradient_clipping": 1.0}
    plain = tiny.TinyNet()
    assert without_overlap(config, plain) == config
    found = without_overlap(config, synchronise_norms(plain))
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert config["zero_optimization"]["overlap_comm"] is True  # the caller's is unchanged


def test_without_a_group_one_process_is_the_world() -> None:
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    collectives.barrier()
    assert collectives.broadcast_object("x") == "x"
    assert collectives.all_gather_object("x") == ["x"]
    assert collectives.all_reduce_mean(torch.tensor([2.0])).item() == 2.0


def exit_early() -> str:
    """Rank 1 is killed; rank 0 waits for it in a collective."""
    if collectives.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    collectives.barrier()
    return "never"


def test_dead_peer_fails_the_others_at_once() -> None:
    first, second = rank_group.launch(exit_early, 2, timeout=300, group_timeout_s=600)
    assert second.returncode == -9
    assert first.returncode not in (0, -9)
    assert first.value is None
