"""The arguments of ``cnn2gnn memory``."""

from __future__ import annotations

import argparse
from pathlib import Path

_TEXTS = {
    "ls": "the classes and how many images each has; --keys: the images",
    "add": "add images of one class, which may be new: it is recognized from now on, without training",
    "remove": "remove images by their keys",
    "relabel": "give images another class",
    "forget": "remove images and delete everything stored about them",
    "undo": "return to the previous version",
    "log": "the versions, newest first",
    "compact": "delete earlier versions and removed images",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the commands and their options."""
    parser.description = (
        "Every edit makes a new version: it is complete or absent, and can be undone."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in _TEXTS.items():
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("model", metavar="MODEL", type=Path, help="folder of a model")
        one.set_defaults(command=_run, action=name)
        if name in ("add", "relabel"):
            one.add_argument(
                "--class",
                dest="class_name",
                required=True,
                metavar="NAME",
                help="a class of the model (`cnn2gnn memory ls`)"
                + (", or a new one" if name == "add" else ""),
            )
        if name == "add":
            one.add_argument("images", nargs="+", metavar="IMAGE", help="files or folders")
            one.add_argument(
                "--old-loss",
                type=float,
                metavar="POINTS",
                help="points of accuracy that old classes may lose to new ones; default: as many as "
                "when it was last said, else 1",
            )
            one.add_argument(
                "--dry-run", action="store_true", help="predict the accuracies, change nothing"
            )
        if name in ("remove", "relabel", "forget"):
            one.add_argument(
                "keys", nargs="*", metavar="KEY", help="see `cnn2gnn memory ls --keys`"
            )
            one.add_argument(
                "--from",
                dest="file",
                type=Path,
                metavar="FILE",
                help="file of keys, one per line, also as `cnn2gnn memory ls --keys` prints them, or in a CSV's "
                "column `key`",
            )
        if name == "ls":
            one.add_argument("--keys", action="store_true", help="list the images")
            one.add_argument(
                "--class", dest="class_name", metavar="NAME", help="only of this class"
            )


def _run(given: argparse.Namespace) -> int:
    from cnn2gnn_dist.commands.model import memory
    from cnn2gnn_dist.errors import UserError

    model: Path = given.model
    if given.action == "add":
        return memory.add(
            model, given.images, given.class_name, old_loss=given.old_loss, dry_run=given.dry_run
        )
    if given.action == "ls":
        return memory.show(model, keys=given.keys, class_name=given.class_name)
    if given.action not in ("remove", "relabel", "forget"):
        return {"undo": memory.undo, "log": memory.log, "compact": memory.compact}[given.action](
            model
        )
    keys = [*given.keys, *(memory.keys_from(given.file) if given.file else [])]
    if not keys:
        raise UserError("no keys are given", remedy="name keys, or --from FILE")
    if given.action == "relabel":
        return memory.relabel(model, keys, given.class_name)
    return {"remove": memory.remove, "forget": memory.forget}[given.action](model, keys)
