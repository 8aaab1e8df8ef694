"""`cnn2gnn init`: its choices as pure functions, and what it finds in a folder."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as trying
from hypothesis import strategies as st

from cnn2gnn_dist import consistency, settings
from cnn2gnn_dist.commands.init import command as init
from cnn2gnn_dist.commands.init import fitting, recipe, small_images, text, weights
from cnn2gnn_dist.commands.init.recipe import Facts
from cnn2gnn_dist.commands.init.speed import Machine, Speed
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models.teacher import build_teacher
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.unused_fields import Surroundings

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
            {"epochs", "control", "global_batch", "hidden", "label_dim"},
        ),
    ],
)
def test_small_color_images_get_the_networks_and_the_recipe_of_the_preset(facts, same):
    machine = Machine(2, 2, "cpu")
    nets = recipe.nets(facts, machine, None)
    made = recipe.tree(facts, machine, nets[-1], 16)
    preset = settings.as_tree(settings.load("cifar10"))
    for section in ("teacher", "student"):
        own = {k: v for k, v in made[section].items() if k not in same | {"lr", "stem_lr"}}
        assert own == {key: preset[section][key] for key in own}
        # The step of a batch that is 1/n as large is 1/sqrt(n) as long; the student's head takes shorter ones.
        rate = made[section]["lr"] * made[section].get("stem_lr", 1)
        assert rate**2 / made[section]["global_batch"] == pytest.approx(0.75**2 / 512, rel=0.01)
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


def test_what_takes_too_long_is_named_with_what_helps_against_it():
    """60 images, for which a machine ten times slower needs 12.5 minutes (10 x 75 s) to start."""
    facts = Facts(np.full(6, 10), None, 32)
    machine = Machine(2, 2, "cpu")
    net = recipe.nets(facts, machine, None)[0]

    def said(step_s: float, busy: float, minutes: float, device: str = "cpu") -> str | None:
        speed = Speed(step_s, step_s, step_s, step_s, step_s, busy)
        found = fitting.fit(facts, machine, net, speed, minutes)[1]
        if busy == 10.0:
            assert found.seconds["start"] == 750.0
        return fitting.too_long(found, minutes, device)

    assert said(1e-3, 1.0, 60) is None
    busy = said(1e-3, 10.0, 3)
    assert busy is not None
    assert "% of it for start (of processes, imports and saves of all stages)" in busy
    assert "; other processes make this machine 10.0 times slower. What helps: --idle, if" in busy
    assert busy.endswith("run, or more --minutes")  # a GPU or fewer images would start no faster
    slow = said(10.0, 1.0, 3)
    assert slow is not None
    assert "start" not in slow
    assert slow.endswith("What helps: more --minutes, or a GPU, or fewer images (data.limit=…)")
    on_gpu = said(10.0, 1.0, 3, "cuda")
    assert on_gpu is not None
    assert on_gpu.endswith("What helps: more --minutes, or fewer images (data.limit=…)")


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
