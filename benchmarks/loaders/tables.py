"""Figures as Markdown."""

from __future__ import annotations

import os
import platform
import statistics
from importlib import metadata
from typing import Any

from loaders.contenders import GOALS, LOCAL

Figures = dict[str, Any]
PACKAGES = [
    "torch",
    "torchvision",
    "webdataset",
    "ray",
    "mosaicml-streaming",
    "litdata",
    "spdl-io",
    "grain",
    "ffcv",
    "simplejpeg",
    "pillow",
    "numpy",
    "pyarrow",
]


def versions() -> dict[str, str]:
    """Versions of everything compared, and of what the speed depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def machine() -> str:
    """Cores, model, and how busy it is."""
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line for line in file if line.startswith("model name")).split(":")[1]
    except (OSError, StopIteration):
        model = platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores ({model.strip()}), Python {platform.python_version()}"


def brief(result: Figures) -> str:
    """One line of progress."""
    if "rate" in result:
        return (
            f"{result['rate']:.0f} images/s, {result['cpu_ms']:.3f} CPU ms per image, "
            f"first batch after {result['start']:.1f} s, others had {result['others']:.0%}"
        )
    return " ".join(f"{key}={value}" for key, value in result.items()) or "done"


def ratios(kind: str, rows: dict[str, list[Figures]]) -> list[Figures]:
    """Each goal, with the ratios of all rounds: of images per second, and of images per processor second."""
    return [
        {
            "ours": ours,
            "theirs": theirs,
            "goal": goal,
            "rounds": _ratio(rows, "rate", ours, theirs),
            "processor": _ratio(rows, "cpu_ms", theirs, ours),
        }
        for ours, theirs, goal in GOALS[kind]
    ]


def _ratio(rows: dict[str, list[Figures]], key: str, over: str, under: str) -> list[float]:
    """Quotients of a figure of two rows, round by round; empty if one of them is missing."""
    pairs = zip(rows.get(over, []), rows.get(under, []), strict=False)
    return [a[key] / b[key] for a, b in pairs if a.get(key) and b.get(key)]


def markdown(results: Figures) -> str:
    """All tables."""
    text = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [results["machine"] + ".", text + ".", ""]
    for part, found in results["parts"].items():
        lines += [f"### {part}", ""]
        if "about" in found:
            lines += [found["about"] + ".", "", *_speeds(found["rows"]), "", *_goals(found)]
        else:
            lines += _plain(found["rows"])
        lines.append("")
    return "\n".join(lines)


def _speeds(rows: dict[str, list[Figures]]) -> list[str]:
    lines = [
        "| | images/s: median (min–max) | of ours | CPU ms per image | first batch, s | other work |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    base = [figures.get("rate") for figures in rows.get(LOCAL, [])]
    for name, figures in rows.items():
        good = [f for f in figures if "rate" in f]
        if not good:
            reason = figures[0].get("error", "no figures") if figures else "not run"
            lines.append(f"| {name} | {reason} | | | | |")
            continue
        rates = [f["rate"] for f in good]
        pairs = [f.get("rate", 0) / b for f, b in zip(figures, base, strict=False) if b]
        share = f"{statistics.median(pairs):.2f}" if pairs else ""
        cpu, start, others = (
            statistics.median(f[key] for f in good) for key in ("cpu_ms", "start", "others")
        )
        lines.append(
            f"| {name} | {statistics.median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f}) "
            f"| {share} | {cpu:.3g} | {start:.1f} | {others:.0%} |"
        )
    return lines


def _goals(found: Figures) -> list[str]:
    lines = [
        "| ratio of images/s | goal | median (min–max) | | of images per processor second |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    for row in found["ratios"]:
        if not row["rounds"]:
            continue
        middle = statistics.median(row["rounds"])
        verdict = "met" if middle >= row["goal"] else "**short**"
        lines.append(
            f"| {row['ours']} / {row['theirs']} | {row['goal']:g} | {_spread(row['rounds'])} "
            f"| {verdict} | {_spread(row['processor'])} |"
        )
    return lines


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _plain(rows: dict[str, Figures]) -> list[str]:
    """Rows that all have the same keys."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [
        "| | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        shown = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines
