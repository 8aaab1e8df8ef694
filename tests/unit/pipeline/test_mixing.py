"""Mixup and cutmix: the formulas, and that pairs do not depend on which rank holds them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnn2gnn_dist.data.mixing import beta
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.stages.shared.mixing import Mixed, mix

IDS = np.array([40, 7, 3, 99, 12, 5, 61, 8])
HOWS = [(1.0, 0.0), (0.0, 1.0), (0.4, 1.0)]


def images(count: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 16, 12, 3), generator=generator).to(torch.uint8)


def mixed(rows: slice, how: tuple[float, float], **more: torch.Tensor) -> Mixed:
    batch, valid = images()[rows], more.get("valid", torch.ones(8))[rows]
    return mix(batch, IDS[rows], valid, seed=1, epoch=2, mixup=how[0], cutmix=how[1])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("parts", [2, 4])
def test_ranks_and_micro_batches_do_not_matter(how: tuple[float, float], parts: int) -> None:
    whole, size = mixed(slice(None), how), 8 // parts
    for part in range(parts):
        rows = slice(part * size, (part + 1) * size)
        own = mixed(rows, how)
        assert torch.equal(own.images_BHWC.float(), whole.images_BHWC[rows].float())
        assert torch.equal(own.share_B, whole.share_B[rows])
        assert torch.equal(own.partner_B + part * size, whole.partner_B[rows])


def test_mixup_blends_pairs() -> None:
    found, batch = mixed(slice(None), (1.0, 0.0)), images().float()
    assert found.partner_B.tolist() == [1, 0, 3, 2, 5, 4, 7, 6]
    for row in range(8):
        share = found.share_B[row]
        assert share == found.share_B[row ^ 1]
        wanted = share * batch[row] + (1 - share) * batch[row ^ 1]
        torch.testing.assert_close(found.images_BHWC[row], wanted)
    assert len(set(found.share_B.tolist())) == 4


def test_cutmix_takes_a_rectangle_whose_area_is_the_partners_share() -> None:
    found, batch = mixed(slice(None), (0.0, 1.0)), images()
    assert found.images_BHWC.dtype == torch.uint8
    for row in range(8):
        other = (found.images_BHWC[row] == batch[row ^ 1]).all(-1)
        own = (found.images_BHWC[row] == batch[row]).all(-1)
        assert (own | other).all()
        assert float(other.float().mean()) == pytest.approx(1 - float(found.share_B[row]), abs=0.01)
        rows, columns = other.any(1).sum(), other.any(0).sum()
        assert int(other.sum()) == int(rows * columns)


def test_the_loss_is_that_of_mixed_labels() -> None:
    """Cross-entropy is linear in its target."""
    found = mixed(slice(None), (1.0, 0.0))
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    share = found.share_B[:, None]
    target = share * one_hot + (1 - share) * one_hot[found.partner_B]
    cross = torch.nn.CrossEntropyLoss(reduction="none", label_smoothing=0.1)
    own, other = cross(logits, labels), cross(logits, labels[found.partner_B])
    torch.testing.assert_close(found.loss(own, other), cross(logits, target))


@pytest.mark.parametrize("how", HOWS)
def test_pairs_with_a_corrupt_image_stay(how: tuple[float, float]) -> None:
    valid = torch.ones(8)
    valid[2] = 0
    found = mixed(slice(None), how, valid=valid)
    assert found.share_B[2:4].tolist() == [1, 1]
    assert torch.equal(found.images_BHWC[2:4].float(), images()[2:4].float())


def test_with_both_half_of_the_pairs_are_cut() -> None:
    batch = torch.zeros(2000, 8, 8, 3, dtype=torch.uint8)
    batch[1::2] = 200
    how = {"seed": 0, "epoch": 0, "mixup": 1.0, "cutmix": 1.0}
    found = mix(batch, np.arange(2000), torch.ones(2000), **how)
    blended = ((found.images_BHWC > 0) & (found.images_BHWC < 200)).flatten(1).any(1)
    assert float(blended.float().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 2.0])
def test_shares_are_of_beta(alpha: float) -> None:
    found = beta(alpha, 3, np.arange(20_000), 1)
    assert found.mean() == pytest.approx(0.5, abs=0.01)
    assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.04)
    assert np.array_equal(found[5:9], beta(alpha, 3, np.arange(5, 9), 1))
    assert not np.array_equal(found, beta(alpha, 3, np.arange(20_000), 2))


def test_an_odd_batch_is_refused() -> None:
    with pytest.raises(UserError, match="can't be mixed in pairs"):
        mixed(slice(0, 3), (1.0, 0.0))
