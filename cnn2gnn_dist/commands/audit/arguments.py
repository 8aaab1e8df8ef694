"""The arguments of ``cnn2gnn audit``."""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``cnn2gnn audit``."""
    parser.description = (
        "Likely label errors, near-duplicates (also with held-out images), outliers, hubs and classes that are "
        "confused with each other (bleeding), as tables and as a page with pictures. A person decides; --fix turns "
        "the decisions into the list that training reads (data.relabel)."
    )
    parser.add_argument(
        "place", metavar="RUN|MODEL", help="folder of a finished run, or of a model"
    )
    parser.add_argument("--out", metavar="FOLDER", help="folder to write; default RUN/audit")
    parser.add_argument(
        "--top", type=int, default=60, help="entries in each section of the page; default 60"
    )
    parser.add_argument("--csv", action="store_true", help="also write the tables as CSV")
    parser.add_argument("--no-map", action="store_true", help="leave out map.parquet")
    parser.add_argument(
        "--fix",
        metavar="CSV",
        help="file of decisions (key,class; class drop): write the relabel list",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.set_defaults(command=_audit)


def _audit(given: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands.audit import command as audit

    return audit.command(
        Path(given.place),
        out=None if given.out is None else Path(given.out),
        top=given.top,
        as_csv=given.csv,
        with_map=not given.no_map,
        fix=None if given.fix is None else Path(given.fix),
        dry_run=given.dry_run,
    )
