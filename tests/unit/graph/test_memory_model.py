"""The memory model compared with actual arrays."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from cnn2gnn_dist import cli
from cnn2gnn_dist.graph import bank, memory_model
from cnn2gnn_dist.graph.partition import parts as partition
from cnn2gnn_dist.graph.sampler import TableSampler
from cnn2gnn_dist.graph.version import GraphVersion, GraphWriter, open_version
from cnn2gnn_dist.stages.neighbours.second_hop import CachedSecondHop

N, D, DIM, M, PARTS = 6000, 48, 16, 8, 4


def version(folder: Path) -> tuple[GraphVersion, list[partition.PartGraph]]:
    """A complete graph version: a ring with additional long-range edges."""
    rng = np.random.default_rng(0)
    step = rng.geometric(0.02, (N, M)) * rng.choice([-1, 1], (N, M))
    table = ((np.arange(N)[:, None] + step) % N).astype(np.int32)
    part = partition.assign_ranges(table, PARTS)
    writer = GraphWriter.create(
        folder,
        1,
        {
            "x": ((N, D), np.float16),
            "z": ((N, DIM), np.float32),
            "labels": ((N,), np.int32),
            "order": ((N,), np.int32),
            "candidates": ((N, M), np.int32),
            "part": ((N,), np.int32),
            "twin": ((N,), np.int32),
        },
    )
    writer.rows("candidates", 0, table)
    writer.rows("part", 0, part)
    made = [partition.build_part(table, part, p) for p in range(PARTS)]
    for number, one in enumerate(made):
        one.save(writer.path / f"part-{number:02d}")
    writer.finalise({})
    return open_version(folder / "v0001"), made


def test_prediction_against_what_was_made(tmp_path: Path) -> None:
    whole, parts = version(tmp_path)
    halo1 = sum(p.num_halo1 for p in parts) / N
    halo2 = sum(len(p.nodes_L) for p in parts) / N - 1 - halo1
    sizes = memory_model.Sizes(N, D, DIM, M, PARTS, PARTS, halo1, halo2)
    found = memory_model.structures(sizes)
    on_disk = sum(path.stat().st_size for path in whole.path.rglob("*.npy"))
    assert memory_model.total(found, "disk") == pytest.approx(on_disk, rel=0.02)
    held = [bank.load_bank(whole, [p]) for p in range(PARTS)]
    used = [
        sum(t.nbytes for t in (b.x_LD.numpy(), b.z_Ld.numpy(), b.labels_L.numpy(), b.nodes_L, b.table_KM))
        + TableSampler(b.table_KM, 0, b.nodes_L)._nodes_K.nbytes
        for b in held
    ]  # fmt: skip
    assert memory_model.total(found, "rank") == pytest.approx(np.mean(used), rel=0.02)


def test_averages_replace_the_second_halo(tmp_path: Path) -> None:
    whole, parts = version(tmp_path)
    halo1 = sum(p.num_halo1 for p in parts) / N
    halo2 = sum(len(p.nodes_L) for p in parts) / N - 1 - halo1
    sizes = memory_model.Sizes(N, D, DIM, M, PARTS, PARTS, halo1, halo2, averaged=True)
    used = []
    for number in range(PARTS):
        held = bank.load_bank(whole, [number], second_halo=False)
        second = CachedSecondHop(held, 3, everyone=bank.load_bank(whole))
        tensors = held.x_LD, held.z_Ld, held.labels_L, second.mean_KD, second.p_KM
        arrays = held.nodes_L, held.table_KM, TableSampler(held.table_KM, 0, held.nodes_L)._nodes_K
        used.append(sum(t.numpy().nbytes for t in tensors) + sum(a.nbytes for a in arrays))
    found = memory_model.total(memory_model.structures(sizes), "rank")
    assert found == pytest.approx(np.mean(used), rel=0.02)


def test_what_the_model_leaves_out_is_at_most_as_large_as_the_averages(tmp_path: Path) -> None:
    """With one neighbor, whose weight is 1, every average is kept without it as well."""
    whole, _ = version(tmp_path)
    z_Nd = np.random.default_rng(1).standard_normal((N, DIM)).astype(np.float32)
    np.asarray(np.load(whole.path / "z.npy", mmap_mode="r+"))[:] = z_Nd
    held = bank.load_bank(whole, [0], second_halo=False)
    everyone = bank.load_bank(whole)
    one, several = (CachedSecondHop(held, k, everyone=everyone) for k in (1, 5))
    assert one.without_HD.shape == one.mean_KD.shape
    assert one.without_HD.dtype == one.mean_KD.dtype
    assert one.heavy_H.nbytes == 8 * len(one.mean_KD)
    assert len(several.heavy_H) < 0.1 * len(several.mean_KD)


def test_halos_grow_with_the_parts_and_stay_within_the_graph() -> None:
    assert memory_model.halos(1) == (0.0, 0.0)
    for parts, known in memory_model.HALOS.items():
        assert memory_model.halos(parts) == pytest.approx(known)
    seen = [memory_model.halos(parts) for parts in (1, 2, 3, 4, 6, 8, 16, 64, 1024)]
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in itertools.pairwise(seen))
    assert all(sum(memory_model.halos(parts)) <= parts - 1 for parts in range(1, 50))


def test_plan_prints_the_model(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["plan", "--images", "1281167", "--dim", "512", "--parts", "16"]
    assert cli.main([*given, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sizes"]["ranks"] == 16
    by_name = {one["name"]: one["bytes"] for one in plan["structures"]}
    assert by_name["x, features, float16"] == 1281167 * 512 * 2
    assert cli.main([*given, "--live", "--halo1", "0.5", "--halo2", "1"]) == 0
    text = capsys.readouterr().out
    assert "1,281,167 images" in text
    assert "halos: 0.50 and 1.00" in text
    assert "index of z for live search" in text
    assert "1.2 GiB" in text


@pytest.mark.parametrize(
    "wrong",
    [["--images", "0"], ["--images", "4", "--parts", "8"], ["--images", "99", "--ranks", "9"]],
)
def test_plan_refuses_sizes_that_make_no_graph(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *wrong]) == 2
    assert "remedy" in capsys.readouterr().err
