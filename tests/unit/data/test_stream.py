"""The public stream: its batches follow the order at any world size, and its only state is a cursor."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn2gnn_dist import durable
from cnn2gnn_dist.data import Stream, ViewSpec
from cnn2gnn_dist.data.images.views import render
from cnn2gnn_dist.data.order import Order
from cnn2gnn_dist.data.reading import shard_files
from cnn2gnn_dist.errors import ShardChanged, UserError
from tests.support.shards import (
    encode_image,
    make_shards,
    own_cache,  # noqa: F401 (fixture)
    random_images,
    shard_pattern,
    write_tar,
)

IMAGES = random_images(70)
LABELS = np.arange(70) % 6
VIEWS = ViewSpec("crop_flip", 32, seed=5)

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def shards(tmp_path: Path) -> str:
    return shard_pattern(tmp_path / "s", IMAGES, LABELS)


def a_stream(shards: str, rank: int = 0, world_size: int = 1, **how) -> Stream:
    how = {"global_batch": 8, "views": VIEWS, "seed": 3, "window": 2, "backend": "local", **how}
    return Stream(shards, rank=rank, world_size=world_size, **how)


def test_an_epoch_is_the_orders_and_every_epoch_another_view(shards):
    order = Order(np.array([9] * 7 + [7]), seed=3, global_batch=8, window=2)
    with a_stream(shards) as stream:
        assert len(stream) == order.batches_per_epoch == 8
        for epoch in range(2):
            assert stream.epoch == epoch
            for number, batch in enumerate(stream):
                ids = order.batch(epoch, number)
                np.testing.assert_array_equal(batch.ids, ids)
                np.testing.assert_array_equal(batch.labels, LABELS[ids])
                wanted = [render(VIEWS, IMAGES[i], i, epoch) for i in ids.tolist()]
                np.testing.assert_array_equal(batch.images, wanted)
            assert number == 7


@pytest.mark.parametrize("stop", [0, 1, 5, 7, 8, 11])
def test_a_state_goes_on_at_another_world_size(shards, stop):
    with a_stream(shards) as whole:
        wanted = [batch for _ in range(3) for batch in whole][stop:]
    with a_stream(shards, 1, 2) as stream:
        read = (batch for _ in range(3) for batch in stream)
        for _ in range(stop):
            next(read)
        state = json.loads(json.dumps(stream.state_dict()))  # plain data: fits any checkpoint
    found = []
    for rank in range(4):
        with a_stream(shards, rank, 4) as stream:
            stream.load_state_dict(state)
            rest = []
            while stream.epoch < 3:
                rest += list(stream)
            found.append(rest)
    assert {len(rest) for rest in found} == {len(wanted)}
    for number, batch in enumerate(wanted):
        parts = [rest[number] for rest in found]
        np.testing.assert_array_equal(np.concatenate([p.ids for p in parts]), batch.ids)
        np.testing.assert_array_equal(np.concatenate([p.images for p in parts]), batch.images)


def test_resuming_reads_nothing_of_what_was_before(shards, monkeypatch):
    with a_stream(shards) as stream:
        everything = [batch.ids for batch in stream]
        state = {**stream.state_dict(), "epoch": 0, "batch": 7}
    read, opened, plain, opening = [], [], shard_files.ShardFiles.read_all, shard_files.os.open
    monkeypatch.setattr(
        shard_files.ShardFiles,
        "read_all",
        lambda self, samples: (read.extend(samples), plain(self, samples))[1],
    )
    monkeypatch.setattr(
        shard_files.os, "open", lambda path, *a: (opened.append(str(path)), opening(path, *a))[1]
    )
    with a_stream(shards) as stream:
        stream.load_state_dict(state)
        (last,) = list(stream)
    assert read == everything[7].tolist() == last.ids.tolist()
    needed = {stream.manifest.shards[s].path for s in stream.manifest.shard_N[last.ids]}
    assert {path for path in opened if path.endswith(".tar")} == needed
    assert len(needed) < len(stream.manifest.shards)


def test_the_cursor_in_a_loop_that_breaks_and_at_the_end(shards):
    with a_stream(shards) as stream:
        for _ in stream:
            if stream.batch == 3:
                break
        assert (stream.epoch, stream.batch) == (0, 3)
        assert len(list(stream)) == 5
        assert (stream.epoch, stream.batch) == (1, 0)
        stream.set_epoch(0)
        assert len(list(stream)) == 8


def test_a_state_after_the_last_batch_is_the_next_epochs_first(shards):
    with a_stream(shards) as stream:
        for _ in stream:
            state = stream.state_dict()
        assert state["batch"] == 8  # taken inside the loop, after the last batch
        second = [batch.ids for batch in stream]
    with a_stream(shards) as stream:
        stream.load_state_dict(state)
        np.testing.assert_array_equal([batch.ids for batch in stream], second)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"global_batch": 16}, "global_batch"),
        ({"window": 3}, "window"),
        ({"num_views": 2}, "num_views"),
        ({"views": ViewSpec("shift", 32, seed=5)}, "views"),
        ({"train": False}, "train"),
    ],
)
def test_a_state_of_another_stream_is_refused(shards, change, field):
    with a_stream(shards) as stream:
        state = stream.state_dict()
    with a_stream(shards, **change) as stream, pytest.raises(UserError) as error:
        stream.load_state_dict(state)
    assert error.value.where == field


def test_changed_data_is_refused_not_skipped_through(shards, tmp_path):
    with a_stream(shards) as stream:
        state = stream.state_dict()
    make_shards(tmp_path / "s", IMAGES[:61], LABELS[:61], shard_size=9)
    (tmp_path / "s" / "shard-000007.tar").unlink()
    with a_stream(shards) as stream, pytest.raises(UserError) as error:
        stream.load_state_dict(state)
    assert error.value.where == "data"


@pytest.mark.parametrize("batch", [-1, 9])
def test_a_cursor_outside_is_refused(shards, batch):
    with a_stream(shards) as stream, pytest.raises(UserError, match="is outside"):
        stream.load_state_dict({**stream.state_dict(), "batch": batch})


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_shows_all_once_and_masks_the_padding(shards, world_size):
    seen = []
    for rank in range(world_size):
        with a_stream(shards, rank, world_size, train=False) as stream:
            batches = list(stream)
            assert len(batches) == len(stream) == 9
        for batch in batches:
            seen += batch.ids[batch.valid].tolist()
            for row in np.flatnonzero(batch.valid):
                np.testing.assert_array_equal(batch.images[row], IMAGES[batch.ids[row]])
    assert sorted(seen) == list(range(70))


def test_shards_are_indexed_once_and_again_when_they_change(shards, tmp_path):
    with a_stream(shards) as stream:
        path = stream.manifest_path
    with a_stream(shards) as stream:
        assert stream.manifest_path == path
    with a_stream(str(path)) as stream:
        assert len(stream.manifest) == 70
    make_shards(tmp_path / "s", IMAGES, LABELS[::-1], shard_size=9)
    with a_stream(shards) as stream:
        assert stream.manifest_path != path
        np.testing.assert_array_equal(stream.manifest.label_N, LABELS[::-1])


def test_a_cache_folder_that_cannot_be_made_is_named(shards, tmp_path, monkeypatch):
    with a_stream(shards) as stream:
        path = stream.manifest_path
    (tmp_path / "file").touch()
    with monkeypatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        with pytest.raises(UserError, match="can't be written to") as caught:
            a_stream(shards)
        assert caught.value.where == str(tmp_path / "file" / "cnn2gnn")
        assert "XDG_CACHE_HOME" in caught.value.remedy
    monkeypatch.setattr(durable, "create_folder", lambda folder: pytest.fail("it is written to"))
    with a_stream(shards) as stream:  # indexed before
        assert stream.manifest_path == path


def test_a_list_of_class_names_that_changes_is_read_again(shards, tmp_path):
    names = tmp_path / "s" / "shard-classes.json"
    for classes in ("abcdef", "fedcba"):
        names.write_text(json.dumps(list(classes)))
        os.utime(names, ns=(ord(classes[0]), ord(classes[0])))
        with a_stream(shards) as stream:
            assert stream.manifest.classes == tuple(classes)


def test_corrupt_samples_are_masked_and_bounded(tmp_path):
    rows = [
        (f"{i}.{kind}", data) for i in range(16) for kind, data in (("cls", b"0"), ("jpg", b"?"))
    ]
    write_tar(tmp_path / "s" / "a.tar", rows)
    with a_stream(str(tmp_path / "s"), max_corrupt=1.0) as stream:
        assert not np.concatenate([batch.valid for batch in stream]).any()
    with (
        a_stream(str(tmp_path / "s"), max_corrupt=0.5) as stream,
        pytest.raises(UserError) as error,
    ):
        list(stream)
    assert error.value.where == "max_corrupt"
    assert "a.tar" in str(error.value)


def test_corrupt_samples_count_against_the_limit_by_epoch(tmp_path):
    """A rank reads other samples in every epoch, in the end all of them: the limit is for one epoch's."""
    bad, ranks, epochs = {3, 17, 21, 38}, 2, 4
    rows = []
    for i in range(40):
        data = b"?" if i in bad else encode_image(IMAGES[i])
        rows += [(f"{i:02d}.cls", b"0"), (f"{i:02d}.png", data)]
    write_tar(tmp_path / "s" / "a.tar", rows)

    def read(seed: int) -> list[set[int]]:
        """The corrupt samples that rank 0 reads in each epoch."""
        order = Order(np.array([40]), seed=seed, global_batch=8, window=2)
        return [
            {i for b in range(5) for i in order.rank_batch(e, b, 0, ranks).tolist()} & bad
            for e in range(epochs)
        ]

    seed = next(
        s
        for s in range(1000)
        if max(map(len, read(s))) == 2 and len(set.union(*read(s))) == len(bad)
    )
    with a_stream(str(tmp_path / "s"), 0, ranks, seed=seed, max_corrupt=0.12) as stream:
        for _ in range(epochs):  # 2 of 20 in each, within 12 %; 4 in all
            list(stream)
    with (
        a_stream(str(tmp_path / "s"), 0, ranks, seed=seed, max_corrupt=0.09) as stream,
        pytest.raises(UserError, match="2 corrupt images among about 20"),
    ):
        [list(stream) for _ in range(epochs)]


