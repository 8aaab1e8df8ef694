"""Scores compared with their definitions, scikit-learn, and loops: across processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cnn2gnn_dist.stages.shared import predictions
from tests.support import rank_group
from tests.unit.models.test_student import student
from tests.unit.pipeline.test_predictions import (  # noqa: F401 (fixtures)
    BATCH,
    CORRUPT,
    IMAGES,
    LABELS,
    SEED,
    context,
    found,
    held_out,
)


def batch_student() -> torch.nn.Module:
    """A student in which the images of a batch influence each other, with gates open."""
    return student("batch").eval()


def ranks_judge(root: str) -> dict[str, Any]:
    """A case of ``rank_group``: a batch-scope student's answers, and the images it was shown."""
    model, shown = batch_student(), []

    def answer(images: Tensor) -> dict[str, Tensor]:
        shown.append(images.numpy().copy())
        output = model(images)
        return {"student": output.logits_BC.softmax(1), "alone": output.self_logits_BC.softmax(1)}

    here = context(Path(root))
    found = predictions.evaluate(here, answer, here.paths.test_manifest, shuffle_seed=SEED)
    return {"found": found.found, "left_out": found.left_out, "shown": shown}


def in_company(images: np.ndarray, seed: int | None) -> dict[int, Tensor]:
    """Probabilities of each valid image, classified together with the other valid images of its batch."""
    places = np.arange(IMAGES) if seed is None else np.random.default_rng(seed).permutation(IMAGES)
    found = {}
    for ids in np.array_split(places, 5):  # 23 images in batches of at most 5
        ids = np.array([i for i in ids if i not in CORRUPT])
        with torch.no_grad():
            rows = batch_student()(torch.from_numpy(images[ids])).logits_BC.softmax(1)
        found.update(zip(ids.tolist(), rows, strict=True))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_neither_padding_nor_corrupt_images_join_a_batch(tmp_path, world_size):
    """On any number of ranks: the same batches, hence the same answers, and the same number of forward passes."""
    images = held_out(tmp_path)
    wanted = in_company(images, SEED)
    assert not torch.allclose(wanted[0], in_company(images, None)[0]), "company does not matter"
    if world_size == 1:
        said = [ranks_judge(str(tmp_path))]
    else:
        said = rank_group.run(ranks_judge, world_size, str(tmp_path))
    sound = [i for i in range(IMAGES) if i not in CORRUPT]
    assert len({len(one["shown"]) for one in said}) == 1, "ranks out of step"
    for one in said:
        assert set(one["left_out"]) == set(CORRUPT)
        assert all("i09" in one["left_out"][9] for one in said)
        found = one["found"]["student"]
        assert found.id_N.tolist() == one["found"]["alone"].id_N.tolist() == sound
        np.testing.assert_array_equal(found.label_N, LABELS[sound])
        for place, i in enumerate(sound):
            assert found.predicted_N[place] == int(wanted[i].argmax())
            assert found.confidence_N[place] == pytest.approx(float(wanted[i].max()), rel=1e-6)
    judged = [image for one in said for batch in one["shown"] for image in batch if image.any()]
    assert len(judged) == len(sound), "an image was shown twice, or not at all"
    idle = [batch for one in said for batch in one["shown"] if not batch.any()]
    assert len(idle) == (1 if world_size == 2 else 0)  # five batches, two ranks
