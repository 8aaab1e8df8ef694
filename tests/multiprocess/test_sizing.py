"""The plan's arithmetic of ZeRO compared with the tensors of real ranks."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from cnn2gnn_dist.commands.plan.states import states
from cnn2gnn_dist.training.engine import Engine
from tests.support import rank_group, tiny

WIDTH = 1000
PARAMETERS = WIDTH * WIDTH + WIDTH


def live_bytes() -> int:
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor):
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    found[storage._cdata] = storage.nbytes()
    return sum(found.values())


def rank_states(stage: int) -> int:
    """Bytes of a rank's tensors after a step, when its gradients have been freed."""
    gc.collect()
    before = live_bytes()
    config = tiny.config(stage)
    config["zero_optimization"]["reduce_bucket_size"] = PARAMETERS
    engine = Engine(nn.Linear(WIDTH, WIDTH), config, device="cpu")
    engine.train()
    share = config["train_micro_batch_size_per_gpu"]
    for _ in range(2):
        engine.backward(engine(torch.ones(share, WIDTH)).mean())
        engine.step(0.01)
    engine.deepspeed.optimizer.zero_grad()
    gc.collect()
    return live_bytes() - before


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_states_of_a_rank_are_those_predicted(stage: int) -> None:
    found = rank_group.run(rank_states, 2, stage)
    # DeepSpeed keeps the last bucket, which has all gradients here.
    predicted = states(PARAMETERS, stage=stage, ranks=2, bucket=PARAMETERS)
    # Gradients are freed, but in stage 3 their memory is kept.
    expected = predicted.total - (predicted.gradients if stage < 3 else 0)
    assert found == pytest.approx([expected] * 2, rel=0.01)
