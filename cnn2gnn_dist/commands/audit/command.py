"""``cnn2gnn audit``: what is wrong with a training set, for a person to decide; and the decisions as a list."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnn2gnn_dist import durable
from cnn2gnn_dist.commands.audit.source import Source, open_source
from cnn2gnn_dist.commands.audit.view import View
from cnn2gnn_dist.data.index.relabel import (
    Decision,
    check_decisions,
    overridden,
    read_relabel,
    write_relabel,
)
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.inference.audit import files as audit_files
from cnn2gnn_dist.inference.audit import folder as audit_folder
from cnn2gnn_dist.inference.audit.findings import Findings, audit
from cnn2gnn_dist.inference.audit.folder import MAP, PAGE, RELABEL, TABLES
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.memory import turns
from cnn2gnn_dist.inference.memory.changes import changes
from cnn2gnn_dist.log import counted, output, progress, quoted
from cnn2gnn_dist.report.audit_page import write_page

_log = logging.getLogger(__name__)

NAMED = 5
"""Most images named in a warning."""
TINY = 16
"""Shorter side in pixels below which near-duplicates are doubtful: at 8 they were by chance, at 32 real ones."""
SEEN_PAIRS = 5_000
"""Number of (training, held-out) pairs whose bytes are compared, closest first."""
EDIT_S = 600
"""Seconds to wait for an edit of the memory, which may just be forgetting images, to finish."""


def command(
    place: Path,
    *,
    out: Path | None,
    top: int,
    as_csv: bool,
    with_map: bool,
    fix: Path | None,
    dry_run: bool,
) -> int:
    """Audit the training images of a run or model, or turn decisions into a relabel list; returns 0.

    Args:
        place: folder of a run or a model.
        out: folder to write; None: ``audit`` in it.
        top: entries in each section of the page.
        as_csv: also write the tables as CSV.
        with_map: also write the map.
        fix: decisions (CSV with key and class); None: audit.
        dry_run: say what would be read and written, and write nothing.

    Raises:
        UserError: neither a run with a graph nor a model with a memory; unknown keys or classes
            in the decisions; the folder can't be written to; the disk is full; meanwhile the model
            forgot images, or was replaced.
    """
    if top < 0:
        raise UserError(
            f"a section can't have {top} entries", where="--top", remedy="use --top 0 or more"
        )
    folder = place / artefact.AUDIT if out is None else out
    with closing(open_source(place)) as source:
        if fix is not None:
            return _fix(source, fix, folder, dry_run)
        if dry_run:
            return _dry_run(source, folder, as_csv, with_map)
        return _audit(source, place, folder, top=top, as_csv=as_csv, with_map=with_map)


def _audit(
    source: Source, place: Path, folder: Path, *, top: int, as_csv: bool, with_map: bool
) -> int:
    started = time.monotonic()
    durable.create_folder(folder)
    held = source.held_out(_bar)
    found = audit(
        source.training,
        held,
        look=source.look if source.has_pictures else None,
        look_held=source.look_held if held is not None else None,
        progress=_bar,
    )
    exact_P = _exact(source, found)
    tables = audit_files.tables(
        source.training, found, source.keys, source.held_keys, source.held_labels_Q, exact_P
    )
    try:
        with durable.disk_full_reported(folder):
            for name, table in tables.items():
                audit_files.write(folder, name, table, as_csv=as_csv)
            write_page(folder / PAGE, View(source, found, held, exact_P, top).data(place, tables))
            if with_map:  # for minutes, in which a kill would leave the page as it is
                _refuse_forgotten(source, folder)
                _write_map(source, found, folder)
    finally:  # also where a file could not be written, because ``memory forget`` had deleted it
        _refuse_forgotten(source, folder)
    for line in _summary(source, tables):
        output(line)
    output(f"look        {folder / PAGE}  ({time.monotonic() - started:.0f} s)")
    output(
        f"decide      save labels.csv on the page, then cnn2gnn audit {quoted(place)} --fix labels.csv"
    )
    return 0


def _write_map(source: Source, found: Findings, folder: Path) -> None:
    blocks = -(-len(source.keys) // audit_files.MAP_ROWS)
    pictures = progress(source.all_pictures(audit_files.MAP_ROWS), "map", total=blocks, leave=False)
    audit_files.write_map(folder / MAP, source.training, found, source.keys, pictures)


def _refuse_forgotten(source: Source, folder: Path) -> None:
    """Delete what was written if the model has forgotten images since it was opened, or is another one by now.

    Raises:
        UserError: it did.
    """
    # ``memory forget`` deletes the model's own audit in its turn: what is written until then, not afterwards.
    root = source.memory
    own = root is not None and folder.resolve() == root.with_name(artefact.AUDIT).resolve()
    with turns.editing(root, EDIT_S) if root is not None and own else nullcontext():
        gone = source.forgotten_meanwhile()
        if own and source.is_replaced():
            happened = "another model took the place of this one"
        elif gone:
            happened = f"{len(gone)} of these images were forgotten"
        elif own and source.has_forgotten() and not _is_whole(folder):
            happened = "other images of the model were forgotten"
        else:
            return
        what = f"{happened} while the audit was made"
        try:
            audit_folder.forget(folder, gone)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{what}, and it can't be deleted: {error}",
                where=str(folder),
                remedy="delete this folder, and run the command again",
            ) from None
    raise UserError(
        f"{what}, which is therefore deleted", where=str(folder), remedy="run the command again"
    )


def _is_whole(folder: Path) -> bool:
    return all((folder / name).is_file() for name in (PAGE, *(f"{one}.parquet" for one in TABLES)))


def _exact(source: Source, found: Findings) -> np.ndarray:
    """bool [P]: which (training, held-out) pairs are byte-identical."""
    if found.across is None:
        return np.zeros(0, bool)
    exact_P = np.zeros(len(found.across.a_P), bool)
    for number in range(min(len(exact_P), SEEN_PAIRS)):
        if found.across.cosine_P[number] > 0.999:
            a, b = int(found.across.a_P[number]), int(found.across.b_P[number])
            exact_P[number] = source.same_bytes(a, b)
    return exact_P


def _summary(source: Source, tables: dict[str, pa.Table]) -> list[str]:
    labels, pairs = tables["labels"], tables["duplicates"]
    agree = int(pc.sum(labels["both_agree"]).as_py() or 0)
    lines = [
        f"labels      {len(labels):,} of {len(source.keys):,} images fit another class better; "
        f"head and neighbors agree on it for {agree:,}"
    ]
    for where, title in (("train", "duplicates"), ("held-out", "leakage")):
        kinds = pairs.filter(pc.equal(pairs["set"], where))["kind"].to_pylist()
        if where == "train" or len(source.held_keys):
            between = "within the training images" if where == "train" else "with held-out images"
            lines.append(
                f"{title:11} {kinds.count('exact'):,} exact and {kinds.count('near'):,} near pairs {between}"
            )
    size = source.middle_size() if "near" in pairs["kind"].to_pylist() else None
    if size is not None and min(size) < TINY:
        lines.append(
            f"note        at {size[1]} x {size[0]} pixels different images may look like copies: look at the "
            "pairs before you remove images or call it leakage"
        )
    if len(tables["bleeding"]):
        first = tables["bleeding"].slice(0, 1).to_pylist()[0]
        lines.append(
            f"bleeding    {first['class']} and {first['other_class']} most: "
            f"{first['votes']:.1%} of their votes"
        )
    return lines


def _dry_run(source: Source, folder: Path, as_csv: bool, with_map: bool) -> int:
    count = len(source.keys)
    output(f"read   {count:,} training images of {len(source.training.classes)} classes")
    if len(source.held_keys):
        output(f"embed  {len(source.held_keys):,} held-out images")
    names = [f"{name}.parquet" for name in TABLES]
    names += [f"{name}.csv" for name in TABLES] if as_csv else []
    names += [MAP] if with_map else []
    output(f"write  {folder}: {', '.join([*names, PAGE])}")
    if with_map:
        width = source.training.z_Nd.shape[1] + 3 * source.training.table_NM.shape[1]
        output(f"       the map: {count * 4 * width / 1e6:,.0f} MB and the pictures")
    return 0


def _fix(source: Source, fix: Path, folder: Path, dry_run: bool) -> int:
    """Write the relabel list: the decisions, which override those of the training and of edits; what was forgotten."""
    decisions = read_relabel(fix)
    if not decisions:
        raise UserError(
            "this file contains no decisions",
            where=str(fix),
            remedy="give images a class, or drop, on audit/index.html, and save labels.csv there",
        )
    decisions = _without_forgotten(decisions, source)
    check_decisions(decisions, source.known, source.training.classes, str(fix), source.elsewhere)
    if source.warning:
        _log.warning(source.warning)
    earlier: dict[str, Decision] = {}
    for listed in source.earlier:  # ``data.relabel`` takes one list: this one has to hold them all
        earlier = overridden(earlier, read_relabel(listed), source.known)
    edited = _edited(source)
    gone = {key: Decision(None, 0, required=False) for key in source.forgotten}
    everything = earlier
    for later in (edited, decisions, gone):
        everything = overridden(everything, later, source.known)
    path = folder / RELABEL
    dropped = sum(one.name is None for one in decisions.values())
    given = len(decisions) - dropped
    get, are = "gets" if given == 1 else "get", "is" if dropped == 1 else "are"
    output(f"{counted(given, 'image')} {get} a class, {dropped:,} {are} left out")
    if source.earlier:
        count = sum(everything.get(key) is one for key, one in earlier.items())
        output(f"with {count} earlier decisions ({', '.join(map(str, source.earlier))})")
    if kept := [one for key, one in edited.items() if everything.get(key) is one]:
        moved = sum(one.name is not None for one in kept)
        output(
            f"with {counted(len(kept), 'edit')} of the memory: relabeled {counted(moved, 'image')}, removed "
            f"{counted(len(kept) - moved, 'image')}, left out here"
        )
    if gone:
        output(f"{len(gone)} images that were forgotten stay left out")
    if not dry_run:
        durable.create_folder(folder)
        with durable.disk_full_reported(path):
            write_relabel(path, everything)
        output(f"list     {path}")
    output(f"train    cnn2gnn run --config … run.dir=NEW data.relabel={quoted(path)}")
    return 0


def _edited(source: Source) -> dict[str, Decision]:
    """The edits of the memory (``memory relabel``, ``memory remove``) as decisions, with warnings about others."""
    if source.memory is None:
        return {}
    try:
        found = changes(source.memory)
    except (UserError, OSError) as error:
        _log.warning(f"images relabeled or removed in {source.memory} are not in the list: {error}")
        return {}
    if found.moved:
        _log.warning(
            f"{found.moved} images are of a class that was added to the memory: they are not in the list, since the "
            "training images have no such class"
        )
    if found.since:
        _log.warning(
            "the memory was compacted (by `memory compact` or `memory forget`): images relabeled or removed in it "
            "before that are not in the list; add them to the decisions"
        )
    return {
        key: Decision(name, 0, required=name is not None)
        for key, name in found.classes.items()
        if key in source.known
    }


def _without_forgotten(decisions: dict[str, Decision], source: Source) -> dict[str, Decision]:
    """The decisions on other images than forgotten ones, with a warning about the others."""
    gone = {source.known.get(key, key) for key in source.forgotten}
    kept = {key: d for key, d in decisions.items() if source.known.get(key, key) not in gone}
    lost = [key for key, one in decisions.items() if key not in kept and one.name is not None]
    if lost:
        some = ", ".join(lost[:NAMED]) + (", …" if len(lost) > NAMED else "")
        _log.warning(
            f"decisions that do not count ({len(lost)}), since these images were forgotten and stay left out: {some}"
        )
    return kept


def _bar(rows: Iterable[Any], name: str) -> Iterable[Any]:
    listed = list(rows)
    shown: Iterable[Any] = progress(listed, name, leave=False, disable=len(listed) < 4)
    return shown
