"""The choices of a first config, as pure functions of counts, sizes, ranks and minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnn2gnn_dist.commands.init import small_images
from cnn2gnn_dist.commands.init.speed import Machine
from cnn2gnn_dist.config import DataConfig
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.models import whitened_cnn

SIZES = (32, 48, 64, 96, 128, 160, 192, 224)
FEWEST = 8
"""Training images below which there is nothing to choose."""
CALIBRATION = 0.05 if "calibration" in DataConfig.model_fields else 0.0
_TEACHERS: tuple[dict[str, Any], ...] = (
    {"arch": "resnet18", "args": {"layers": [1, 1, 1, 1], "channels": [16, 32, 64, 128]}},
    {"arch": "resnet18", "args": {"layers": [1, 1, 1, 1], "channels": [24, 48, 96, 192]}},
    {"arch": "resnet18", "args": {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}},
    {"arch": "resnet18", "args": {}},
    {"arch": "resnet50", "args": {}},
)
_STEMS: tuple[dict[str, Any], ...] = (
    {"stem": "resnet_tiny", "stem_args": {}},
    {"stem": "resnet_tiny", "stem_args": {}},
    {"stem": "resnet_tiny", "stem_args": {"widths": [16, 32, 64]}},
    {"stem": "resnet_tiny", "stem_args": {"widths": [32, 64, 128]}},
    {"stem": "resnet18", "stem_args": {}},
)
_STUDENT_EPOCHS = 2.0
"""Epochs of student and control for each of the teacher: they are cheaper, and a short training ends below a
linear probe of its own features."""
_DISTILL = 0.5  # after few epochs a teacher adds little to the labels
_CACHE = 2 << 30  # bytes of decoded images that are kept
_OFTEN = 80  # epochs from which crops of one decoded image are too alike


@dataclass(frozen=True)
class Facts:
    """What the choices depend on.

    Attributes:
        count_C: images of each class, before any are split off.
        held: number of held-out images in a separate set; None: they are split off.
        short_side: median shorter side, in pixels.
        alike: whether this is the shorter side of all images.
        grey: whether nearly all images are gray.
        bad: share of images that can't be read.
        decode_s: CPU seconds to decode an image and make a view of it.
    """

    count_C: np.ndarray
    held: int | None
    short_side: int
    alike: bool = False
    grey: bool = False
    bad: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Net:
    """An image size with a teacher and a stem."""

    size: int
    teacher: dict[str, Any]
    stem: dict[str, Any]

    @property
    def whitened(self) -> bool:
        """Whether it is trained by the recipe for small images."""
        return bool(self.teacher.get("arch") == whitened_cnn.NAME)


def sizes(short_side: int, alike: bool = False) -> list[int]:
    """Sizes to choose from, ascending: none larger than the images; their own, if all have the same."""
    found = [size for size in SIZES if size <= max(short_side, SIZES[0])]
    if alike and SIZES[0] < short_side < SIZES[-1] and short_side not in found:
        found.append(short_side)
    return found


def holdout(facts: Facts) -> float:
    """The share of each class to hold out: the more images, the smaller."""
    images = int(facts.count_C.sum())
    return 0.2 if images < 5000 else 0.1 if images < 200_000 else 0.02


def training_images(facts: Facts) -> int:
    """Number of images left to train on, without held-out, calibration and unreadable ones."""
    count_C = facts.count_C if facts.held is not None else _kept(facts.count_C, holdout(facts))
    if CALIBRATION:
        count_C = _kept(count_C, CALIBRATION)
    return int(count_C.sum() * (1 - min(facts.bad, 0.9)))


def _kept(count_C: np.ndarray, fraction: float) -> np.ndarray:
    """Images of each class that are left, as ``split_per_class`` of the index splits them."""
    quota_C = np.rint(fraction * count_C).astype(np.int64)
    least_C, most_C = (count_C - 1).clip(0, 1), (count_C - 1).clip(0)
    return count_C - quota_C.clip(least_C, most_C)


def held_images(facts: Facts) -> int:
    """Images that the models are evaluated on."""
    return facts.held if facts.held is not None else round(holdout(facts) * facts.count_C.sum())


def ranks_for(images: int, machine: Machine) -> Machine:
    """Fewer ranks if a batch has fewer than 8 images for each."""
    ranks = max(1, min(machine.ranks, batch(images) // 8))
    return Machine(ranks, machine.cores, machine.device, machine.workers)


def batch(images: int) -> int:
    """Images per step: few enough that an epoch has several steps."""
    wanted = 32 if images < 1000 else 64 if images < 4000 else 128 if images < 16_000 else 256
    while wanted > 4 and wanted * 4 > images:
        wanted //= 2
    return wanted


def wanted_epochs(images: int, pretrained: bool) -> float:
    """Teacher epochs beyond which further epochs gain less than a larger network would."""
    scale = 0.4 if pretrained else 1.0
    return scale * min(100.0, max(8.0, 12.0 * math.sqrt(50_000 / images)))


def nets(facts: Facts, machine: Machine, weights: dict[str, Any] | None) -> list[Net]:
    """The networks to choose from, regardless of time.

    Args:
        facts: of the images.
        machine: GPUs allow larger networks.
        weights: ``arch``, ``weights`` and ``size`` (the smallest) of a pretrained teacher.
    """
    most = 5 if machine.device == "cuda" else 4
    found = []
    for size in sizes(facts.short_side, facts.alike):
        if weights is not None:
            if size >= weights["size"]:
                teacher = {"arch": weights["arch"], "args": {}, "weights": weights["weights"]}
                found += [Net(size, teacher, stem) for stem in (_STEMS[2], _STEMS[most - 1])]
            continue
        if small_images.suit(size, facts.grey):
            found += [Net(size, *pair) for pair in small_images.networks(size, machine.device)]
            continue
        if found and found[-1].whitened and training_images(facts) < small_images.MANY:
            break  # a ResNet that starts from nothing ends far below on so few, however large it is
        for level in range(most):
            # Above 64 pixels a ResNet's first layers keep a quarter of the resolution: narrow ones are too weak,
            # and a wide one on a small version of a photograph costs as much as on a large one.
            if level >= 2 if size > 64 else level < 2 or facts.short_side <= 80:
                found.append(Net(size, _TEACHERS[level], _STEMS[level]))
    return found


def graph(images: int, ranks: int, student_epochs: int, refreshes: int = 5) -> dict[str, Any]:
    """The section ``graph``: fewer neighbors among few images, a graph for the later half of the epochs."""
    part = images // max(1, ranks)  # candidates are searched in a rank's partition
    candidates = int(max(2, min(20, round(math.sqrt(images)), images - 1, part - 1)))
    k = max(1, candidates // 2)
    first = max(2, min(k + 2, candidates))
    start = max(0, round(student_epochs * 0.5))
    return {
        "dim": 32 if images < 5000 else 64,
        "candidates": candidates,
        "neighbours": k,
        "start_epoch": start,
        "refresh_epochs": max(1, math.ceil((student_epochs - start) / refreshes)),
        "sampling": {"fanouts": [first, 0], "second_hop": "cached"},
        "partition": {"parts": ranks},
        **({} if images < 200_000 else {"search": {"exact": False}}),
    }


def views(facts: Facts, net: Net, step_s: float = math.inf, epochs: int = 0) -> dict[str, Any]:
    """The section ``views``, without mean and std.

    Random resized crops of larger images, if decoding takes less than the networks (they decode in
    every epoch); else views of images that are decoded once, padded with their own mirror image: no clean image has
    a black border, and with one the student ended below a linear probe of its own features
    (docs/first_config.md). A few images that are seen often (``epochs`` of the student) vary too little by a crop
    alone: RandAugment is added. Small gray ones may be letters: no flip, and a border of zeros.
    """
    if net.size > 48 and facts.decode_s < step_s:
        resize = 1.15 if facts.short_side >= net.size * 1.15 else 1.0
        return {
            "kind": "random_resized_crop",
            "size": net.size,
            "scale": [0.35, 1.0],
            **({"resize": resize} if resize > 1 else {}),
        }
    made = {"size": net.size, "pad": max(2, net.size // 8)}
    if facts.grey and facts.short_side <= 48:
        return {"kind": "shift", **made}
    flip = {"flip": "alternating"} if net.whitened else {}
    varied = {"randaugment": 1} if epochs >= _OFTEN else {"pad": 2} if net.whitened else {}
    return {"kind": "crop_flip", **made, "padding": "reflect", **flip, **varied}


def stream(images: int, machine: Machine, views: dict[str, Any]) -> dict[str, Any]:
    """The section ``stream``: decoded images are kept where views start from the same clean one."""
    row = 3 * views["size"] ** 2 + 1
    kept = views["kind"] != "random_resized_crop" and images * row <= _CACHE
    return {
        **({"workers": machine.workers} if machine.workers > 1 else {}),
        **({"decoded_bytes": int(1.1 * images * row) + 1} if kept else {}),
    }


def batch_of(net: Net, images: int) -> int:
    """Images per step of these networks, before it is divided among ranks."""
    return small_images.batch(images) if net.whitened else batch(images)


def tree(
    facts: Facts,
    machine: Machine,
    net: Net,
    teacher_epochs: int,
    step_s: float = math.inf,
    control: bool = True,
) -> dict[str, Any]:
    """The config without names, paths, mean and std, for this many epochs of the teacher.

    ``step_s``: seconds per image that the teacher's step leaves to the readers. ``control``: whether the
    student's network is also trained without a graph; False where time is short, and the graph is
    refreshed only once.
    """
    images = training_images(facts)
    machine = ranks_for(images, machine)
    student_epochs = max(2, round(_STUDENT_EPOCHS * teacher_epochs))
    view = views(facts, net, step_s, student_epochs)
    make = _sections_of_whitened if net.whitened else _sections
    teacher, student = make(net, images, machine, teacher_epochs, student_epochs)
    return {
        "run": {"ranks": machine.ranks},
        "views": view,
        "stream": stream(round(images / max(0.05, 1 - CALIBRATION)), machine, view),
        "teacher": teacher,
        "targets": {"views": 0},
        "graph": graph(images, machine.ranks, student_epochs, 5 if control else 1),
        "student": student | ({} if control else {"control": False}),
    }


Sections = tuple[dict[str, Any], dict[str, Any]]
"""``teacher`` and ``student``."""


def _sections(
    net: Net, images: int, machine: Machine, teacher_epochs: int, student_epochs: int
) -> Sections:
    """For AdamW with a warm-up and a cosine."""
    usual = batch(images)
    size = usual // machine.ranks * machine.ranks
    pretrained = "weights" in net.teacher
    deep = pretrained or not net.teacher["args"]
    lr = {4: 0.001, 8: 0.001, 16: 0.002, 32: 0.002, 64: 0.003, 128: 0.003, 256: 0.004}[usual]
    micro = {} if machine.device == "cpu" or net.size <= 128 else {"max_micro_batch": 64}
    width = 64 if images < 2000 else 128
    warm = min(2.0, max(0.5, teacher_epochs / 10))
    teacher = {
        **net.teacher,
        "epochs": teacher_epochs,
        "global_batch": size,
        **micro,
        "lr": 0.0005 if pretrained else lr / 2 if deep else lr,
        "warmup_epochs": min(warm, teacher_epochs / 2),
    }
    student = {
        **net.stem,
        "dim": 256 if net.stem["stem"] == "resnet18" else width,
        "hidden": 256 if net.stem["stem"] == "resnet18" else width,
        "label_dim": 16 if images < 2000 else 32,
        "epochs": student_epochs,
        "global_batch": size,
        **micro,
        "lr": lr / 2 if net.stem["stem"] == "resnet18" else lr,
        "warmup_epochs": min(warm, student_epochs / 2),
        "distill_weight": _DISTILL,
    }
    return teacher, student


def _sections_of_whitened(
    net: Net, images: int, machine: Machine, teacher_epochs: int, student_epochs: int
) -> Sections:
    """For SGD, from the preset ``cifar10``."""
    training = small_images.training(net.size, images, machine.ranks)
    width = net.stem["stem_args"]["widths"][-1]
    few = images < 2000
    teacher = {**net.teacher, "epochs": teacher_epochs, "label_smoothing": 0.2, **training}
    student = {
        **net.stem,
        "dim": width,
        "hidden": 64 if few else 128,
        "label_dim": 16 if few else 32,
        "epochs": student_epochs,
        "temperature": 1,
        **training,
        **small_images.slower_head(training["lr"]),
    }
    return teacher, student


def check_enough(facts: Facts) -> None:
    """Check that enough images are left to train on for a graph.

    Raises:
        UserError: there are too few.
    """
    images = training_images(facts)
    if images < FEWEST:
        raise UserError(
            f"only {images} images are left for training, of {int(facts.count_C.sum())}",
            where="the images",
            remedy="add images: at least ten per class, preferably a hundred",
        )
