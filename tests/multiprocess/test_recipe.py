"""SGD on real DeepSpeed and gloo: as in plain torch, and through checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.runtime import collectives
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from cnn2gnn_dist.training.engine import Engine, inner_optimizer
from tests.support import rank_group, tiny
from tests.support.saves import END, HALF, RUN, extra, state

RATES = {"norm.bias": 64.0, "norm2.bias": 64.0, "head.weight": 0.5}
LATE = ("gate", "second.weight")
STAGES = (0, 2, 3)


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


def late_sgd(stage: int) -> tuple[bool, bool]:
    """Late parameters don't move before their start; then as in an SGD that starts with them."""
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
    # One step of decay alone: Nesterov adds the momentum once more.
    grown = before["second.weight"]
    moved = grown - 0.1 * (1 + tiny.MOMENTUM) * tiny.WEIGHT_DECAY * grown
    return still, torch.allclose(engine.weights()["second.weight"], moved, atol=1e-7)


def first_run(root: Path) -> dict[Any, Any]:
    """Two ranks: against torch; then three steps, a save, and on to the end."""
    found: dict[Any, Any] = {"torch": plain_sgd()}
    for stage in STAGES:
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
    return found


def resumed(root: Path) -> dict[Any, Any]:
    """Other weights, any stage: load, compare, go on."""
    found: dict[Any, Any] = {}
    for saved in STAGES:
        for loaded in STAGES:
            engine = sgd(loaded, seed=99)
            assert Checkpoints(root / str(saved), RUN).load(engine) is not None
            own = found[saved, loaded] = {"state": state(engine)}
            own["next"] = tiny.train(engine, range(HALF, END))
            own["last"] = state(engine)
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
def test_late_parameters_gather_no_momentum_before_their_start(
    first: list[dict], stage: int
) -> None:
    assert first[0]["late", stage] == (True, True)


def test_a_resumed_run_is_the_uninterrupted_one_in_any_stage(root: Path, first: list[dict]) -> None:
    for before, after in zip(first, rank_group.run(resumed, 2, root), strict=True):
        for (saved, loaded), found in after.items():
            for what, expected in (("state", "saved"), ("next", "next"), ("last", "last")):
                assert found[what] == before[expected, saved], (saved, loaded, what)


def test_one_rank_reads_what_two_wrote(root: Path, first: list[dict]) -> None:
    single = rank_group.run(resumed, 1, root)[0]
    for (saved, _), found in single.items():
        assert found["state"] == first[0]["saved", saved]
