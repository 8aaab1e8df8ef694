"""The folder of a model, in the Hub's layout: its contents, written once and verified when read.

    config.json        architecture, views, class names, where it comes from
    model.safetensors  weights and buffers of the student
    calibration.npz    outputs for images set apart from training; absent if there were none
    memory/            the images that unseen ones attach to; absent without a dataset graph
    README.md          the model card
    checksums.json     size and SHA-256 of each of these files; the memory has its own

Nothing in it is unpickled, and no path in it leads outside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cnn2gnn_dist import durable
from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.errors import UserError

FORMAT = 1
CONFIG, WEIGHTS, CARD, CHECKSUMS = "config.json", "model.safetensors", "README.md", "checksums.json"
COMING = ".coming.json"
"""Size and SHA-256 of a file that is being replaced by ``replacing_part``."""
RECORDS = ("begin.json", "done.json")
"""The run's records of the stage that wrote the model: in its folder, but not part of the model."""
CALIBRATION, MEMORY = "calibration.npz", "memory"
AUDIT = "audit"
"""Folder that `cnn2gnn audit MODEL` writes into that of the model: in it, but not part of it."""
RELABELLED = "relabelled"
"""Number of decisions of the run's relabel list, in ``source``; absent where they were not kept."""
_LOADING = {
    "pretrained", "weights", "checkpoint_path", "cache_dir", "pretrained_cfg", "pretrained_cfg_overlay",
}  # fmt: skip
"""Arguments that make timm read files or download: the weights of a model are in its folder."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudentSpec(_Part):
    """The student's architecture; ``stem_args`` without anything that concerns training."""

    stem: str
    stem_args: dict[str, Any]
    dim: int
    hidden: int
    label_dim: int
    graph_dim: int


class GraphSpec(_Part):
    """How an image attaches: weights over ``neighbours`` of its ``fanout`` nearest rows."""

    neighbours: int
    fanout: int
    candidates: int


class ViewsSpec(_Part):
    """The clean view: see ``data.images.views.ViewSpec``; mean and std in units of 0..1."""

    size: int
    resize: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def spec(self) -> ViewSpec:
        """Return the view that images are rendered in."""
        return ViewSpec(kind="none", size=self.size, resize=self.resize, flip=False)


class ModelConfig(_Part):
    """``config.json`` of a model.

    Attributes:
        label_names: the classes that the network was trained on, in the order of its logits.
        source: name of the run, numbers of images, seed, results, versions; for people.
    """

    format: int = FORMAT
    library_name: str = "cnn2gnn-dist"
    version: str
    scope: Literal["none", "batch", "dataset"]
    student: StudentSpec
    graph: GraphSpec
    views: ViewsSpec
    label_names: list[str]
    source: dict[str, Any] = {}


def read_config(folder: Path) -> ModelConfig:
    """Read and check ``config.json``.

    Raises:
        UserError: not a model, damaged, or of a newer version.
    """  # noqa: DOC501
    file = folder / CONFIG
    check_not_set_aside(folder)
    if not folder.is_dir():
        raise not_a_model(folder, "there is no such folder")
    check_whole(folder)
    if not (file.is_file() and (folder / CHECKSUMS).is_file()):
        raise not_a_model(folder, f"it has no {CONFIG if not file.is_file() else CHECKSUMS}")
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(file, error) from None
    except ValueError as error:
        raise damaged(file, str(error)) from None
    if not isinstance(tree, dict) or tree.get("library_name") != "cnn2gnn-dist":
        raise not_a_model(folder, "its config.json is another library's")
    written = tree.get("format")
    if isinstance(written, int) and written > FORMAT:
        raise UserError(
            f"the model was written by a newer version ({tree.get('version')}, format "
            f"{tree.get('format')}; this one reads up to {FORMAT})",
            where=str(folder),
            remedy="upgrade cnn2gnn-dist",
        )
    try:
        made = ModelConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise damaged(file, f"{field}: {first['msg']}") from None
    if foreign := _LOADING.intersection(made.student.stem_args):
        raise damaged(
            file, f"student.stem_args: {', '.join(sorted(foreign))} would load other files"
        )
    return made


def write_checksums(folder: Path) -> None:
    """Record size and SHA-256 of the files of a model (the memory keeps its own)."""
    files = {}
    for path in sorted(folder.iterdir()):
        ours = path.name not in (CHECKSUMS, *RECORDS) and not path.name.startswith(".")
        if path.is_file() and ours:
            durable.sync(path)
            files[path.name] = [path.stat().st_size, durable.sha256(path)]
    durable.write_text(folder / CHECKSUMS, json.dumps({"files": files}, indent=1))


def check_files(folder: Path, *, read: bool = True) -> None:
    """Compare the files of a model with their checksums.

    Args:
        folder: of the model.
        read: False: compare only their sizes.

    Raises:
        UserError: a file is missing or damaged.
    """
    before = _checksums(folder)
    try:
        _check_files(folder, read)
    except UserError:
        if _checksums(folder) == before:
            raise
        _check_files(folder, read)  # a file was replaced meanwhile (``replacing_part``)


def _checksums(folder: Path) -> bytes:
    path = folder / CHECKSUMS
    return path.read_bytes() if path.is_file() else b""


