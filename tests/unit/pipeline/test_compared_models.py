"""The results reported next to the student's: its self path, its neighbors' vote, and the cost of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist import settings
from cnn2gnn_dist.graph.partition import parts
from cnn2gnn_dist.graph.version import GraphWriter, open_version
from cnn2gnn_dist.models.cost import count_flops
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.stages.compared_models import (
    ComparedModel,
    Row,
    StudentWithBank,
    label_vote,
    mirrored,
    self_path,
)
from cnn2gnn_dist.stages.neighbours.neighbourhood import Neighbourhood
from cnn2gnn_dist.stages.shared.context import Context, RunPaths
from tests.support.graphs import random_table
from tests.unit.models.test_student import DZ, C, D, make_images, student

N, M, B = 40, 6, 7


def attached(root: Path, *overrides: str) -> StudentWithBank:
    """A student with open gates over a random bank of N nodes, some without a label."""
    rng = np.random.default_rng(3)
    z = rng.normal(size=(N, DZ)).astype(np.float32)
    made = {
        "x": rng.random((N, D)).astype(np.float16),
        "z": z / np.linalg.norm(z, axis=1, keepdims=True),
        "labels": rng.integers(-1, C, N).astype(np.int32),
        "candidates": random_table(N, M, 0),
        "part": np.zeros(N, np.int32),
    }
    writer = GraphWriter.create(root, 1, {k: (a.shape, a.dtype.type) for k, a in made.items()})
    for name, array in made.items():
        writer.rows(name, 0, array)
    parts.build_part(made["candidates"], made["part"], 0).save(writer.path / "part-00")
    writer.finalise({"nodes": N})
    config = settings.load(
        "demo",
        ["graph.partition.parts=1", "graph.neighbours=3", f"graph.candidates={M}", "graph.sampling.fanouts=[6, 4]",
         f"graph.dim={DZ}", *overrides],
    )  # fmt: skip
    here = Context(config, Ranks(), RunPaths(root), root, "", "cpu", False)
    version = open_version(root / "v0001")
    return StudentWithBank(student("dataset").eval().float(), Neighbourhood(here, version, None), C)


def test_the_vote_is_the_weight_on_each_class():
    rng = np.random.default_rng(0)
    weights, labels = rng.random((5, 4)).astype(np.float32), rng.integers(-1, 3, (5, 4))
    labels[3] = -1  # unknown
    found = label_vote(torch.from_numpy(weights), torch.from_numpy(labels), 3)
    for row in range(5):
        mass = [
            sum(w for w, c in zip(weights[row], labels[row], strict=True) if c == k)
            for k in range(3)
        ]
        wanted = np.array(mass) / sum(mass) if sum(mass) else np.full(3, 1 / 3)
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("second_hop", ["sampled", "cached"])
def test_one_pass_answers_for_student_self_path_and_vote(tmp_path, second_hop):
    model, images = attached(tmp_path, f"graph.sampling.second_hop={second_hop}"), make_images(B)
    with torch.no_grad():
        answers = model.answer(images)
        assert list(answers) == ["student", "self_path", "vote"]
        torch.testing.assert_close(answers["student"], model.classify(images).softmax(1))
        alone = self_path(model.student, images)
        torch.testing.assert_close(alone, model.student(images, None).self_logits_BC)
        torch.testing.assert_close(answers["self_path"], alone.softmax(1))
        torch.testing.assert_close(answers["vote"], model.vote(images))
    for probability in answers.values():
        torch.testing.assert_close(probability.sum(1), torch.ones(B))
    assert not torch.allclose(answers["student"], answers["self_path"])

    # The vote by brute force: the six nearest rows of the bank, weights in closed form.
    z_Nd, labels_N = (np.asarray(getattr(model.around.version, n)) for n in ("z", "labels"))
    z_Bd = model.student.embed(images)[1].detach().numpy()
    for row in range(B):
        d_N = ((z_Bd[row] - z_Nd) ** 2).sum(1)
        near = np.argsort(d_N)[:4]
        gap = d_N[near[3]] - d_N[near[:3]]
        mass = np.zeros(C)
        for node, weight in zip(near[:3], gap / gap.sum(), strict=True):
            if labels_N[node] >= 0:
                mass[labels_N[node]] += weight
        wanted = mass / mass.sum() if mass.sum() else np.full(C, 1 / C)
        np.testing.assert_allclose(answers["vote"][row].numpy(), wanted, atol=1e-4)


def test_the_search_is_counted_once_where_torch_sees_it_too(tmp_path):
    """On a GPU the search is a matmul, which must not be counted in addition to its own figure."""
    model, images = attached(tmp_path), make_images(B)
    with torch.no_grad():
        on_cpu = model.student_flops(images), model.vote_flops(images)
        unseen = count_flops(model.classify, images)
        search = model.around.search
        index = search._opened()[0].index
        index._on_device = torch.from_numpy(index.base_Nd)  # as on an accelerator
        assert count_flops(model.classify, images) == unseen + B * 2 * N * DZ
        assert (model.student_flops(images), model.vote_flops(images)) == on_cpu
    assert on_cpu[0] == unseen + B * 2 * N * DZ
    assert on_cpu[1] == count_flops(model.student.embed, images) + B * 2 * N * DZ


def test_with_flip_probabilities_are_those_of_the_mean_logits(tmp_path):
    """The vote is the mean of both votes; costs are those of two images."""
    bank = attached(tmp_path)
    images = make_images(B)
    rows = {"student": Row(1, bank.classify, lambda shown: 10.0 * len(shown))}
    plain = ComparedModel(bank.answer, rows, with_bank=bank)
    found = mirrored(plain).answer(images)
    once, again = bank.answer(images), bank.answer(images.flip(2))
    with torch.no_grad():
        logits = (bank.classify(images) + bank.classify(images.flip(2))) / 2
    torch.testing.assert_close(found["student"], logits.softmax(1))
    torch.testing.assert_close(found["vote"], (once["vote"] + again["vote"]) / 2)
    assert not torch.allclose(found["student"], once["student"])
    row = mirrored(plain).rows["student"]
    assert (row.flops(images), row.notes, row.parameters) == (20.0 * B, {"flip": True}, 1)
    torch.testing.assert_close(mirrored(plain).answer(images.flip(2))["student"], found["student"])