def test_partners_count_among_the_samples_that_are_read(tmp_path):
    rows = [(f"{i:02d}.{kind}", b"0") for i in range(16) for kind in ("cls", "png")]
    write_tar(tmp_path / "s" / "a.tar", rows)
    for pairs, share in (
        (False, 4),
        (True, 7),
    ):  # a rank's own 4, and 4 partners, some of them twice
        with (
            a_stream(str(tmp_path / "s"), 0, 4, pairs=pairs, max_corrupt=0.0) as stream,
            pytest.raises(UserError, match=f"among about {share} of this rank"),
        ):
            list(stream)


def test_tensors_share_the_batchs_memory(shards):
    with a_stream(shards) as stream:
        batch = next(iter(stream))
    images, labels, valid = batch.tensors()
    assert (images.dtype, labels.dtype, valid.dtype) == (torch.uint8, torch.int64, torch.bool)
    assert images.data_ptr() == batch.images.ctypes.data


def test_readers_are_ended(shards):
    stream = a_stream(shards)
    next(iter(stream))
    stream.close()
    with pytest.raises(RuntimeError):
        list(stream)


def test_a_shard_that_was_replaced_can_be_indexed_again(shards):
    with a_stream(shards) as stream:
        shard = Path(stream.manifest.shards[0].path)
        write_tar(shard, [("0.png", b"no image"), ("0.cls", b"1")])
        with pytest.raises(UserError, match="when indexed") as caught:
            list(stream)
        assert "--update" not in caught.value.remedy
        assert f"remove {stream.manifest_path} " in caught.value.remedy
        stream.manifest_path.unlink()
    with a_stream(shards) as again:
        assert len(again.manifest) == 70 - 9 + 1


def test_readers_in_other_processes_notice_a_changed_shard():
    made = pickle.loads(pickle.dumps(ShardChanged("it grew", where="a.tar")))
    assert type(made) is ShardChanged
    assert (made.what, made.where) == ("it grew", "a.tar")
    assert made.remedy.endswith("--update")
