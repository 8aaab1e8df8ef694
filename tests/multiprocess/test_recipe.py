"""SGD and averaged weights on real DeepSpeed and gloo: as in plain torch, and through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training.checkpoint.folder import load_weights
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from cnn2gnn_dist.training.engine import Engine, inner_optimizer
from tests.support import rank_group, tiny
from tests.support.saves import END, HALF, RUN, extra, newest, state

RATES = {"norm.bias": 64.0, "norm2.bias": 64.0, "head.weight": 0.5}
FROZEN = ("first.weight", "norm.weight", "norm.bias", "second.weight")
CLIP = 0.05
LATE = ("gate", "second.weight")
STAGES = (0, 2, 3)
KINDS = ("ema", "lookahead")


# --- cases: run on every rank ---------------------------------------------------------------


def sgd(stage: int, **more: Any) -> Engine:
    return tiny.build(stage, optimizer="sgd", engine={"rates": RATES}, **more)


def plain_sgd() -> tuple[list[float], dict[str, Tensor]]:
    """DistributedDataParallel + torch.optim.SGD with a group for each parameter."""
    model = tiny.TinyNet()
    groups = [
        {"params": [p], "weight_decay": tiny.WEIGHT_DECAY * (p.ndim > 1), "rate": RATES.get(n, 1.0)}
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.SGD(groups, lr=tiny.LR, momentum=tiny.MOMENTUM, nesterov=True)
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    losses = []
    for step in range(END):
        images, labels = tiny.share(step)
        for group in optimizer.param_groups:
            group["lr"] = tiny.lr(step) * group["rate"]
        optimizer.zero_grad()
        loss = F.cross_entropy(ddp(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses, {n: p.detach().clone() for n, p in model.named_parameters()}


def engine_sgd(stage: int) -> tuple[list[float], dict[str, Tensor]]:
    engine = sgd(stage)
    assert isinstance(inner_optimizer(engine), torch.optim.SGD)
    return tiny.train(engine, range(END)), tiny.weights_only(engine.weights())


def plain_frozen() -> dict[str, Tensor]:
    """SGD of what is not frozen, clipped by the norm of these gradients alone."""
    model = tiny.TinyNet()
    learns = [p for n, p in model.named_parameters() if n not in FROZEN]
    optimizer = torch.optim.SGD(learns, lr=tiny.LR, momentum=tiny.MOMENTUM, nesterov=True)
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    for step in range(END):
        images, labels = tiny.share(step)
        optimizer.param_groups[0]["lr"] = tiny.lr(step)
        ddp.zero_grad()
        F.cross_entropy(ddp(images), labels).backward()
        with torch.no_grad():
            head = (
                model.head.weight
            )  # the only matrix: it decays after the clipping, as torch's SGD does it
            assert nn.utils.clip_grad_norm_(learns, CLIP) > CLIP, "the clip must bite"
            assert head.grad is not None
            head.grad += tiny.WEIGHT_DECAY * head
        optimizer.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def engine_frozen(stage: int) -> dict[str, Tensor]:
    rates = {"rates": dict.fromkeys(FROZEN, 0.0)}
    engine = tiny.build(stage, optimizer="sgd", clip=CLIP, engine=rates)
    tiny.train(engine, range(END))
    return tiny.weights_only(engine.weights())


def late_sgd(stage: int) -> tuple[bool, bool]:
    """Late parameters don't move before their start; then they step as in an SGD that starts with them."""
    model = tiny.TinyNet()
    engine = Engine(model, tiny.config(stage, optimizer="sgd"), device="cpu", late=LATE)
    engine.train()
    start = {n: p.clone() for n, p in tiny.TinyNet().named_parameters()}
    for _ in range(2):
        images, labels = tiny.share(0)
        engine.backward(F.cross_entropy(engine(images), labels) * 0.0)
        engine.step(0.1)
    before = engine.weights()
    still = all(torch.equal(before[n], start[n]) for n in LATE)
    engine.late_from = engine.steps
    images, labels = tiny.share(0)
    engine.backward(F.cross_entropy(engine(images), labels) * 0.0)
    engine.step(0.1, late_lr=0.1)
    # A step of weight decay alone, to which Nesterov adds the momentum once more.
    grown = before["second.weight"]
    moved = grown - 0.1 * (1 + tiny.MOMENTUM) * tiny.WEIGHT_DECAY * grown
    return still, torch.allclose(engine.weights()["second.weight"], moved, atol=1e-7)


