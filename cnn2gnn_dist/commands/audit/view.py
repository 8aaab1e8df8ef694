"""What the audit's page shows: the first entries of every table, with their pictures, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cnn2gnn_dist.commands.audit.source import Source
from cnn2gnn_dist.inference.audit import files as audit_files
from cnn2gnn_dist.inference.audit.findings import Findings, HeldOut
from cnn2gnn_dist.inference.audit.scores import Pairs
from cnn2gnn_dist.report.audit_page import jpeg_uri

MOST_BLEEDING = 30
"""Most pairs of classes on the page."""


class View:
    """The entries that are shown, and their pictures, which are read once.

    Args:
        source: what was audited.
        found: the findings.
        held: the held-out images; None: there are none.
        exact_P: which (training, held-out) pairs are byte-identical.
        top: entries in each section.
    """

    def __init__(
        self,
        source: Source,
        found: Findings,
        held: HeldOut | None,
        exact_P: np.ndarray,
        top: int,
    ) -> None:
        self.source, self.found, self.held, self.top = source, found, held, top
        self.names = source.training.classes
        self.doubtful = found.doubtful(source.training.labels_N)[:top].tolist()
        self.near = {row: audit_files.evidence(found, row) for row in self.doubtful}
        self.pairs = _pairs(found, exact_P, top)
        readable = np.isfinite(found.labels.score_N)
        order = np.argsort(-found.reach_N, kind="stable")
        self.far = order[(readable & np.isfinite(found.reach_N))[order]][:top].tolist()
        order = np.argsort(-found.degree_N, kind="stable")
        self.hubs = order[readable[order]][:top].tolist()
        shown = {*self.doubtful, *self.far, *self.hubs}
        shown |= {other for one in self.near.values() for other, _ in one}
        ends = [end for pair in self.pairs for end in pair["ends"]]
        shown |= {row for kind, row in ends if kind == "train"}
        self.images = _images(source.pictures, shown)
        self.held_images = _images(
            source.held_pictures, {row for kind, row in ends if kind != "train"}
        )

    def data(self, place: Path, tables: dict[str, pa.Table]) -> dict[str, Any]:
        """The data of the page; ``place``: folder of the run or model, ``tables``: with all entries."""
        count = len(self.source.keys)
        return {
            "name": self.source.name,
            "stamp": f"{self.source.name} {count}",
            "fix": f"cnn2gnn audit {place} --fix labels.csv",
            "images": count,
            "held": 0 if self.held is None else len(self.source.held_keys),
            "classes": list(self.names),
            "sections": self._sections(tables),
            "labels_said": f"The {len(self.doubtful):,} most doubtful of {len(tables['labels']):,} images that fit "
            "another class better, by the head and the neighbors together; all are in labels.parquet.",
            "labels": self._labels(),
            "pair_sections": self._pair_sections(),
            "outliers": self._outliers(),
            "hubs": self._hubs(),
            "bleeding": self._bleeding(),
        }

    def _sections(self, tables: dict[str, pa.Table]) -> list[tuple[str, str, int]]:
        """Anchor, title and number of entries of every section."""
        sets = tables["duplicates"]["set"].to_pylist()
        leakage = [("leakage", "leakage", sets.count("held-out"))]
        return [
            ("labels", "labels", len(tables["labels"])),
            *(leakage if self.held is not None else []),
            ("duplicates", "duplicates", sets.count("train")),
            ("outliers", "outliers", len(self.far)),
            ("hubs", "hubs", len(self.hubs)),
            ("bleeding", "confused classes", len(self.found.bleeding.a_P)),
        ]

    def _card(self, row: int) -> dict[str, Any]:
        label = self.names[self.source.training.labels_N[row]]
        return {"key": self.source.keys[row], "image": self.images[row], "class": label}

    def _labels(self) -> list[dict[str, Any]]:
        scores = self.found.labels
        return [
            self._card(row)
            | {
                "suggested": self.names[scores.suggested_N[row]],
                "head": float(scores.head_N[row]),
                "vote": float(scores.vote_N[row]),
                "agree": bool(scores.agree_N[row]),
                "near": [self._card(other) | {"weight": w} for other, w in self.near[row]],
            }
            for row in self.doubtful
        ]

    def _pair_sections(self) -> list[tuple[str, str, str, list[dict[str, Any]]]]:
        """Anchor, title, explanation and pairs."""
        pairs = [self._pair(pair) for pair in self.pairs]
        sections = [
            (
                "duplicates",
                "Duplicates among the training images",
                "Exact: the same bytes or features. Near: the same details in another frame or color, or mirrored; "
                "most similar first. Dropping removes the second of a pair.",
                [pair for pair in pairs if pair["ends"][0][0] == "train"],
            )
        ]
        if self.held is not None:
            leakage = (
                "leakage",
                "Held-out images that are among the training images",
                "They make results look better than they are. Dropping removes the training image.",
                [pair for pair in pairs if pair["ends"][0][0] != "train"],
            )
            sections.insert(0, leakage)
        return sections

    def _pair(self, pair: dict[str, Any]) -> dict[str, Any]:
        sides = [self._end(*one) for one in pair["ends"]]
        # Only training images can be dropped; if both are, the second, which came later.
        same = sides[0]["class"] == sides[1]["class"]
        return pair | {"sides": sides, "same": same, "droppable": sides[1]["key"]}

    def _end(self, kind: str, row: int) -> dict[str, Any]:
        source, own = self.source, kind == "train"
        label = int((source.training.labels_N if own else source.held_labels_Q)[row])
        return {
            "set": "training" if own else "held-out",
            "class": self.names[label] if label >= 0 else "no class",
            "key": (source.keys if own else source.held_keys)[row],
            "image": (self.images if own else self.held_images)[row],
        }

    def _outliers(self) -> list[dict[str, Any]]:
        reach_N = self.found.reach_N
        return [self._card(row) | {"distance": float(reach_N[row])} for row in self.far]

    def _hubs(self) -> list[dict[str, Any]]:
        degree_N, same_N = self.found.degree_N, np.nan_to_num(self.found.same_N)
        return [
            self._card(row) | {"degree": int(degree_N[row]), "same": float(same_N[row])}
            for row in self.hubs
        ]

    def _bleeding(self) -> list[dict[str, Any]]:
        names, shown = self.names, min(self.top, MOST_BLEEDING)
        return [
            {"a": names[a], "b": names[b], "mass": float(m), "up": float(u), "down": float(d)}
            for a, b, m, u, d in list(zip(*self.found.bleeding, strict=True))[:shown]
        ]


def _pairs(found: Findings, exact_P: np.ndarray, top: int) -> list[dict[str, Any]]:
    """The pairs on the page: held-out ones, then exact twins, then near ones; ``top`` of each set."""
    across: list[dict[str, Any]] = []
    if found.across is not None:
        order = np.argsort(~exact_P, kind="stable")[:top]
        across = [
            {
                "kind": "exact" if exact_P[p] else "near",
                "alike": _alike(found.across, int(p)),
                "ends": [
                    ("held-out", int(found.across.a_P[p])),
                    ("train", int(found.across.b_P[p])),
                ],
            }
            for p in order
        ]
    within = [
        {"kind": "exact", "alike": "", "ends": [("train", a), ("train", b)]}
        for a, b in found.twins_P2[:top].tolist()
    ]
    within += [
        {
            "kind": "near",
            "alike": _alike(found.within, p),
            "ends": [("train", int(found.within.a_P[p])), ("train", int(found.within.b_P[p]))],
        }
        for p in range(min(len(found.within.a_P), top - len(within)))
    ]
    return across + within


def _alike(pairs: Pairs, place: int) -> str:
    """How similar a pair is, in words: by its pixels, else by its features."""
    pixels = float(pairs.pixels_P[place])
    if np.isnan(pixels):
        return f"feature cosine {pairs.cosine_P[place]:.3f}"
    return f"pixel similarity {pixels:.2f}"


def _images(read: Any, rows: Iterable[int]) -> dict[int, str | None]:
    """Data URIs of pictures by row; read in order, as they lie in the shards."""
    some: Sequence[int] = sorted(int(row) for row in rows)
    return dict(zip(some, map(jpeg_uri, read(some)), strict=True))
