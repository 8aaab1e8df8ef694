"""Several views of a sample: each equals the single view of that number, and the image is decoded once."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist.data import Crops, Stream, ViewSpec, mix_pairs, multi_crop
from cnn2gnn_dist.data.images import batch_views
from cnn2gnn_dist.data.images.batch_views import Wanted, fill_several
from cnn2gnn_dist.data.images.crops import pixel_bytes
from cnn2gnn_dist.data.images.decode import CorruptSample, decode
from cnn2gnn_dist.data.images.views import CLEAN, render
from cnn2gnn_dist.data.reading.reader import Batch
from cnn2gnn_dist.errors import UserError
from tests.support.shards import (
    encode_image,
    own_cache,  # noqa: F401 (fixture)
    random_images,
    shard_pattern,
    write_tar,
)
from tests.unit.data.test_batch_views import chunk
from tests.unit.data.test_views import _uniform

COUNT = 50
IMAGES = [random_images(1, 40 + i % 7, 61 - i % 5, seed=i)[0] for i in range(COUNT)]
LABELS = np.arange(COUNT) % 6
DINO = multi_crop(size=32, local_size=16, local_count=3, seed=5)
MIXED = (
    Crops(ViewSpec("crop_flip", 24, seed=1)),
    Crops(ViewSpec("random_resized_crop", 32, seed=1, randaugment=1, cutout=6), 2),
    Crops(ViewSpec("shift", 24, seed=2, resize=1.2), 2),
)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return shard_pattern(tmp_path / "s", IMAGES, LABELS)


def a_stream(shards: str, views: object = DINO, rank: int = 0, ranks: int = 1, **how) -> Stream:
    how = {"global_batch": 8, "seed": 3, "window": 2, "backend": "local", **how}
    return Stream(shards, views=views, rank=rank, world_size=ranks, **how)


def by_hand(groups: tuple[Crops, ...], image: np.ndarray, sample: int, view: int) -> list[list]:
    """Every crop alone, from the complete image."""
    number, made = itertools.count(view * sum(group.count for group in groups)), []
    for group in groups:
        own = [CLEAN] if view == CLEAN else [next(number) for _ in range(group.count)]
        made.append([render(group.views, image, sample, one) for one in own])
    return made


@pytest.mark.parametrize("groups", [DINO, MIXED, DINO[:1]], ids=["dino", "mixed", "one"])
@pytest.mark.parametrize("train", [True, False])
def test_every_crop_is_the_plain_view_of_its_number(shards, groups, train):
    with a_stream(shards, groups, train=train) as stream:
        for epoch in range(2):
            for batch in stream:
                assert len(batch.crops) == len(groups)
                np.testing.assert_array_equal(batch.images, batch.crops[0][0])
                for row, sample in enumerate(batch.ids.tolist()):
                    view = epoch if train else CLEAN
                    wanted = by_hand(groups, IMAGES[sample], sample, view)
                    for found, own in zip(batch.crops, wanted, strict=True):
                        np.testing.assert_array_equal(found[:, row], own)


def test_one_view_is_what_it_was(shards):
    spec = ViewSpec("random_resized_crop", 32, seed=5)
    with a_stream(shards, spec) as plain, a_stream(shards, [Crops(spec)]) as grouped:
        for _ in range(2):
            for one, other in zip(plain, grouped, strict=True):
                np.testing.assert_array_equal(one.images, other.images)
                assert one.crops == ()
                assert [crop.shape for crop in other.crops] == [(1, 8, 32, 32, 3)]


def test_no_two_crops_share_their_draws():
    """Not even groups with the same seed: a small crop is not a part of the large crop of the same number."""
    image = random_images(1, 90, 120)[0]
    spec = ViewSpec("random_resized_crop", 16)
    made = [
        view
        for epoch in range(3)
        for own in by_hand((Crops(spec, 3), Crops(spec, 3)), image, 7, epoch)
        for view in own
    ]
    assert len({view.tobytes() for view in made}) == 18


@pytest.mark.parametrize("held", [1, 3000, 4_000_000], ids=str)
@pytest.mark.parametrize("groups", [DINO, MIXED], ids=["dino", "mixed"])
def test_a_chunk_of_any_images(groups, held, monkeypatch):
    """Including corrupt ones, whose rows are left untouched in all views."""
    monkeypatch.setattr(batch_views, "MOST_HELD", held)
    blobs = chunk()
    ids = np.random.default_rng(0).permutation(10**6)[: len(blobs)]
    first, wanted = 3 * 5, []  # view 3, with five crops per view
    for group in groups:
        side = group.views.size
        images = np.full((group.count, len(blobs), side, side, 3), 99, np.uint8)
        wanted.append(Wanted(group.views, range(first, first + group.count), images))
        first += group.count
    wrong = fill_several(wanted, blobs, ids)
    assert len(wrong) == 3
    for row, data in enumerate(blobs):
        if row in wrong:
            with pytest.raises(CorruptSample):
                decode(data)
            assert all((one.images_VNHWC[:, row] == 99).all() for one in wanted)
            continue
        made = by_hand(groups, decode(data), int(ids[row]), 3)
        for one, own in zip(wanted, made, strict=True):
            np.testing.assert_array_equal(one.images_VNHWC[:, row], own)


@pytest.mark.parametrize("groups", [DINO, MIXED], ids=["dino", "mixed"])
def test_each_image_is_decoded_once(groups, monkeypatch):
    calls = []
    for name in ("decode", "decode_crop"):
        real = getattr(batch_views, name)
        count = lambda *a, real=real: calls.append(1) or real(*a)  # noqa: E731
        monkeypatch.setattr(batch_views, name, count)
    blobs = [encode_image(image, "jpg") for image in IMAGES[:9]]
    wanted = [
        Wanted(
            one.views,
            range(one.count),
            np.zeros((one.count, 9, one.views.size, one.views.size, 3), np.uint8),
        )
        for one in groups
    ]
    assert not fill_several(wanted, blobs, np.arange(9))
    assert len(calls) == 9


def whole(batches: list[Batch]) -> list[list[np.ndarray]]:
    """Each batch's arrays, including the partners'."""
    return [
        [*one.crops, one.images, one.ids, one.labels, one.valid]
        for batch in batches
        for one in (batch, batch.partners)
        if one is not None
    ]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_ranks_and_readers_do_not_matter(shards, ranks, workers):
    with a_stream(shards, pairs=True) as stream:
        wanted = whole([batch for _ in range(2) for batch in stream])
    parts = []
    for rank in range(ranks):
        with a_stream(shards, rank=rank, ranks=ranks, workers=workers, pairs=True) as stream:
            parts.append(whole([batch for _ in range(2) for batch in stream]))
    for one, *shares in zip(wanted, *parts, strict=True):
        for number, array in enumerate(one):
            axis = int(number < len(DINO))
            joined = np.concatenate([share[number] for share in shares], axis=axis)
            np.testing.assert_array_equal(joined, array)


def test_partners_depend_on_seed_sample_and_view_alone(shards):
    spec = ViewSpec("random_resized_crop", 32, seed=9)
    met = set()
    with a_stream(shards, spec, pairs=True, num_views=2) as stream:
        for epoch in range(4):
            for batch in stream:
                for row, sample in enumerate(batch.ids.tolist()):
                    partner = int(_uniform(9, sample, epoch % 2, 203) * COUNT)
                    other = batch.partners
                    assert other.ids[row] == partner
                    assert other.labels[row] == LABELS[partner]
                    wanted = render(spec, IMAGES[partner], partner, epoch % 2)
                    np.testing.assert_array_equal(other.images[row], wanted)
                    met.add((sample, epoch % 2, partner))
    assert len(met) == len({one[:2] for one in met})


@pytest.mark.parametrize("how", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 1.0, "cutmix": 0.5}])
def test_mixed_pairs_are_the_same_in_any_batch(shards, how):
    found: dict[int, list[tuple[torch.Tensor, ...]]] = {}
    spec = ViewSpec("crop_flip", 32, seed=9, pad=0)  # black padding would be equal in both
    for batch_size, seed in ((8, 3), (10, 4)):
        with a_stream(shards, spec, pairs=True, global_batch=batch_size, seed=seed) as stream:
            for batch in stream:
                mixed = mix_pairs(batch, seed=9, **how)
                for row, sample in enumerate(batch.ids.tolist()):
                    one = (mixed.images[row].float(), mixed.share[row])
                    own, other = (torch.from_numpy(b.images[row]) for b in (batch, batch.partners))
                    check_mixed(one, own, other)
                    labels = (mixed.labels[row], mixed.partner_labels[row])
                    assert labels == (batch.labels[row], batch.partners.labels[row])
                    found.setdefault(sample, []).append(one)
    twice = [pair for pair in found.values() if len(pair) == 2]
    assert len(twice) > 30
    assert all(torch.equal(a, b) for pair in twice for a, b in zip(*pair, strict=True))


@pytest.mark.parametrize("how", [{"mixup": 8.0}, {"cutmix": 2.5}, {"mixup": -0.1, "cutmix": 1.0}])
def test_shares_that_cannot_be_drawn_are_refused(shards, how):
    with a_stream(shards, ViewSpec("crop_flip", 32), pairs=True) as stream:
        batch = next(iter(stream))
    with pytest.raises(UserError, match="α is from 0") as caught:
        mix_pairs(batch, seed=9, **how)
    assert caught.value.remedy


def check_mixed(one: tuple[torch.Tensor, ...], own: torch.Tensor, other: torch.Tensor) -> None:
    """Either blended by the share, or with a rectangle of that area cut in."""
    image, share = one
    blended = share * own + (1 - share) * other
    if not torch.allclose(image, blended, atol=1e-3):
        assert ((image == own) | (image == other)).all()
        area = (image != own).any(-1).float().mean()
        assert float(area) == pytest.approx(1 - float(share), abs=0.02)


def test_a_corrupt_partner_is_counted_and_not_mixed(tmp_path):
    members = []
    for number, image in enumerate(IMAGES):
        data = encode_image(image, "jpg")
        members.append((f"{number:03d}.jpg", data[:100] if number % 5 == 0 else data))
        members.append((f"{number:03d}.cls", str(LABELS[number]).encode()))
    write_tar(tmp_path / "x.tar", members)
    spec = ViewSpec("crop_flip", 32, seed=9)
    with a_stream(str(tmp_path / "x.tar"), spec, pairs=True, max_corrupt=1.0) as stream:
        for batch in stream:
            other = batch.partners
            for one in (batch, other):
                np.testing.assert_array_equal(one.valid, one.ids % 5 != 0)
                assert len(one.problems) == int((~one.valid).sum())
            mixed = mix_pairs(batch, seed=9, mixup=1.0)
            alone = torch.from_numpy(~(batch.valid & other.valid))
            assert (mixed.share[alone] == 1).all()
            assert torch.equal(mixed.images[alone], torch.from_numpy(batch.images).float()[alone])
    with (
        pytest.raises(UserError, match="corrupt images"),
        a_stream(str(tmp_path / "x.tar"), spec, pairs=True, max_corrupt=0.1) as stream,
    ):
        list(stream)


@pytest.mark.parametrize("views", [DINO, [Crops(ViewSpec("crop_flip", 32, seed=5), 3)]])
@pytest.mark.parametrize("decoded", [0, 40_000, 1 << 30])
def test_a_state_goes_on_and_the_decoded_cache_changes_no_byte(shards, views, decoded):
    with a_stream(shards, views) as stream:
        wanted = whole([batch for _ in range(2) for batch in stream])
    with a_stream(shards, views, decoded_bytes=decoded) as stream:
        found = whole(list(itertools.islice(stream, 4)))
        state = json.loads(json.dumps(stream.state_dict()))
    with a_stream(shards, views, decoded_bytes=decoded) as stream:
        stream.load_state_dict(state)
        found += whole([batch for _ in range(2) for batch in stream])
    for one, other in zip(found, wanted, strict=True):
        for left, right in zip(one, other, strict=True):
            np.testing.assert_array_equal(left, right)


def test_a_state_of_other_views_or_pairs_is_refused(shards):
    with a_stream(shards, DINO) as stream:
        state = stream.state_dict()
    for views, how in ((multi_crop(size=32, local_size=16, seed=5), {}), (DINO, {"pairs": True})):
        with a_stream(shards, views, **how) as stream, pytest.raises(UserError) as caught:
            stream.load_state_dict(state)
        assert caught.value.where == ("pairs" if how else "views")
    older = {name: value for name, value in state.items() if name != "pairs"}
    with a_stream(shards, DINO) as stream:
        stream.load_state_dict(older)


def test_a_state_from_before_a_field_of_views_fits_its_default_and_nothing_else(shards):
    plain = ViewSpec("crop_flip", 32, seed=5)
    with a_stream(shards, plain) as stream:
        state = json.loads(json.dumps(stream.state_dict()))
        for later in ("hook", "randaugment", "alternating", "fill"):
            del state["views"][later]
        stream.load_state_dict(state)
    with (
        a_stream(shards, replace(plain, alternating=True)) as stream,
        pytest.raises(UserError, match="views is"),
    ):
        stream.load_state_dict(state)


def test_what_a_sample_takes():
    assert pixel_bytes(ViewSpec("none", 10)) == 300
    assert pixel_bytes(DINO) == 3 * (2 * 32**2 + 3 * 16**2)


def test_wrong_arguments_are_refused(shards):
    with pytest.raises(UserError, match="no views"):
        a_stream(shards, ())
    with pytest.raises(UserError, match="group of 0 views"):
        Crops(ViewSpec("none", 8), 0)
    with a_stream(shards, DINO) as stream:
        batch = next(iter(stream))
    with pytest.raises(UserError, match="no partners"):
        mix_pairs(batch, seed=0, mixup=1.0)
    with a_stream(shards, DINO, pairs=True) as stream:
        batch = next(iter(stream))
    with pytest.raises(UserError, match="are 0"):
        mix_pairs(batch, seed=0)
