"""Parameters that get gradients late, under the engine and in plain torch; each case runs on every rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.training.checkpoint import named_state
from cnn2gnn_dist.training.engine import Engine
from tests.support import tiny

IDLE = 1500


LATE = ("gate", "second.weight")


def late_engine(stage: int, decay: float = 0.0) -> Engine:
    config = tiny.config(stage)
    config["optimizer"]["params"]["weight_decay"] = decay
    engine = Engine(tiny.TinyNet(), config, device="cpu", late=LATE)
    engine.train()
    return engine


def late_start(stage: int, late_from: int) -> dict[str, Tensor]:
    """Weights of late parameters over the steps after 1,500 steps without gradients."""
    engine = late_engine(stage)
    tensors, _ = named_state.pull(engine, lambda name: True)
    tensors = {n: t for rank in collectives.all_gather_object(tensors) for n, t in rank.items()}
    engine = late_engine(stage)
    named_state.push(engine, tensors, float(IDLE))
    engine.steps, engine.late_from = IDLE, late_from
    seen: dict[str, list[Tensor]] = {name: [] for name in LATE}
    for _ in range(tiny.STEPS):
        images, labels = tiny.share(0)  # the same batch again: gradients of one sign
        engine.backward(F.cross_entropy(engine(images), labels))
        engine.step(1e-3, late_lr=1e-3)
        weights = engine.weights()
        for name in LATE:
            seen[name].append(weights[name])
    return {name: torch.stack(values) for name, values in seen.items()}


def late_resumed(stage: int) -> bool:
    """Late parameters start at step 2; weights after 6 steps, uninterrupted and resumed from step 4."""

    def go(engine: Engine, steps: range) -> None:
        for step in steps:
            images, labels = tiny.share(step)
            engine.backward(F.cross_entropy(engine(images), labels))
            if step == 2:
                engine.late_from = engine.steps
            engine.step(tiny.lr(step), late_lr=tiny.lr(step))

    whole = late_engine(stage, tiny.WEIGHT_DECAY)
    go(whole, range(4))
    mine, adam_steps = named_state.pull(whole, lambda name: True)
    mine.update(named_state.own_buffers(whole, collectives.rank()))
    resumed = late_engine(stage, tiny.WEIGHT_DECAY)
    named_state.push(resumed, mine, adam_steps)
    named_state.push_buffers(resumed, mine, collectives.rank())
    resumed.steps, resumed.late_from = whole.steps, whole.late_from
    found = []
    for engine in (whole, resumed):
        go(engine, range(4, tiny.STEPS))
        found.append(tiny.digest(engine.weights()))
    return found[0] == found[1]


def late_in_torch() -> dict[str, Tensor]:
    """The same with a separate Adam for the late parameters, which starts with them."""
    model = tiny.TinyNet()
    named = dict(model.named_parameters())

    old, new = (
        torch.optim.Adam([p for n, p in named.items() if (n in LATE) == late], lr=1e-3)
        for late in (False, True)
    )
    for parameter in old.param_groups[0]["params"]:
        old.state[parameter] = {
            "step": torch.tensor(float(IDLE)),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    seen: dict[str, list[Tensor]] = {name: [] for name in LATE}
    for _ in range(tiny.STEPS):
        images, labels = tiny.share(0)
        F.cross_entropy(ddp(images), labels).backward()
        for optimizer in (old, new):
            optimizer.step()
            optimizer.zero_grad()
        for name in LATE:
            seen[name].append(named[name].detach().clone())
    return {name: torch.stack(values) for name, values in seen.items()}


def not_yet(stage: int) -> bool:
    """Late parameters that have not started keep their weights: no weight decay either."""
    engine = late_engine(stage, tiny.WEIGHT_DECAY)
    images, labels = tiny.share(0)
    engine.backward(F.cross_entropy(engine(images), labels))
    engine.step(1e-2)
    before, after = dict(tiny.TinyNet().named_parameters()), engine.weights()
    moved = {name for name, p in before.items() if not torch.equal(after[name], p)}
    return moved == set(before) - set(LATE)


def with_idle() -> nn.Module:
    """A network with a matrix that its output does not depend on."""
    model = tiny.TinyNet()
    model.register_parameter("idle", nn.Parameter(torch.linspace(-1, 1, 9).reshape(3, 3)))
    return model


def under_plain_adam(stage: int) -> list[Tensor]:
    """A late matrix whose only gradient is its weight decay, in the three steps after its start at step 3."""
    config = tiny.config(stage)
    params = {**config["optimizer"]["params"], "adam_w_mode": False}
    config["optimizer"] = {"type": "Adam", "params": params}
    engine = Engine(with_idle(), config, device="cpu", late=("idle",))
    engine.train()
    seen = []
    for step in range(tiny.STEPS):
        images, labels = tiny.share(step)
        loss = F.cross_entropy(engine(images), labels)
        started = step >= tiny.STEPS // 2
        if step == tiny.STEPS // 2:
            engine.late_from = engine.steps
        engine.backward(loss)
        engine.step(tiny.LR, late_lr=tiny.LR if started else None)
        weight = engine.weights()["idle"]
        if started:
            seen.append(weight)
        else:
            assert torch.equal(weight, with_idle().get_parameter("idle"))
    return seen


def plain_adam_in_torch() -> list[Tensor]:
    """The same under an Adam of its own, which starts with it."""
    weight = nn.Parameter(with_idle().get_parameter("idle").detach().clone())
    adam = torch.optim.Adam([weight], lr=tiny.LR, weight_decay=tiny.WEIGHT_DECAY)
    seen = []
    for _ in range(tiny.STEPS - tiny.STEPS // 2):
        weight.grad = torch.zeros_like(weight)
        adam.step()
        seen.append(weight.detach().clone())
    return seen
