"""The checkpoint manager with two ranks: what each of them writes, is told and loads."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.runtime.group import collectives, members
from cnn2gnn_dist.runtime.shared_files import handover
from cnn2gnn_dist.training.checkpoint import folder as disk
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from cnn2gnn_dist.training.engine import Engine
from tests.support import rank_group, tiny
from tests.support.saves import RUN, extra, state


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def by_two(root: Path) -> dict[str, Any]:
    """What each rank observes of saves, one of which fails on rank 1, and of loading."""
    rank = collectives.rank()
    built, saved = tiny.build(2), Checkpoints(root, RUN)
    tiny.train(built, range(2))
    found: dict[str, Any] = {"buffers": buffers_of(built)}
    saved.save(2, built, extra(2), {"rank": rank})
    found["finish"] = saved.finish().name
    found["state"] = state(built)
    saved.save(3, built, extra(3), {"not": object()} if rank == 1 else {})
    saved.settle()
    collectives.barrier()  # rank 0 has removed what failed
    found["problem"], found["names"] = saved.problem, names(root)
    other = tiny.build(1, seed=9)
    loaded = saved.load(other)
    assert loaded is not None
    found["owns"] = loaded.owns
    found["loaded buffers"] = buffers_of(other)
    found["loaded state"] = state(other)
    found["elsewhere"] = from_elsewhere(root / "step-00000002", root / "copy" / "step-00000002")
    return found


def buffers_of(built: Engine) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in built.module.named_buffers()}


def from_elsewhere(whole: Path, path: Path) -> str:
    """The error of loading a copy in which the other host sees something other than what was written."""
    members._present = tuple(replace(m, place=str(m.rank)) for m in members.present())
    handover.WAIT_S = handover.AGAIN_S = 0.1
    if collectives.rank() == 0:
        shutil.copytree(whole, path)
        share = path / "rank-00000-of-00002.safetensors"
        data = bytearray(share.read_bytes())
        data[-9] ^= 1
        share.write_bytes(data)
    collectives.barrier()
    with pytest.raises(UserError) as caught:
        Checkpoints(path.parent, RUN).load(tiny.build(0), only=path)
    return caught.value.what


def alone(path: Path) -> dict[str, torch.Tensor]:
    """A single rank loads the mean of the buffers, not those of the first rank."""
    built = tiny.build(0, seed=9)
    Checkpoints(path.parent, RUN).load(built, only=path)
    return buffers_of(built)


def test_two_ranks_save_together_and_load_their_own(tmp_path):
    ranks = rank_group.run(by_two, 2, tmp_path)
    path = tmp_path / "step-00000002"
    for found in ranks:
        assert found["finish"] == path.name
        assert found["state"] == found["loaded state"] == ranks[0]["state"]
        assert "not JSON serializable" in found["problem"]
        assert found["names"] == ["latest", path.name]
        assert found["owns"] == [{"rank": 0}, {"rank": 1}]
        for name, buffer in found["buffers"].items():
            assert torch.equal(found["loaded buffers"][name], buffer), name
        assert "rank-00000-of-00002.safetensors has other contents" in found["elsewhere"]
    listed = disk.checksums(path)
    sizes = [size for name, (size, _) in listed.items() if name.endswith(".safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 2 * min(sizes)
    one, two = (rank["buffers"]["norm.running_mean"] for rank in ranks)
    assert not torch.equal(one, two)
    (mean,) = rank_group.run(alone, 1, path)
    torch.testing.assert_close(mean["norm.running_mean"], (one + two) / 2)