def _check_files(folder: Path, read: bool) -> None:
    for name, (size, sha) in _listed(folder).items():
        if name == CARD or name in RECORDS:  # people edit the card; records were once listed
            continue
        if Path(name).name != name:
            raise damaged(folder / CHECKSUMS, f"{name!r} is not a file of the model")
        path = folder / name
        if not path.is_file():
            raise damaged(path, "it is missing")
        if _is_coming(path):
            continue
        if path.stat().st_size != size:
            raise damaged(path, f"it has {path.stat().st_size} bytes, {size} when it was written")
        try:
            right = not read or durable.sha256(path) == sha
        except OSError as error:
            raise _unreadable(path, error) from None
        if not right:
            raise damaged(path, "its checksum does not match")


@contextmanager
def replacing_part(folder: Path, name: str) -> Iterator[Path]:
    """Replace a listed file of a model by a smaller one: the caller writes to the yielded path.

    The model is valid if this is killed at any moment: until the checksums list the new file, ``COMING`` does.

    Raises:
        UserError: the disk is full; the old file stays.
    """
    with durable.replacing(folder / name) as temporary:
        yield temporary
        entry = [temporary.stat().st_size, durable.sha256(temporary)]
        durable.write_text(folder / COMING, json.dumps({name: entry}))
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Let the checksums list what ``replacing_part`` has replaced, if it was killed before that."""
    try:
        coming = json.loads((folder / COMING).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    if all(_is_coming(folder / name) for name in coming):
        before = (folder / CHECKSUMS).read_text(encoding="utf-8")
        text = json.dumps({"files": {**_listed(folder), **coming}}, indent=1)
        # As long as before: a run's record of the stage compares sizes, and would have the model written anew.
        durable.write_text(folder / CHECKSUMS, text.ljust(len(before)))
    (folder / COMING).unlink()


def _is_coming(path: Path) -> bool:
    """Whether this is the new file of a ``replacing_part`` that was killed before the checksums listed it."""
    try:
        size, sha = json.loads((path.parent / COMING).read_text(encoding="utf-8"))[path.name]
        return bool(path.stat().st_size == size and durable.sha256(path) == sha)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def identity(folder: Path) -> tuple[str, str]:
    """SHA-256 of config and weights of a model, as its checksums list them: what a memory belongs to.

    Raises:
        UserError: missing or damaged.
    """
    files = _listed(folder)
    return files[CONFIG][1], files[WEIGHTS][1]


def check_unchanged(folder: Path, opened: tuple[str, str]) -> None:
    """Check that a folder still holds the model that was opened: a memory is of one network's features.

    Raises:
        UserError: it holds another one, or none.
    """
    if identity(folder) != opened:
        raise UserError(
            "another model has taken the place of this one since it was opened",
            where=str(folder),
            remedy="open it again (restart the server); give a new model a folder of its own",
        )


def part(folder: Path, name: str) -> Path | None:
    """Path of a part that a model may have; None if its checksums don't list it.

    A file that is there all the same is another model's, over which this one was copied or uploaded.

    Raises:
        UserError: the checksums are missing or damaged.
    """
    return folder / name if name in _listed(folder) else None


def _listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by name, of the files that the checksums list."""
    try:
        recorded = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))["files"]
        files = {str(name): (int(size), str(sha)) for name, (size, sha) in recorded.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(folder / CHECKSUMS, str(error)) from None
    if unlisted := {CONFIG, WEIGHTS} - files.keys():
        raise damaged(folder / CHECKSUMS, f"it does not list {', '.join(sorted(unlisted))}")
    return files


def aside_of(folder: Path) -> Path:
    """Where ``export --force`` keeps the model in a folder until the new one is in its place."""
    place = folder.absolute()
    return place.parent / f".{place.name}.old"


def replaced_by_none(folder: Path) -> Path | None:
    """The model that was in a folder, if an ``export --force`` was interrupted before the new one was in its place."""
    aside = aside_of(folder)
    return aside if not os.path.lexists(folder) and (aside / CONFIG).is_file() else None


def check_not_set_aside(folder: Path) -> None:
    """Check that no interrupted export has set the model in a folder aside.

    Raises:
        UserError: one has.
    """
    if (aside := replaced_by_none(folder)) is not None:
        raise UserError(
            f"the export that was to replace this model was interrupted; the model is now in {aside}",
            where=str(folder),
            remedy=f"rename {aside} to {folder}, or run the same export again",
        )


def check_whole(folder: Path) -> None:
    """Check that a folder with the weights or checksums of a model also has its config.

    Raises:
        UserError: it has not: it was copied in part, or is damaged.
    """  # noqa: DOC501
    there = [name for name in (WEIGHTS, CHECKSUMS) if (folder / name).is_file()]
    if there and not (folder / CONFIG).is_file():
        raise damaged(folder, f"it has {' and '.join(there)}, but no {CONFIG}")


def not_a_model(folder: Path, why: str) -> UserError:
    """Return the error for a folder that does not hold a model."""
    return UserError(
        f"this folder is not a model: {why}",
        where=str(folder),
        remedy="name a folder that `cnn2gnn export RUN --to MODEL` has written, or a finished run",
    )


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"a file of the model can't be read: {error.strerror}",
        where=str(path),
        remedy="change the permissions of the model's folder so that you can read it",
    )


def damaged(path: Path, why: str) -> UserError:
    """Return the error for a file of a model that is missing or damaged."""
    return UserError(
        f"the model is damaged: {why}",
        where=str(path),
        remedy="copy it again from its source, or `cnn2gnn export RUN --to MODEL`",
    )