def averaging(kind: str, stage: int, **more: Any) -> Engine:
    """AdamW for lookahead, SGD for ema, so that both kinds of moments occur together with an average."""
    optimizer = "sgd" if kind == "ema" else "adamw"
    return tiny.build(stage, optimizer=optimizer, engine={"average": kind}, **more)


def train_averaging(engine: Engine, steps: range) -> list[float]:
    """Train; every second step updates the average, which keeps more of itself each time."""
    losses = []
    for step in steps:
        images, labels = tiny.share(step)
        loss = F.cross_entropy(engine(images), labels)
        losses.append(float(loss))
        engine.backward(loss)
        engine.step(tiny.lr(step), kept=0.1 * step if step % 2 else None)
    return losses


def plain_averaging(kind: str) -> dict[str, Tensor]:
    """The same by hand, with torch's optimizer: the averages of the weights and of this rank's buffers."""
    model = tiny.TinyNet()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": tiny.WEIGHT_DECAY},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=tiny.LR)
    if kind == "ema":
        optimizer = torch.optim.SGD(groups, lr=tiny.LR, momentum=tiny.MOMENTUM, nesterov=True)
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    average = {n: t.detach().clone() for n, t in model.state_dict().items()}
    for step in range(END):
        images, labels = tiny.share(step)
        for group in optimizer.param_groups:
            group["lr"] = tiny.lr(step)
        optimizer.zero_grad()
        F.cross_entropy(ddp(images), labels).backward()
        optimizer.step()
        if step % 2 == 0:
            continue
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                if tensor.is_floating_point():
                    average[name] += (1 - 0.1 * step) * (tensor - average[name])
                else:
                    average[name] = tensor.clone()
            if kind == "lookahead":
                for name, parameter in model.named_parameters():
                    parameter.copy_(average[name])
    return average


def averages_of(kind: str, stage: int, root: Path) -> dict[str, Any]:
    """An uninterrupted run with a save on the way, and the weights that are used for inference at its end."""
    engine = averaging(kind, stage)
    train_averaging(engine, range(HALF))
    saved = Checkpoints(root / f"{kind}-{stage}", RUN)
    saved.save(HALF, engine, extra(HALF))
    saved.settle()
    found: dict[str, Any] = {"saved": state(engine)}
    found["next"] = train_averaging(engine, range(HALF, END))
    found["last"] = state(engine)
    images, _ = tiny.share(0)
    before = tiny.digest(engine.weights())
    engine.eval()
    with engine.answering():
        found["answers"], found["average"] = engine(images).detach(), engine.weights()
    engine.train()
    found["unchanged"] = before == tiny.digest(engine.weights())
    last = Checkpoints(root / f"{kind}-{stage}-last", RUN)
    last.save(END, engine, extra(END))
    last.settle()
    plain = tiny.TinyNet(seed=7)
    plain.load_state_dict(load_weights(newest(last.folder)))
    found["exported"] = plain.eval()(images).detach()
    fresh = tiny.build(stage, seed=8)
    last.load(fresh, answering=True)
    fresh.eval()
    found["loaded"] = fresh(images).detach()
    return found


