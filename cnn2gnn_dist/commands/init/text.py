"""The config as YAML for people: some thirty lines, most with their meaning."""

from __future__ import annotations

from typing import Any

import yaml

_MANY = 5
"""Fields with the same value for teacher and student from which they are written once."""


def as_text(head: list[str], tree: dict[str, Any]) -> str:
    """The YAML of a config (a plain tree), with ``head`` as comment lines above it."""
    data, views, teacher = tree["data"], tree["views"], tree["teacher"]
    graph, student = tree["graph"], tree["student"]
    lines = [f"# {line}".rstrip() for line in head]
    lines += [
        f"name: {_inline(tree['name'])}",
        f"run: {_inline(tree['run'])}  # training processes",
    ]
    lines.append("data:")
    said = {
        "test": "held-out images: what the models are evaluated on",
        "holdout": "share of each class held out, to evaluate on; or name a second set: test: FOLDER",
        "calibration": "share of the others set apart to calibrate confidence",
        "allow_empty_classes": "some have no training images",
        "max_corrupt": "largest accepted share of unreadable images",
    }
    lines += _block(data, said)
    flip = "mirrored too; if that changes the class (letters), set kind: shift"
    lines += [
        f"views: {_inline(views)}",
        f"# {views['kind']}: {'not mirrored, as letters and digits need' if views['kind'] == 'shift' else flip}",
    ]
    if tree.get("stream"):
        lines.append(f"stream: {_inline(tree['stream'])}")
    lines.append(
        "teacher:  # the large CNN; to improve it, try more epochs first, then a larger network"
    )
    same = {name: value for name, value in teacher.items() if student.get(name) == value}
    if len(same) < _MANY:
        same = {}
    if same:
        lines += [
            f"  <<: &training {_inline(same)}",
            "  # how both networks are trained; lr is the peak: halve it if the loss jumps",
        ]
    lines += _block(_without(teacher, same), {"lr": "peak; halve it if the loss jumps"})
    lines.append(f"targets: {_inline(tree['targets'])}")
    lines.append(f"graph: {_inline(graph)}")
    lines.append(
        "student:  # the small network for later use; `control` is the same without a graph"
    )
    if same:
        lines.append("  <<: *training")
    lines += _block(
        _without(student, same),
        {
            "stem": "conv3, resnet_tiny, whitened_cnn, or a timm network",
            "distill_weight": "share of the teacher in the loss",
            "control": "left out, as the minutes are few: the same network without a graph, to compare with",
        },
    )
    return "\n".join(lines) + "\n"


def _without(section: dict[str, Any], same: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in same}


def _block(section: dict[str, Any], said: dict[str, str]) -> list[str]:
    return [
        f"  {name}: {_inline(value)}" + (f"  # {said[name]}" if name in said else "")
        for name, value in section.items()
    ]


def _inline(value: Any) -> str:
    text = yaml.safe_dump(
        value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()
