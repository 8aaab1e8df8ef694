"""The stages before any model: pack images to shards, index shards to manifests."""

from __future__ import annotations

from pathlib import Path

from cnn2gnn_dist.config import DataConfig
from cnn2gnn_dist.data import manifest as manifests
from cnn2gnn_dist.data import pack
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.stages.context import Context


def pack_run(context: Context) -> list[Path]:
    """Stage ``pack``: write the run's shards (rank 0; the others wait in the pipeline)."""
    data, out = context.config.data, context.folder
    done = pack_source(data, out, "train", data.train, context.config.seed)
    if data.test is not None:
        done += pack_source(data, out, "test", data.test, context.config.seed)
    elif data.source in ("cifar10", "cifar100"):
        done += pack_source(data, out, "test", data.train, context.config.seed)
    return done


def pack_source(
    data: DataConfig, out: Path, part: str, origin: str | list[str] | None, seed: int
) -> list[Path]:
    """Pack one part ("train" or "test") of a source into ``out``; returns the shards.

    Raises:
        UserError: the source needs a path and has none.
    """
    out.mkdir(parents=True, exist_ok=True)
    if data.source == "digits":
        return pack.pack_digits(out, shard_size=data.shard_size, prefix=part, limit=data.limit)
    if origin is None:
        raise UserError(
            f"the source {data.source!r} needs to know where the images lie",
            where=f"data.{part}",
            remedy=f"data.{part}=PATH",
        )
    if data.source == "parquet":
        return pack.pack_parquet(
            manifests.expand(origin),
            out,
            shard_size=data.shard_size,
            prefix=part,
            image_column=data.image_column,
            label_column=data.label_column,
            limit=data.limit,
        )
    folder = Path(origin if isinstance(origin, str) else origin[0])
    if data.source == "imagefolder":
        return pack.pack_imagefolder(
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
            "shards need no packing", where="data.source", remedy="run `cnn2gnn index` at once"
        )
    return pack.pack_torchvision(
        data.source,
        folder,
        part == "train",
        out,
        shard_size=data.shard_size,
        prefix=part,
        limit=data.limit,
    )


def index_run(context: Context) -> list[Path]:
    """Stage ``index``: the manifests of training and held-out images (rank 0)."""
    data, paths = context.config.data, context.paths
    if data.source == "shards":
        train, test = shard_paths(data.train, "train"), None
        if data.test is not None:
            test = shard_paths(data.test, "test")
    else:
        train, test = _packed(paths.shards, "train"), _packed(paths.shards, "test")
    classes = None if data.num_classes is None else [str(c) for c in range(data.num_classes)]
    whole = manifests.index(
        train,
        classes=classes,
        allow_empty_classes=data.allow_empty_classes,
        checksums=data.checksums,
    )
    if test:
        held = manifests.index(
            test, classes=whole.classes, allow_empty_classes=True, checksums=data.checksums
        )
    else:
        if data.holdout <= 0:
            raise UserError(
                "there are no held-out images",
                where="data.test",
                remedy="name a second set of shards, or set data.holdout above 0",
            )
        train_rows, held_rows = manifests.split_per_class(whole, data.holdout, context.config.seed)
        whole, held = whole.select(train_rows), whole.select(held_rows)
    paths.train_manifest.parent.mkdir(parents=True, exist_ok=True)
    whole.save(paths.train_manifest)
    held.save(paths.test_manifest)
    context.say(
        f"index    {len(whole)} training and {len(held)} held-out images of "
        f"{whole.num_classes} classes in {len(whole.shards)} shards"
    )
    return [paths.train_manifest, paths.test_manifest]


def shard_paths(origin: str | list[str] | None, part: str) -> list[str]:
    """Paths of existing shards.

    Raises:
        UserError: none named, or none found.
    """
    if origin is None:
        raise UserError(
            "no shards are named", where=f"data.{part}", remedy=f"data.{part}='/path/{part}-*.tar'"
        )
    return manifests.expand(origin)


def _packed(folder: Path, part: str) -> list[str]:
    return sorted(str(path) for path in folder.glob(f"{part}-*.tar"))