def resumed_averages(root: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for kind in KINDS:
        for saved in STAGES:
            for loaded in STAGES:
                engine = averaging(kind, loaded, seed=99)
                Checkpoints(root / f"{kind}-{saved}", RUN).load(engine)
                own = found[kind, saved, loaded] = {"saved": state(engine)}
                own["next"] = train_averaging(engine, range(HALF, END))
                own["last"] = state(engine)
    return found


def first_run(root: Path) -> dict[Any, Any]:
    """Two ranks: compared with torch; then three steps, a save, and on to the end."""
    found: dict[Any, Any] = {"torch": plain_sgd(), "torch frozen": plain_frozen()}
    for stage in STAGES:
        found["frozen", stage] = engine_frozen(stage)
        found["sgd", stage] = engine_sgd(stage)
        found["late", stage] = late_sgd(stage) if stage < 3 else (True, True)
        engine = sgd(stage)
        tiny.train(engine, range(HALF))
        saved = Checkpoints(root / str(stage), RUN)
        saved.save(HALF, engine, extra(HALF), {"rank": collectives.rank()})
        saved.settle()
        found["saved", stage] = state(engine)
        found["next", stage] = tiny.train(engine, range(HALF, END))
        found["last", stage] = state(engine)
        for kind in KINDS:
            found[kind, stage] = averages_of(kind, stage, root)
    for kind in KINDS:
        found[kind] = plain_averaging(kind)
    return found


def resumed(root: Path) -> dict[Any, Any]:
    """With other weights and any stage: load, compare, continue."""
    found: dict[Any, Any] = {}
    for saved in STAGES:
        for loaded in STAGES:
            engine = sgd(loaded, seed=99)
            assert Checkpoints(root / str(saved), RUN).load(engine) is not None
            own = found[saved, loaded] = {"state": state(engine)}
            own["next"] = tiny.train(engine, range(HALF, END))
            own["last"] = state(engine)
    found["averages"] = resumed_averages(root)
    return found


# --- tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipe")


@pytest.fixture(scope="module")
def first(root: Path) -> list[dict[Any, Any]]:
    return rank_group.run(first_run, 2, root)


@pytest.mark.parametrize("stage", STAGES)
def test_sgd_is_bit_identical_to_torchs(first: list[dict], stage: int) -> None:
    for rank in first:
        losses, weights = rank["sgd", stage]
        assert losses == rank["torch"][0]
        for name, tensor in rank["torch"][1].items():
            assert torch.equal(weights[name], tensor), name


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_do_not_count_in_the_norm_that_is_clipped(
    first: list[dict], stage: int
) -> None:
    """With student.stem_lr=0 the stem's gradients, several times as large, shortened the steps of the rest."""
    start = dict(tiny.TinyNet().named_parameters())
    for rank in first:
        for name, tensor in rank["torch frozen"].items():
            torch.testing.assert_close(rank["frozen", stage][name], tensor, rtol=1e-5, atol=1e-7)
            assert torch.equal(tensor, start[name]) == (name in FROZEN)


@pytest.mark.parametrize("stage", STAGES)
def test_late_parameters_gather_no_momentum_before_their_start(
    first: list[dict], stage: int
) -> None:
    assert first[0]["late", stage] == (True, True)


@pytest.fixture(scope="module")
def again(root: Path, first: object) -> list[dict[Any, Any]]:
    return rank_group.run(resumed, 2, root)


@pytest.fixture(scope="module")
def single(root: Path, first: object) -> dict[Any, Any]:
    return rank_group.run(resumed, 1, root)[0]


def test_a_resumed_run_is_the_uninterrupted_one_in_any_stage(
    first: list[dict], again: list[dict]
) -> None:
    for before, after in zip(first, again, strict=True):
        for saved in STAGES:
            for loaded in STAGES:
                found = after[saved, loaded]
                for what, expected in (("state", "saved"), ("next", "next"), ("last", "last")):
                    assert found[what] == before[expected, saved], (saved, loaded, what)


def test_one_rank_reads_what_two_wrote(first: list[dict], single: dict) -> None:
    for saved in STAGES:
        for loaded in STAGES:
            assert single[saved, loaded]["state"] == first[0]["saved", saved]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_an_average_is_the_one_by_hand(first: list[dict], kind: str, stage: int) -> None:
    """Weights in every stage; buffers are the mean over ranks of each rank's own average."""
    by_hand = [rank[kind] for rank in first]
    for rank in first:
        for name, tensor in rank[kind, stage]["average"].items():
            if name.endswith("num_batches_tracked"):
                assert int(tensor) == END
                continue
            expected = (by_hand[0][name] + by_hand[1][name]) / 2
            torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_answers_come_from_the_average_and_training_goes_on_without_it(
    first: list[dict], kind: str, stage: int
) -> None:
    for rank in first:
        found = rank[kind, stage]
        assert found["unchanged"]
        torch.testing.assert_close(found["exported"], found["answers"])
        assert torch.equal(found["loaded"], found["answers"])


def test_an_average_resumes_in_any_stage_and_world_size(
    first: list[dict], again: list[dict], single: dict
) -> None:
    for before, after in zip(first, again, strict=True):
        for (kind, saved, _), found in after["averages"].items():
            for what in ("saved", "next", "last"):
                assert found[what] == before[kind, saved][what], (kind, saved, what)
    for (kind, saved, _), found in single["averages"].items():
        assert found["saved"] == first[0][kind, saved]["saved"]


def test_the_same_average_in_every_stage(first: list[dict]) -> None:
    for kind in KINDS:
        assert len({rank[kind, stage]["last"] for rank in first for stage in STAGES}) == 1
