"""The stages before any model: pack images into shards, index shards into manifests."""

from __future__ import annotations

import os
from pathlib import Path

from cnn2gnn_dist import durable
from cnn2gnn_dist.config import DataConfig
from cnn2gnn_dist.data.images.file_kind import ENOUGH, kind_of, remedy_for
from cnn2gnn_dist.data.index import class_names
from cnn2gnn_dist.data.index.class_matching import notes
from cnn2gnn_dist.data.index.held_out_overlap import overlap_note
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.index.manifest_pair import index_data_set, index_pair
from cnn2gnn_dist.data.index.relabel import (
    names_of,
    read_relabel,
    relabelled,
    rows_named,
    without,
    write_relabel,
)
from cnn2gnn_dist.data.index.repeated_images import copies_note
from cnn2gnn_dist.data.index.split import split_labelled
from cnn2gnn_dist.data.packing import packers
from cnn2gnn_dist.data.storage import folders
from cnn2gnn_dist.data.storage.shard_paths import files_of
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.stages.earlier_models import forgotten_of_run
from cnn2gnn_dist.stages.shared import preflight
from cnn2gnn_dist.stages.shared.context import Context

_CALIBRATION = 0x5CA1AB1E
"""Changes the seed of the held-out split into that of the calibration split."""


def pack_run(context: Context) -> list[Path]:
    """Stage ``pack``: write the run's shards (rank 0; the others wait in the pipeline)."""
    data, out = context.config.data, context.folder
    durable.remove_unfinished(out)  # as large as a shard; the run's lock is held
    done = pack_source(data, out, "train", data.train, context.config.seed)
    if data.test is not None:
        done += pack_source(data, out, "test", data.test, context.config.seed)
        if data.source in ("parquet", "imagefolder"):
            for note in _overlap_notes(
                *(_paths_of(data.source, o) for o in (data.train, data.test))
            ):
                context.warn(note)
    elif data.source in ("cifar10", "cifar100"):
        done += pack_source(data, out, "test", data.train, context.config.seed)
    return done


def pack_source(
    data: DataConfig, out: Path, part: str, origin: str | list[str] | None, seed: int
) -> list[Path]:
    """Pack one split ("train" or "test") of a source into ``out``; return the shards.

    Raises:
        UserError: the source needs a path and has none.
    """
    out.mkdir(parents=True, exist_ok=True)
    if data.source == "digits":
        return packers.pack_digits(out, shard_size=data.shard_size, prefix=part, limit=data.limit)
    if origin is None:
        raise UserError(
            f"the source {data.source!r} needs to know where the images are",
            where=f"data.{part}",
            remedy=f"data.{part}=PATH",
        )
    if data.source == "parquet":
        return packers.pack_parquet(
            files_of(data.source, origin),
            out,
            shard_size=data.shard_size,
            prefix=part,
            image_column=data.image_column,
            label_column=data.label_column,
            limit=data.limit,
            unlabelled=data.unlabelled and part == "train",
        )
    folder = _one_folder(origin, data.source, part)
    if data.source == "imagefolder":
        check_tree(folder)
        return packers.pack_imagefolder(
            folder,
            out,
            shard_size=data.shard_size,
            prefix=part,
            seed=seed,
            limit=data.limit,
            max_corrupt=data.max_corrupt,
        )
    if data.source == "shards":
        raise UserError(
            "shards need no packing", where="data.source", remedy="run `cnn2gnn index` directly"
        )
    return packers.pack_torchvision(
        data.source,
        folder,
        part == "train",
        out,
        shard_size=data.shard_size,
        prefix=part,
        limit=data.limit,
    )


def _paths_of(source: str, origin: str | list[str] | None) -> list[str]:
    if source == "parquet":
        return files_of(source, origin or [])
    return [str(_one_folder(origin or [], source, "train"))]


def _overlap_notes(train: list[str], test: list[str]) -> list[str]:
    """Warning if held-out files are also training files."""
    known = {path if is_remote(path) else os.path.realpath(path) for path in train}
    both = [path for path in test if (path if is_remote(path) else os.path.realpath(path)) in known]
    if not both:
        return []
    return [
        f"{len(both)} of {len(test)} held-out files or folders are also training ones "
        f"({os.path.basename(both[0])}): the models have seen these images, so the results are too good"
    ]


def _one_folder(origin: str | list[str], source: str, part: str) -> Path:
    named = [origin] if isinstance(origin, str) else origin
    if len(named) != 1:
        raise UserError(
            f"the source {source!r} reads one folder, but {len(named)} are given",
            where=f"data.{part}",
            remedy=f"data.{part}=FOLDER; combine several in one by symbolic links",
        )
    if "://" in named[0].removeprefix("file://"):
        raise UserError(
            f"the source {source!r} reads a folder on disk, but this is a URL",
            where=f"data.{part}={named[0]}",
            remedy="download the images; only WebDataset shards stream from URLs "
            "(data.source=shards)",
        )
    return Path(named[0].removeprefix("file://")).expanduser()


def check_tree(root: Path) -> None:
    """Check that a folder is a tree of images by class, as far as names show.

    Raises:
        UserError: it contains shards or Parquet files, or its folders are the splits of a data set.
    """
    if root.is_file():
        with open(root, "rb") as file:
            kind = kind_of(file.read(ENOUGH)) or "a file"
        raise UserError(
            f"the source 'imagefolder' reads a folder, but this is {kind}",
            where=str(root),
            remedy=remedy_for(kind, "give the folder that has a subfolder per class"),
        )
    if not root.is_dir():
        return  # the packer reports it
    folders.refuse_parts_as_classes(str(root), folders.folders_in(root))
    other = folders.other_source(str(root), "imagefolder")
    if other is not None:
        kinds = {"shards": "tar shards", "parquet": "Parquet files"}
        raise UserError(
            f"the folder contains {kinds[other]}, and no images in subfolders",
            where=str(root),
            remedy=f"set data.source={other} if these are the data, or give another folder",
        )


