"""`cnn2gnn init`: its choices as pure functions, and what it finds in a folder."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

from cnn2gnn_dist import consistency, settings
from cnn2gnn_dist.commands.init import command as init
from cnn2gnn_dist.commands.init import fitting, recipe, small_images, speed, text, weights
from cnn2gnn_dist.commands.init.recipe import Facts
from cnn2gnn_dist.commands.init.sources import find_source
from cnn2gnn_dist.commands.init.speed import Machine, Speed
from cnn2gnn_dist.commands.init.survey import look
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.teacher import build_teacher
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.unused_fields import Surroundings
from tests.support.shards import encode_image, make_shards, random_images

STAGES = ("teacher", "student", "graph", "control")
FACTS = st.builds(
    Facts,
    count_C=st.lists(st.integers(1, 3000), min_size=2, max_size=30).map(np.array),
    held=st.none() | st.integers(1, 5000),
    short_side=st.integers(8, 4000),
    alike=st.booleans(),
    grey=st.booleans(),
    bad=st.sampled_from([0.0, 0.001, 0.3]),
    decode_s=st.floats(1e-5, 0.3),
)
MACHINES = st.builds(
    Machine,
    ranks=st.integers(1, 8),
    cores=st.integers(8, 64),
    device=st.sampled_from(["cpu", "cuda"]),
    workers=st.integers(1, 6),
)
SPEEDS = st.floats(1e-3, 60.0).map(lambda s: Speed(s, s / 3, s / 4, s / 3, s / 12))


@pytest.mark.thorough
@trying(max_examples=40, deadline=None)
@given(FACTS, MACHINES, SPEEDS, st.floats(1, 1e4))
def test_any_images_and_minutes_give_a_config_that_fits_them(facts, machine, speed, minutes):
    images = recipe.training_images(facts)
    if images < recipe.FEWEST:
        with pytest.raises(UserError, match="are left for training"):
            recipe.check_enough(facts)
        return
    for net in recipe.nets(facts, machine, None):
        tree, estimate, _ = fitting.fit(facts, machine, net, speed, minutes)
        config = settings.check({**tree, "name": "x", "data": {"source": "shards", "train": "/x"}})
        ranks = config.run.ranks
        preflight.check_images(config, STAGES, images)
        preflight.check(config, ("teacher",), ranks)
        for name, section in (("teacher", config.teacher), ("student", config.student)):
            assert section.global_batch % ranks == 0, name
        assert ranks <= config.graph.partition.parts <= config.student.global_batch
        assert max(config.graph.sampling.fanouts) <= config.graph.candidates < images
        assert config.graph.start_epoch < config.student.epochs
        assert net.size <= max(facts.short_side, 32)
        around = Surroundings(on_gpu=machine.device == "cuda", ranks=ranks)
        assert consistency.notes(config, around) == []
        assert all(seconds >= 0 for seconds in estimate.seconds.values())


@trying(max_examples=40, deadline=None)
@given(FACTS, MACHINES, SPEEDS, st.floats(10, 500))
def test_the_estimate_keeps_to_the_minutes_wherever_they_are_enough(facts, machine, speed, minutes):
    if recipe.training_images(facts) < recipe.FEWEST:
        return
    net = recipe.nets(facts, machine, None)[0]
    tree, estimate, fits = fitting.fit(facts, machine, net, speed, minutes)
    if fits >= tree["teacher"]["epochs"] > 8:
        assert estimate.minutes <= 1.1 * minutes


@given(st.integers(8, 10_000_000))
def test_more_images_have_larger_batches_and_fewer_epochs(images):
    assert recipe.batch(images) <= recipe.batch(2 * images)
    assert recipe.batch(images) <= images
    assert recipe.wanted_epochs(images, False) >= recipe.wanted_epochs(2 * images, False)
    assert recipe.wanted_epochs(images, True) < recipe.wanted_epochs(images, False)


@given(st.integers(1, 5000), st.booleans())
def test_sizes_ascend_and_none_is_larger_than_the_images(side, alike):
    found = recipe.sizes(side, alike)
    assert found[0] == 32
    assert max(found) <= max(32, side)


def test_many_photographs_get_wide_networks_at_large_sizes_and_few_only_small_ones():
    machine = Machine(2, 2, "cpu")
    nets = recipe.nets(Facts(np.full(6, 6000), None, 375), machine, None)
    assert {net.size for net in nets} == set(recipe.SIZES)
    assert all((net.size > 64) == (net.teacher in recipe._TEACHERS[2:]) for net in nets)
    few = recipe.nets(Facts(np.full(6, 60), None, 375), machine, None)
    assert few == [net for net in nets if net.size <= 64]


def test_small_grey_images_are_not_mirrored_and_photographs_are_cropped_at_random():
    count_C = np.array([50, 50])
    net = recipe.Net(32, {}, {})
    assert recipe.views(Facts(count_C, None, 28, grey=True), net)["kind"] == "shift"
    assert recipe.views(Facts(count_C, None, 32), net)["kind"] == "crop_flip"
    assert recipe.views(Facts(count_C, None, 28, grey=True), net).get("padding", "zero") == "zero"
    large = recipe.Net(128, {}, {})
    photographs = Facts(count_C, None, 3000, decode_s=0.1)
    assert recipe.views(photographs, large, step_s=1.0)["kind"] == "random_resized_crop"
    assert recipe.views(photographs, large, step_s=0.01)["kind"] == "crop_flip"


def test_small_views_are_padded_with_the_image_and_varied_more_where_they_are_seen_often():
    facts, machine = Facts(np.full(2, 100), None, 375), Machine(2, 2, "cpu")
    net = recipe.nets(facts, machine, None)[0]
    few, many = (recipe.tree(facts, machine, net, epochs)["views"] for epochs in (10, 60))
    assert few["padding"] == many["padding"] == "reflect"
    assert "randaugment" not in few
    assert many["randaugment"] == 1
    spec = init._spec(many)
    assert (spec.reflect, spec.randaugment, spec.pad) == (True, 1, 4)


CIFAR = Facts(np.full(10, 5000), 10_000, 32, alike=True)


@pytest.mark.parametrize(
    ("facts", "same"),
    [
        (CIFAR, {"epochs", "control"}),
        (
            Facts(np.full(10, 50), None, 32),  # few images
            {"epochs", "control", "lr", "global_batch", "hidden", "label_dim"},
        ),
    ],
)
def test_small_color_images_get_the_networks_and_the_recipe_of_the_preset(facts, same):
    machine = Machine(2, 2, "cpu")
    nets = recipe.nets(facts, machine, None)
    made = recipe.tree(facts, machine, nets[-1], 16)
    preset = settings.as_tree(settings.load("cifar10"))
    for section in ("teacher", "student"):
        own = {key: value for key, value in made[section].items() if key not in same}
        assert own == {key: preset[section][key] for key in own}
        step = made[section]
        # The step of a batch that is 1/n as large is 1/sqrt(n) as long.
        assert step["lr"] ** 2 / step["global_batch"] == pytest.approx(0.75**2 / 512, rel=0.01)
    assert {k: preset["views"][k] for k in made["views"]} == made["views"]


@given(st.integers(8, 1_000_000))
def test_an_epoch_of_few_small_images_has_several_steps(images):
    batch = small_images.batch(images)
    assert batch <= max(4, images / 4)
    assert batch == 512 or batch > images / 8 or batch == 4


def test_small_gray_images_keep_their_networks():
    nets = recipe.nets(Facts(np.full(10, 5000), 10_000, 28, grey=True), Machine(2, 2, "cpu"), None)
    assert not any(net.whitened for net in nets)


def test_large_images_beside_the_small_size_keep_their_networks():
    nets = recipe.nets(replace(CIFAR, short_side=200, alike=False), Machine(2, 2, "cpu"), None)
    assert all(net.whitened == (net.size <= 64) for net in nets)
    assert {net.size for net in nets if not net.whitened} >= {96, 192}


def test_half_of_the_epochs_on_smaller_images_are_in_the_estimate():
    """At three quarters of the side a step costs 9/16: of half the epochs, 25/32 of the whole."""
    machine, net = Machine(1, 1, "cpu"), recipe.nets(CIFAR, Machine(1, 1, "cpu"), None)[0]
    made = recipe.tree(CIFAR, machine, net, 10)
    images = recipe.training_images(CIFAR)
    found = fitting.estimate(CIFAR, machine, made, Speed(10.0, 0.0, 0.0, 0.0, 0.0))
    steps = 10 * images / 512
    assert found.seconds["teacher"] == pytest.approx(steps * (10 * 25 / 32 + fitting._STEP_S))


def test_more_minutes_mean_more_epochs_up_to_twice_those_wanted():
    facts = Facts(np.full(10, 1000), None, 32)
    machine, net = Machine(2, 2, "cpu"), recipe.Net(32, recipe._TEACHERS[1], recipe._STEMS[1])
    speed = Speed(0.3, 0.15, 0.1, 0.1, 0.03)
    epochs = [
        fitting.fit(facts, machine, net, speed, m)[0]["teacher"]["epochs"]
        for m in (2, 10, 40, 4000)
    ]
    assert epochs == sorted(epochs)
    assert epochs[0] >= 2
    assert epochs[-1] == int(2 * recipe.wanted_epochs(recipe.training_images(facts), False))


def test_too_few_minutes_leave_the_control_out_before_they_are_exceeded():
    """Two epochs of 50,000 images take 5 minutes here, and a control adds a third of that."""
    facts = Facts(np.full(10, 5000), 10_000, 32)
    machine, net = Machine(2, 2, "cpu"), recipe.Net(32, recipe._TEACHERS[0], recipe._STEMS[0])
    speed = Speed(0.24, 0.14, 0.12, 0.08, 0.03)
    spent = {}
    for minutes in (3, 60):
        tree, estimate, _ = fitting.fit(facts, machine, net, speed, minutes)
        with_control = recipe.tree(facts, machine, net, tree["teacher"]["epochs"])
        spent[minutes] = estimate.minutes
        assert tree["student"].get("control", True) == (minutes == 60)
        whole = fitting.estimate(facts, machine, with_control, speed).minutes
        assert (whole > 1.25 * estimate.minutes) == (minutes == 3)
        assert settings.check({**tree, "name": "x", "data": {"source": "shards", "train": "/x"}})
    assert spent[60] <= 60


@pytest.mark.parametrize("grey", [False, True])
def test_the_text_reads_back_as_the_tree_whatever_the_paths(tmp_path, grey):
    facts = Facts(np.full(6, 60), None, 84, alike=True, grey=grey)
    machine = Machine(2, 2, "cpu")
    tree = recipe.tree(facts, machine, recipe.nets(facts, machine, None)[0], 20)
    tree = {"name": "x", "data": {"source": "imagefolder", "train": "/a: b/#c 'd'/é"}, **tree}
    written = text.as_text(["first", "second"], tree)
    assert yaml.safe_load(written) == {k: v for k, v in tree.items() if v}
    assert len(written.splitlines()) < 40
    (tmp_path / "my.yaml").write_text(written)
    assert settings.load(str(tmp_path / "my.yaml")) == settings.check(tree)


def folder_of(root, counts, side=(40, 48)):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number, image in enumerate(random_images(count, *side, seed=len(name))):
            (root / name / f"{number}.jpg").write_bytes(encode_image(image, "jpg"))
    return root


def test_a_folder_is_counted_and_what_cannot_be_read_is_named(tmp_path):
    root = folder_of(tmp_path / "photos", {"cat": 20, "dog": 12, "owl": 11})
    (root / "cat" / "bad.jpg").write_bytes(b"not an image")
    whole = (root / "dog" / "0.jpg").read_bytes()
    (root / "dog" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    seen = look(find_source(str(root)))
    assert seen.classes == ["cat", "dog", "owl"]
    assert seen.count_C.tolist() == [21, 12, 11]
    assert seen.short_side == 40
    assert sum(seen.unreadable.values()) == 2
    assert seen.share == pytest.approx(2 / 44, rel=0.3)
    assert seen.formats == {"jpg": 42}


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "shards"])
def test_train_and_val_parts_are_found(tmp_path, kind):
    images, labels = random_images(24, 32, 32), np.arange(24) % 2
    if kind == "imagefolder":
        for part in ("train", "val", "test"):
            folder_of(tmp_path / part, {"a": 12, "b": 12})
    elif kind == "parquet":
        rows = [{"bytes": encode_image(image), "path": None} for image in images]
        for part in ("train-0", "train-1", "test-0"):
            pq.write_table(pa.table({"img": rows, "label": labels}), tmp_path / f"{part}.parquet")
    else:
        for part in ("train", "val"):
            make_shards(tmp_path, images, labels, shard_size=12, prefix=part)
    source = find_source(str(tmp_path))
    assert source.kind == kind
    seen = look(source)
    assert seen.images == (48 if kind == "parquet" else 24)
    assert seen.held == 24
    assert seen.columns[0] == ("img" if kind == "parquet" else "image")
    if kind == "imagefolder":
        assert source.test == str(tmp_path / "val")
        assert source.unused == ("test",)


def test_classes_may_be_missing_from_a_part(tmp_path):
    """From the held-out images, or from the training ones if the classes are named: a run accepts both."""
    images = random_images(24, 32, 32)
    make_shards(tmp_path, images, np.arange(24) % 3, prefix="train")
    make_shards(tmp_path, images[:12], np.arange(12) % 2, prefix="val")
    seen = look(find_source(str(tmp_path)))
    assert (seen.images, seen.held, seen.empty) == (24, 12, [])
    (tmp_path / "train-classes.json").write_text('["cat", "dog", "hen", "owl"]')
    seen = look(find_source(str(tmp_path)))
    assert (seen.classes, seen.empty) == (["cat", "dog", "hen", "owl"], ["owl"])
    assert any("1 classes have no training images" in note for note in seen.notes)
    facts, machine = init.facts_of(seen), Machine(1, 2, "cpu")
    tree = recipe.tree(facts, machine, recipe.nets(facts, machine, None)[0], 8)
    assert init._with_data(tree, seen)["data"]["allow_empty_classes"] is True


def test_held_out_shards_are_not_taken_for_training_ones(tmp_path):
    for prefix in ("images", "test"):
        make_shards(tmp_path, random_images(8, 32, 32), np.arange(8) % 2, prefix=prefix)
    with pytest.raises(UserError, match="several splits"):
        find_source(str(tmp_path))


def made(tmp_path, what):
    if what == "one class":
        return folder_of(tmp_path / "one", {"cat": 12})
    if what == "single images":
        return folder_of(tmp_path / "single", {"cat": 1, "dog": 1})
    if what == "loose":
        folder_of(tmp_path, {"loose": 3})
        return tmp_path / "loose"
    if what == "no training part":
        folder_of(tmp_path / "parts" / "val", {"a": 2, "b": 2})
        folder_of(tmp_path / "parts" / "test", {"a": 2, "b": 2})
        return tmp_path / "parts"
    if what == "mixed":
        folder_of(tmp_path / "mixed", {"a": 2, "b": 2})
        make_shards(tmp_path / "mixed", random_images(4), [0, 1, 0, 1])
        return tmp_path / "mixed"
    if what == "empty class":
        (folder_of(tmp_path / "gap", {"a": 12, "b": 12}) / "c").mkdir()
        return tmp_path / "gap"
    if what == "text":
        (tmp_path / "notes" / "a").mkdir(parents=True)
        (tmp_path / "notes" / "a" / "x.txt").write_text("x")
        return tmp_path / "notes"
    (tmp_path / "empty").mkdir()
    return tmp_path / what


@pytest.mark.parametrize(
    ("what", "said", "remedy"),
    [
        ("empty", "the folder is empty", "folder of images for each class"),
        ("missing", "no such folder", "name a folder"),
        ("one class", "all 12 images are of one class ('cat')", "another class"),
        ("single images", "single image", "add images"),
        ("loose", "3 images but no class folders", "FOLDER/CLASS/IMAGE"),
        ("no training part", "none of them is for training", "'train'"),
        ("mixed", "folders of images and tar shards", "name one kind"),
        ("empty class", "'c'", "remove the folder"),
        ("text", "no images", "FOLDER/CLASS/IMAGE"),
    ],
)
def test_what_cannot_be_trained_on_is_named_with_its_remedy(tmp_path, what, said, remedy):
    with pytest.raises(UserError) as caught:
        look(find_source(str(made(tmp_path, what))))
    assert said in caught.value.what
    assert remedy in caught.value.remedy


def test_an_existing_file_is_left_alone(tmp_path):
    out = tmp_path / "my.yaml"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists") as caught:
        init.command(str(tmp_path), str(out), 30)
    assert "--force" in caught.value.remedy
    assert out.read_text() == "mine"
    for minutes in (0, -3, math.inf, math.nan):
        with pytest.raises(UserError) as caught:
            init.command(str(tmp_path), str(tmp_path / "other.yaml"), minutes)
        assert caught.value.where == "--minutes"


def test_a_file_that_cannot_be_written_is_named_before_anything_is_timed(tmp_path, monkeypatch):
    (tmp_path / "my.yaml").mkdir()
    monkeypatch.setattr(init, "look", lambda source: pytest.fail("the images were looked at"))
    with pytest.raises(UserError, match="can't be written to: it is a folder"):
        init.command(str(tmp_path), str(tmp_path / "my.yaml"), 30, force=True)


@pytest.mark.thorough
def test_the_network_of_a_file_of_weights_is_found_by_its_name_or_shapes(tmp_path):
    from safetensors.torch import save_file

    state = build_teacher("resnet18", 5, 128).state_dict()
    for name in ("resnet18-abc.safetensors", "mine.safetensors"):
        save_file(state, tmp_path / name)
        found = weights.from_file(str(tmp_path / name))
        assert found["arch"] == "resnet18"
    (tmp_path / "mine.safetensors").rename(tmp_path / "a$b.safetensors")
    found = weights.from_file(str(tmp_path / "a$b.safetensors"))["weights"]
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"name": "x", "teacher": {"weights": found}}))
    loaded = settings.load(str(tmp_path / "my.yaml"), [])
    assert loaded.teacher.weights == str(tmp_path / "a$b.safetensors")
    with pytest.raises(UserError, match="no such weights file"):
        weights.from_file(str(tmp_path / "none"))
    save_file({"a": state["fc.weight"]}, tmp_path / "odd.safetensors")
    with pytest.raises(UserError, match="fit none"):
        weights.from_file(str(tmp_path / "odd.safetensors"))


@pytest.mark.thorough
@pytest.mark.parametrize("fits", [2, 1, 0])
def test_networks_that_do_not_fit_into_a_gpu_are_not_chosen(tmp_path, monkeypatch, fits):
    seen = look(find_source(str(folder_of(tmp_path / "p", {"cat": 20, "dog": 20}, (64, 64)))))
    known = {"arch": "resnet18", "weights": "/w", "size": 64}  # two networks
    tried = []

    def time_of(stopwatch: speed.Stopwatch, config, num_classes: int, images: int) -> Speed | None:
        tried.append(config.student.stem)
        big = config.student.stem == "resnet18"
        return None if fits == 0 or (big and fits == 1) else Speed(0.01, 0.01, 0.01, 0.01, 0.01)

    monkeypatch.setattr(speed.Stopwatch, "time", time_of)
    if not fits:
        with pytest.raises(UserError, match="not even the smallest network fits"):
            init._choose(seen, Machine(1, 2, "cuda"), known, 600, False)
        return
    chosen = init._choose(seen, Machine(1, 2, "cuda"), known, 600, False).tree
    assert chosen["student"]["stem"] == ("resnet18" if fits == 2 else "resnet_tiny")
    assert len(tried) >= 1
