"""The engine under bfloat16 autocast, compared with plain torch in every ZeRO stage.

In processes of their own: DeepSpeed permanently remembers that autocast was used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn2gnn_dist import settings
from cnn2gnn_dist.models.graph_head import GraphHead
from cnn2gnn_dist.models.precision import MixedPrecision
from cnn2gnn_dist.models.student import Student
from cnn2gnn_dist.pipeline import across_hosts
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from cnn2gnn_dist.training.checkpoint import named_state
from cnn2gnn_dist.training.engine import Engine
from tests.multiprocess.test_engine import plain_torch
from tests.support import rank_group, tiny
from tests.support.runs import MICRO

# --- cases: run on every rank ---------------------------------------------------------------


class MixedNet(MixedPrecision):
    """TinyNet under autocast to bfloat16, as teacher and student run on CPUs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.TinyNet()
        self.compute_dtype = torch.bfloat16

    def forward(self, images: Tensor) -> Tensor:
        with self.autocast(images.device):
            logits: Tensor = self.net(images)
        assert logits.dtype == torch.bfloat16
        return logits.float()


def mixed_in_torch() -> tuple[list[float], dict[str, Tensor]]:
    """The same with DDP and AdamW around autocast, written out."""
    model = tiny.TinyNet()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == matrix], "weight_decay": decay}
        for matrix, decay in ((True, tiny.WEIGHT_DECAY), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=tiny.LR)
    ddp = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    losses = []
    for step in range(tiny.STEPS):
        images, labels = tiny.share(step)
        for group in optimizer.param_groups:
            group["lr"] = tiny.lr(step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = ddp(images)
        loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return losses, {f"net.{n}": p.detach().clone() for n, p in model.named_parameters()}


def mixed(stage: int) -> dict[str, Any]:
    """Six steps in bfloat16: losses and weights, and the weights of a training resumed after four steps."""
    whole = tiny.build(stage, model=MixedNet())
    losses = tiny.train(whole, range(4))
    mine, adam_steps = named_state.pull(whole, lambda name: True)
    mine.update(named_state.own_buffers(whole, collectives.rank()))
    resumed = tiny.build(stage, model=MixedNet())
    named_state.push(resumed, mine, adam_steps)
    named_state.push_buffers(resumed, mine, collectives.rank())
    resumed.steps = whole.steps
    losses += tiny.train(whole, range(4, tiny.STEPS))
    tiny.train(resumed, range(4, tiny.STEPS))
    weights = whole.weights()
    return {
        "losses": losses,
        "weights": weights,
        "resumed": tiny.digest(resumed.weights()) == tiny.digest(weights),
    }


def rounded_head(stage: int) -> dict[str, float]:
    """Under bfloat16 autocast: the difference between z and the graph head on the same features in float32,
    in both modes; and the difference that rounded weights of the head would make.
    """
    torch.manual_seed(0)
    stem = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(48, 24), nn.ReLU())
    student = Student(stem, 24, 16, 8, 4, 0, 3, "dataset", (0.5,) * 3, (0.25,) * 3)
    config = tiny.config(stage)
    config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # gather all of them
    engine = Engine(student, config, device="cpu")
    images = (tiny.share(0)[0].permute(0, 2, 3, 1) * 40 + 128).clamp(0, 255)
    engine.train()
    engine.backward(engine(images, None).logits_BC.square().mean())
    engine.step(1e-2)
    weights = {n[5:]: w for n, w in engine.weights().items() if n.startswith("head.")}
    found = {}
    for mode in ("eval", "train"):  # training moves the running statistics
        getattr(engine, mode)()
        output = engine(images, None)
        assert output.logits_BC.dtype == torch.bfloat16  # autocast is on
        for kind in ("whole", "rounded"):
            head = GraphHead(24, 16)
            head.load_state_dict(weights)
            if kind == "rounded":
                head.project.weight.data = head.project.weight.data.bfloat16().float()
            head.train(mode == "train")
            apart = (head(output.x_BD.float()) - output.z_Bd).detach().abs().max()
            found[f"{mode} {kind}"] = float(apart)
    return found


def everything() -> dict[Any, Any]:
    """All cases in one group, so that the processes start once."""
    found: dict[Any, Any] = {"torch": plain_torch(), "torch mixed": mixed_in_torch()}
    for stage in tiny.STAGES:
        found["mixed", stage] = mixed(stage)
    for stage in tiny.STAGES:
        found["head", stage] = rounded_head(stage)
    return found


# --- tests ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks() -> list[dict[Any, Any]]:
    return rank_group.run(everything, 2)


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_bfloat16_on_cpus_is_bit_identical_to_ddp_and_resumes(
    ranks: list[dict], stage: int
) -> None:
    for rank in ranks:
        losses, weights = rank["torch mixed"]
        found = rank["mixed", stage]
        assert found["losses"] == losses
        assert losses != rank["torch"][0]
        for name, tensor in weights.items():
            assert torch.equal(found["weights"][name], tensor), name
        assert found["resumed"]


@pytest.mark.parametrize("stage", tiny.STAGES)
def test_the_graph_head_is_not_rounded_under_autocast(ranks: list[dict], stage: int) -> None:
    """ZeRO-3 gathers the weights of plain linear layers in the lower precision."""
    for rank in ranks:
        found = rank["head", stage]
        for mode in ("train", "eval"):
            assert found[f"{mode} whole"] < 1e-6
            assert found[f"{mode} rounded"] > 1e-4


def dtypes_where_rank_0_has_bfloat16(tmp: str) -> tuple[str, str]:
    """Results of precision auto and bfloat16 on this rank, if only rank 0's CPU has the instructions."""
    torch.cpu._is_avx512_bf16_supported = lambda: collectives.rank() == 0  # type: ignore[attr-defined]
    torch.cpu._is_amx_tile_supported = lambda: False  # type: ignore[attr-defined]
    found = []
    for name in ("auto", "bfloat16"):
        config = settings.load("demo", [*MICRO, f"precision={name}", f"run.dir={tmp}"])
        everywhere = across_hosts.bfloat16_everywhere(config, "cpu")
        ranks = Ranks(collectives.rank(), 0, 2)
        root = Path(tmp)
        context = Context(
            config, ranks, RunPaths(root), root, "", "cpu", False, bfloat16=everywhere
        )
        found.append(str(context.compute_dtype("student")).removeprefix("torch."))
    return found[0], found[1]


def test_auto_is_the_same_on_ranks_whose_processors_differ(tmp_path: Path) -> None:
    found = rank_group.run(dtypes_where_rank_0_has_bfloat16, 2, str(tmp_path))
    assert found == [("float32", "bfloat16")] * 2
