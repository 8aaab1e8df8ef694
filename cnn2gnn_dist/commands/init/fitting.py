"""How long a config takes, and the one that fits the minutes, as pure functions."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Any

from cnn2gnn_dist.commands.init import recipe
from cnn2gnn_dist.commands.init.speed import Machine, Speed

_START_S = {"cpu": 75.0, "cuda": 90.0}
"""Seconds that all stages of a run take apart from the passes over the images: Ray, process groups, saves, report."""
_REFRESH_S = 4.0  # METIS and the files of a graph version
_STEP_S = 0.015  # DeepSpeed's own share of a step, and the gradient exchange
_MODEL_S = 0.0015  # an image's thumbnail, place in the memory and audit, by the first rank alone
_FEWEST_STEPS = 200  # after fewer, a network predicts the most frequent class
_MOST_EPOCHS = 10_000
_MARGIN = 0.92  # of the minutes asked for
_TOO_LONG = 1.25  # times the minutes asked for
_BUSY = 1.3  # times slower by other processes


@dataclass(frozen=True)
class Estimate:
    """Seconds of each stage, other processes included, which slow the machine down by the factor ``busy``.

    ``start`` is the overhead of all stages, ``decode`` the first pass where decoded images are kept.
    """

    seconds: dict[str, float]
    busy: float = 1.0

    @property
    def minutes(self) -> float:
        """Minutes of all stages."""
        return sum(self.seconds.values()) / 60


def estimate(
    facts: recipe.Facts, machine: Machine, config: dict[str, Any], speed: Speed
) -> Estimate:
    """Seconds of each stage of a config (a :func:`recipe.tree`) at a measured speed."""
    images, held = recipe.training_images(facts), recipe.held_images(facts)
    machine = recipe.ranks_for(images, machine)
    size = config["teacher"]["global_batch"]
    cached = "decoded_bytes" in config["stream"]

    def passes(step_s: float, count: float, of: int = images, decoded: bool = cached) -> float:
        """Seconds of ``count`` passes over ``of`` images."""
        decode = size * (0.15 * facts.decode_s if decoded else facts.decode_s)
        readers = min(machine.cores, machine.ranks * machine.workers)
        model = step_s if machine.device == "cuda" else step_s * machine.ranks / machine.cores
        together = model + decode / machine.cores
        busiest = max(step_s, decode / readers, together if machine.device == "cpu" else 0.0)
        return count * of / size * busiest

    student = config["student"]
    epochs, rounds = config["teacher"]["epochs"], student["epochs"]
    warm = config["graph"]["start_epoch"]
    own_s, early = speed.busy * _STEP_S, _early_cost(config)
    builds = 1 + math.ceil((rounds - warm) / config["graph"]["refresh_epochs"])
    embed = (
        passes(speed.student_forward, 1)
        + speed.busy * _REFRESH_S
        + _search_s(config["graph"], images, machine)
    )
    return Estimate(
        {
            "start": speed.busy * _START_S[machine.device],
            "decode": passes(0.0, 1, decoded=False) if cached else 0.0,
            "pack, index": 2.0 + (images + held) * 2e-4,
            "teacher": passes(early * speed.teacher + own_s, epochs),
            "targets": passes(speed.teacher_forward, 1),
            "student": passes(early * speed.control + own_s, min(warm, rounds))
            + passes(early * speed.student + own_s, max(0, rounds - warm)),
            "graph": builds * embed,
            "control": passes(early * speed.control + own_s, rounds)
            if student.get("control", True)
            else 0.0,
            "evaluate": passes(speed.teacher_forward + 3 * speed.student_forward, 1, held, False),
            "model": speed.busy * _MODEL_S * images,
        },
        speed.busy,
    )


def too_long(found: Estimate, minutes: float, device: str) -> str | None:
    """What takes longer than the minutes asked for, and what helps against it; None: it takes about as long."""
    if found.minutes <= _TOO_LONG * minutes:
        return None
    largest = max(found.seconds, key=lambda name: found.seconds[name])
    what = (
        "start (of processes, imports and saves of all stages)" if largest == "start" else largest
    )
    share = 100 * found.seconds[largest] / sum(found.seconds.values())
    remedies = ["more --minutes"]
    if largest != "start":  # which takes as long for a few images, and on a GPU
        remedies += ["a GPU"] if device == "cpu" else []
        remedies += ["fewer images (data.limit=…)"]
    busy = ""
    if found.busy > _BUSY:
        busy = f"; other processes make this machine {found.busy:.1f} times slower"
        remedies.insert(0, "--idle, if they will be gone by the time of the run")
    text = f"even a short run takes longer than {minutes:g} minutes here, {share:.0f} % of it for {what}{busy}"
    return f"{text}. What helps: {', or '.join(remedies)}"


def _early_cost(config: dict[str, Any]) -> float:
    """Operations of all epochs, the first of them on smaller images, relative to all at the full size."""
    size, teacher = config["views"]["size"], config["teacher"]
    saved = 1 - (teacher.get("early_size", size) / size) ** 2
    return float(1 - teacher.get("early_share", 0.0) * saved)


def _search_s(graph: dict[str, Any], images: int, machine: Machine) -> float:
    """Seconds of an exact search of all candidates, at 10 GFLOP/s per core."""
    if graph.get("search") or machine.device == "cuda":
        return images * 2e-4 / machine.ranks
    return 2.0 * images * images * graph["dim"] / 1e10 / machine.ranks


def fit(
    facts: recipe.Facts, machine: Machine, net: recipe.Net, speed: Speed, minutes: float
) -> tuple[dict[str, Any], Estimate, int]:
    """The config with as many epochs as the minutes allow, its estimate, and the epochs that would fit.

    There are at least enough to learn something, even if that takes longer than requested, and at most
    twice those wanted. If the minimum doesn't fit, the control is left out: it is only there for comparison.
    """
    images = recipe.training_images(facts)
    wanted = recipe.wanted_epochs(images, "weights" in net.teacher)
    own = recipe.ranks_for(images, machine)
    lanes = own.ranks if own.device == "cpu" else min(own.cores, own.ranks * own.workers)
    size = recipe.batch_of(net, images)
    step_s = speed.teacher * lanes / size
    fewest = max(2, min(math.ceil(_FEWEST_STEPS * size / images), math.ceil(0.3 * wanted)))

    def made(count: int, control: bool) -> dict[str, Any]:
        return recipe.tree(facts, machine, net, count, step_s, control)

    def fitting(control: bool) -> int:
        def spent(count: int) -> float:
            return estimate(facts, machine, made(count, control), speed).minutes

        return bisect.bisect_right(range(1, _MOST_EPOCHS), minutes * _MARGIN, key=spent)

    fits = fitting(True)
    control = fits >= fewest
    fits = fits if control else fitting(False)
    config = made(int(max(fewest, min(fits, 2 * wanted))), control)
    return config, estimate(facts, machine, config, speed), fits
