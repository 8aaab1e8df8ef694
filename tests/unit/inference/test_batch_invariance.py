"""An image's answer is bit-identical whether it is alone or in any batch, in any order."""

import numpy as np
import pytest
import torch

from cnn2gnn_dist.inference.batch_invariance import make_batch_invariant, smallest_batch
from cnn2gnn_dist.inference.classifier import Classifier
from cnn2gnn_dist.models.stem import build_stem
from tests.support.models import pictures

STEMS = [
    ("resnet_tiny", 32),
    ("conv3", 32),
    ("resnet18", 32),
    ("mobilenetv3_small_050", 32),
    ("efficientnet_b0", 32),
    ("regnety_002", 32),
    ("convnext_atto", 32),
    ("tf_efficientnet_lite0", 32),
    ("vit_tiny_patch16_224", 224),
]
# Networks with SiLU and the like; the last one has its own kind of convolution.
FILLED_UP = {
    "tf_efficientnet_lite0",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "regnety_002",
    "convnext_atto",
}


@pytest.mark.parametrize(
    ("name", "size"),
    [*STEMS[:2], *(pytest.param(*one, marks=pytest.mark.thorough) for one in STEMS[2:])],
)
def test_a_stem_gives_the_same_bits_in_every_batch(name, size):
    torch.manual_seed(0)
    stem = build_stem(name, 24, size).eval()
    images = torch.randn(5, 3, size, size)
    with torch.inference_mode():
        before = stem(images)
        make_batch_invariant(stem)
        whole = stem(images)
        torch.testing.assert_close(whole, before, atol=1e-4, rtol=1e-4)
        multiple = smallest_batch(stem, size)
        assert multiple == 1 or name in FILLED_UP

        def run(some):
            padded = torch.cat([some, some.new_zeros(-len(some) % multiple, 3, size, size)])
            return stem(padded)[: len(some)]

        whole = run(images)
        for batch in (1, 2, 4):
            assert torch.equal(torch.cat([run(part) for part in images.split(batch)]), whole)
        order = torch.tensor([3, 0, 4, 2, 1])
        assert torch.equal(run(images[order]), whole[order])


@pytest.mark.parametrize("inputs", [5, 10, 12, 33, 130, 254])
@pytest.mark.parametrize("outputs", [1, 2, 3, 10, 11, 12, 100])
def test_a_product_gives_a_row_the_same_bits_at_any_place(inputs, outputs):
    """For few outputs and an odd number of inputs, MKL sums some rows in another order than others."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(inputs, outputs).eval()
    rows = torch.randn(48, inputs)
    with torch.inference_mode():
        before = layer(rows)
        make_batch_invariant(layer)
        whole = layer(rows)
        torch.testing.assert_close(whole, before, atol=1e-5, rtol=1e-5)
        assert torch.equal(torch.cat([layer(row) for row in rows.split(1)]), whole)
        order = torch.randperm(48)
        assert torch.equal(layer(rows[order]), whole[order])


@pytest.mark.parametrize("threads", [1, 2])
def test_answers_of_a_model_do_not_depend_on_company(model, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        images = pictures(37, seed=5)
        whole = model.predict_proba(images)
        alone = np.concatenate([model.predict_proba([image]) for image in images])
        np.testing.assert_array_equal(alone, whole)
        order = np.random.default_rng(0).permutation(37)
        np.testing.assert_array_equal(model.predict_proba(images[order]), whole[order])
        others = np.concatenate([images[:3], pictures(60, seed=9)])
        np.testing.assert_array_equal(model.predict_proba(others)[:3], whole[:3])
    finally:
        torch.set_num_threads(before)


def test_every_name_of_the_cpu_is_the_cpu(model):
    def layers(device: str) -> list[type]:
        student = Classifier.open(model.folder, device=device).network.student
        return [type(module) for module in student.modules()]

    assert layers("cpu:0") == layers("cpu")
