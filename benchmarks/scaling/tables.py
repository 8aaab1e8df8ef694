"""The figures of benchmarks/scale.py as Markdown tables, fitted exponents and plots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

Rows = list[dict[str, Any]]


def tables(rows: Rows) -> str:
    """Every table that has figures."""
    makers = (_builds, _rivals, _refreshes, _parts, _kept, _samples, _exponents)
    return "\n\n".join(text for text in (maker(rows) for maker in makers) if text)


def of(rows: Rows, measure: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(job, figures) of one measurement, smallest first."""
    found = [(row["job"], row["found"]) for row in rows if row["job"]["measure"] == measure]
    return sorted(found, key=lambda pair: (pair[0]["nodes"], pair[0]["homophily"]))


def _table(title: str, head: list[str], lines: list[list[Any]]) -> str:
    if not lines:
        return ""
    text = [f"**{title}**", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*text, *("| " + " | ".join(map(_cell, line)) + " |" for line in lines)])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _builds(rows: Rows) -> str:
    lines = [
        [j["nodes"], f["homophily"], f["seconds"], f["recall"], f["peak_gib"], _degrees(f)]
        for j, f in of(rows, "build")
    ]
    head = [
        "nodes",
        "homophily",
        "seconds",
        "recall@10",
        "peak GiB",
        "in-degree 0/10/50/90/99/99.9/100 %",
    ]
    return _table("Build", head, lines)


def _degrees(found: dict[str, Any]) -> str:
    return "/".join(str(v) for v in found["in_degree"].values())


def _rivals(rows: Rows) -> str:
    ours = {(j["nodes"], j["homophily"]): f for j, f in of(rows, "build")}
    lines = [
        [
            j["nodes"], j["homophily"], j["options"]["name"], f["setting"], f["seconds"], f["recall"],
            f["peak_gib"], f["seconds"] / ours[j["nodes"], j["homophily"]]["seconds"],
        ]
        for j, f in of(rows, "rival")
    ]  # fmt: skip
    head = ["nodes", "homophily", "", "setting", "seconds", "recall@10", "peak GiB", "/ ours"]
    return _table("The same table by others, two threads", head, lines)


def _refreshes(rows: Rows) -> str:
    lines = [
        [
            j["nodes"], j["homophily"], d["stale_recall"], " > ".join(f"{r:.3f}" for r in d["recall"]),
            f"{d['changed_edges']:.1%}", d["seconds"], d["rebuild_seconds"], d["rebuild_recall"], d["ratio"],
        ]
        for j, f in of(rows, "refresh")
        for d in f["drifts"]
    ]  # fmt: skip
    head = ["nodes", "homophily", "stale recall", "recall", "changed edges", "seconds", "rebuild",
            "its recall", "ratio"]  # fmt: skip
    return _table("Refresh", head, lines)


def _parts(rows: Rows) -> str:
    lines = [
        [
            j["nodes"], j["homophily"], j["options"]["how"], j["options"]["count"], f["seconds"],
            f["assign_gib"], f["cut"], f["halo1"], f["halo2"], f["halos_seconds"], f["write_gib"],
            f["peak_gib"],
        ]
        for j, f in of(rows, "parts")
    ]  # fmt: skip
    head = ["nodes", "homophily", "by", "parts", "seconds", "GiB", "cut", "halo 1 / inner",
            "halo 2 / inner", "halos, s", "written, GiB", "peak GiB"]  # fmt: skip
    return _table("Partition", head, lines)


def _kept(rows: Rows) -> str:
    lines = [
        [j["nodes"], j["homophily"], name, v["cut"], f"{v['moved']:.2%}", v.get("seconds", "")]
        for j, f in of(rows, "keep")
        for name, v in f.items()
    ]
    return _table(
        "The map after a refresh", ["nodes", "homophily", "", "cut", "moved", "seconds"], lines
    )


def _samples(rows: Rows) -> str:
    lines = [
        [j["nodes"], j["homophily"], f["seeds_per_s"], f["nodes_per_seed"], f["remote_share"]]
        for j, f in of(rows, "sample")
    ]
    head = ["nodes", "homophily", "seeds/s, one core", "nodes a seed", "from halos"]
    return _table("Sampling [10, 10], one of two parts", head, lines)


def curves(rows: Rows) -> dict[str, dict[float, list[tuple[int, float]]]]:
    """Seconds or GiB by number of nodes, for each homophily."""
    found: dict[str, dict[float, list[tuple[int, float]]]] = {}

    def add(name: str, job: dict[str, Any], value: float) -> None:
        found.setdefault(name, {}).setdefault(job["homophily"], []).append((job["nodes"], value))

    for job, f in of(rows, "build"):
        add("build, s", job, f["seconds"])
        add("build, peak GiB", job, f["peak_gib"])
    for job, f in of(rows, "refresh"):
        near = min(f["drifts"], key=lambda d: abs(d["stale_recall"] - 0.88))
        add("refresh at a stale recall near 0.88, s", job, near["seconds"])
    for job, f in of(rows, "parts"):
        if job["options"]["count"] == 8 and job["options"]["how"] in ("metis", "streaming"):
            how = job["options"]["how"]
            add(f"{how}, 8 parts, s", job, f["seconds"])
            add(f"{how}, 8 parts, GiB", job, f["assign_gib"])
            add(f"{how}, 8 parts, cut", job, f["cut"])
            if how == "streaming":
                add("halos of 8 parts, s", job, f["halos_seconds"])
                add("second halo / inner, 8 parts", job, f["halo2"])
    for job, f in of(rows, "sample"):
        add("sampled seeds/s", job, f["seeds_per_s"])
    return found


def exponent(points: list[tuple[int, float]]) -> float:
    """b of value = a · nodes^b, by least squares on the logarithms."""
    nodes, values = np.log(np.array(points, float).T)
    return float(np.polyfit(nodes, values, 1)[0])


def _exponents(rows: Rows) -> str:
    lines = [
        [name, homophily, " ".join(f"{n:,}: {_cell(v)};" for n, v in points), exponent(points)]
        for name, by in curves(rows).items()
        for homophily, points in by.items()
        if len(points) > 2
    ]
    return _table("Fitted exponents, value ~ nodes^b", ["", "homophily", "measured", "b"], lines)


def pictures(rows: Rows, folder: Path) -> None:
    """``scale.png``: each curve in its own panel, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {k: v for k, v in curves(rows).items() if any(len(points) > 2 for points in v.values())}
    figure, axes = pyplot.subplots(-(-len(drawn) // 3), 3, figsize=(12, 2.9 * -(-len(drawn) // 3)))
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (name, by) in zip(axes.flat, drawn.items(), strict=False):
        for homophily, points in sorted(by.items()):
            power = f", n^{exponent(points):.2f}" if len(points) > 2 else ""
            axis.loglog(*zip(*points, strict=True), "o-", label=f"homophily {homophily}{power}")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("nodes")
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=7)
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "scale.png", dpi=110)