def index_run(context: Context) -> list[Path]:
    """Stage ``index``: the manifests of training and held-out images (rank 0)."""
    config, paths = context.config, context.paths
    data = config.data
    if data.source == "shards":
        train = shard_paths(data.train, "train")
        test = None if data.test is None else shard_paths(data.test, "test")
    else:
        train, test = _packed(paths.shards, "train"), _packed(paths.shards, "test")
    if test:
        pair = index_pair(
            train,
            test,
            num_classes=data.num_classes,
            match_classes=data.match_classes,
            allow_empty_classes=data.allow_empty_classes,
            checksums=data.checksums,
            unlabelled=data.unlabelled,
        )
        whole, held, found = pair.train, pair.held, [*pair.notes, *_overlap_notes(train, test)]
    else:
        whole, held, found = _held_out(data, train, config.seed)
    paths.train_manifest.parent.mkdir(parents=True, exist_ok=True)
    whole = _decided(context, whole, held)
    found += preflight.check_classes(whole.label_N, len(held), None if test else data.holdout)
    unused = class_names.unused_lists([*train, *(test or [])]) if data.source == "shards" else None
    found += [note for note in (unused, copies_note(whole), overlap_note(whole, held)) if note]
    apart = None
    if data.calibration:
        whole, apart = _set_apart(whole, data.calibration, config.seed)
    stages = ["student", *(("control",) if config.student.control else ())]
    if config.targets.logits is None:
        stages.insert(0, "teacher")
    labelled = int((whole.label_N >= 0).sum())
    misfits = preflight.misfits(config, stages, len(whole), labelled)
    found += [f"{e.what} ({e.where})" for e in misfits]
    durable.remove_unfinished(paths.train_manifest.parent)
    whole.save(paths.train_manifest)
    held.save(paths.test_manifest)
    paths.calibration_manifest.unlink(missing_ok=True)
    if apart is not None:
        apart.save(paths.calibration_manifest)
    context.say(
        f"{len(whole)} training and {len(held)} held-out images of "
        f"{whole.num_classes} classes in {len(whole.shards)} shards"
        + (f"; {len(apart)} set apart for calibration" if apart is not None else "")
    )
    for note in dict.fromkeys(found):
        context.warn(note)
    return [path for path in paths.manifests if path.is_file()]


def _decided(context: Context, whole: Manifest, held: Manifest) -> Manifest:
    """Apply the relabel list, and leave out what the memories of the run's models have forgotten."""
    data, root = context.config.data, context.paths.root
    gone = forgotten_of_run(root)
    if data.relabel is None:
        context.paths.relabel_list.unlink(missing_ok=True)
    else:
        path = Path(data.relabel)
        decisions = read_relabel(path)
        whole, said = relabelled(
            whole,
            held,
            decisions,
            f"data.relabel={path}",
            allow_empty_classes=data.allow_empty_classes,
        )
        context.say(said)
        # The file may be changed or deleted later, but an audit has to add to what was used here.
        row_of, gone_N = names_of(whole), rows_named(whole, gone)
        kept = {k: one for k, one in decisions.items() if not (k in row_of and gone_N[row_of[k]])}
        write_relabel(context.paths.relabel_list, kept)
    whole, forgotten = without(whole, gone, str(root), allow_empty_classes=data.allow_empty_classes)
    if forgotten:
        context.say(
            f"{forgotten} training images that the memory of the run's model has forgotten are left out"
        )
    return whole


def _set_apart(whole: Manifest, share: float, seed: int) -> tuple[Manifest, Manifest]:
    """Split the training images into those trained on and those that calibrate the model."""
    # Another seed than the held-out split's: the same hash would choose the next images in order.
    rows, apart = split_labelled(whole, share, seed ^ _CALIBRATION)
    return whole.select(rows), whole.select(apart)


def _held_out(
    data: DataConfig, train: list[str], seed: int
) -> tuple[Manifest, Manifest, list[str]]:
    """Training images, the held-out fraction of each class, and the warnings about them."""
    if data.holdout <= 0:
        raise UserError(
            "there are no held-out images",
            where="data.test",
            remedy="give a second set of images, or set data.holdout above 0",
        )
    whole = index_data_set(
        train,
        num_classes=data.num_classes,
        allow_empty_classes=data.allow_empty_classes,
        checksums=data.checksums,
        unlabelled=data.unlabelled,
    )
    train_rows, held_rows = split_labelled(whole.manifest, data.holdout, seed)
    part, held = whole.manifest.select(train_rows), whole.manifest.select(held_rows)
    found = notes(whole.class_info, part.label_N, held.label_N, moved=False)
    return part, held, found + ([whole.left_out] if whole.left_out else [])


def shard_paths(origin: str | list[str] | None, part: str) -> list[str]:
    """Return the paths of existing shards.

    Raises:
        UserError: none named, or none found.
    """
    if origin is None:
        raise UserError(
            "no shards are given", where=f"data.{part}", remedy=f"data.{part}='/path/{part}-*.tar'"
        )
    return files_of("shards", origin)


def _packed(folder: Path, part: str) -> list[str]:
    return sorted(str(path) for path in folder.glob(f"{part}-*.tar"))
