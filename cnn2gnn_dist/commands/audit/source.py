"""What ``audit`` reads: a run (graph, manifests, held-out images) or a model (its memory)."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnn2gnn_dist.commands.model.opening import context_of, unfinished
from cnn2gnn_dist.data.images.decode import CorruptSample, image_size
from cnn2gnn_dist.data.images.views import CLEAN, ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.index.relabel import names_of, rows_named, shared_keys, unique_keys
from cnn2gnn_dist.data.reading.reader import Reader, ReaderSpec, Request
from cnn2gnn_dist.data.reading.shard_files import CacheSpec
from cnn2gnn_dist.data.storage import urls
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph.version import latest_version, open_version
from cnn2gnn_dist.inference.audit import look_alike
from cnn2gnn_dist.inference.audit.findings import HeldOut, TrainingSet
from cnn2gnn_dist.inference.audit.memory import Thumbnails, training_set
from cnn2gnn_dist.inference.folder import artefact
from cnn2gnn_dist.inference.folder.run_model import MODEL
from cnn2gnn_dist.inference.memory import decisions, store
from cnn2gnn_dist.inference.memory.view import Memory, forgotten
from cnn2gnn_dist.log import progress
from cnn2gnn_dist.stages.earlier_models import forgotten_of_run
from cnn2gnn_dist.stages.shared.context import Context, chunks, load_manifest
from cnn2gnn_dist.stages.shared.networks import build_student, check_built_on, load_model

SIDE, QUALITY, READ = 96, 85, 256
"""Side of the pictures of a run, in pixels; their JPEG quality; images read at a time."""
SEEN_SIZES = 15
"""Number of images whose sizes are read."""
DIGITS = (8, 8)
"""Size of scikit-learn's digits, in whose shards they are enlarged to 32 by 32, without more details."""
_NOT_KEPT = (
    "this model, exported on 28 Nov 2026 or before, does not say whether its run was trained with a relabel list "
    "(data.relabel): if so, the decisions in that one are not in the list made here; an audit of the run includes them"
)
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass
class Source:
    """A training set to audit, with its keys and pictures.

    Attributes:
        name: of the run or model.
        training: its features and graph.
        keys: of the N images.
        known: every name that a relabel list may use for an image, with its row.
        elsewhere: names of held-out images.
        held_keys, held_labels_Q: of the held-out images; empty for a model.
        earlier: the relabel list that the run was trained with, if there is one.
        forgotten: names of images that the memories of the run's models have forgotten.
        warning: what is not known about earlier decisions.
        memory: folder of the memory, whose edits are decisions, too; None: there is none.
    """

    name: str
    training: TrainingSet
    keys: Sequence[str]
    known: Mapping[str, int]
    elsewhere: set[str] = field(default_factory=set)
    held_keys: Sequence[str] = ()
    held_labels_Q: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    earlier: Sequence[Path] = ()
    forgotten: Sequence[str] = ()
    warning: str = ""
    memory: Path | None = None

    def held_out(self, bar: Progress) -> HeldOut | None:
        """Embed the held-out images; None where there are none."""
        return None

    def pictures(self, rows: Sequence[int]) -> list[bytes | None]:
        """JPEGs of training images; None where there is none."""
        raise NotImplementedError

    def held_pictures(self, rows: Sequence[int]) -> list[bytes | None]:
        """JPEGs of held-out images."""
        return [None] * len(rows)

    def look(self, rows: np.ndarray) -> np.ndarray:
        """Thumbnails uint8 [n, 32, 32, 3] of training images; black where there is none."""
        raise NotImplementedError

    def look_held(self, rows: np.ndarray) -> np.ndarray:
        """Thumbnails of held-out images."""
        raise NotImplementedError

    @property
    def has_pictures(self) -> bool:
        """Whether there are any thumbnails."""
        return True

    def all_pictures(self, size: int) -> Iterator[list[bytes | None]]:
        """Pictures of all training images, in blocks."""
        for rows in chunks(len(self.keys), size):
            yield self.pictures(list(rows))

    def same_bytes(self, a: int, b: int) -> bool:
        """Whether a held-out image and a training image are the same file."""
        return False

    def forgotten_meanwhile(self) -> list[str]:
        """Keys of images that a model's memory had when it was opened, and has forgotten by now; a run keeps its own.

        Raises:
            UserError: the memory is damaged, or gone.
        """
        return []

    def has_forgotten(self) -> bool:
        """Whether a model has forgotten any image since it was opened, shown or not: its own audit is deleted then."""
        return False

    def is_replaced(self) -> bool:
        """Whether another model is in a model's folder by now.

        Raises:
            UserError: it is damaged, or gone.
        """
        return False

    def middle_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the training image of median shorter side, of some; None: not known.

        A model keeps only thumbnails, all of one size.
        """
        return None

    def close(self) -> None:
        """Close the files."""


def open_source(folder: Path) -> Source:
    """Open a run or a model.

    Raises:
        UserError: neither, unfinished, or without a graph.
    """
    return _of_model(folder) if (folder / artefact.CONFIG).is_file() else _of_run(folder)


class _RunSource(Source):
    context: Context
    train: Manifest
    held: Manifest

    def open(self, context: Context, train: Manifest, held: Manifest) -> _RunSource:
        self.context, self.train, self.held = context, train, held
        self._readers = [
            _reader(context, path, ViewSpec(kind="none", size=size, flip=False))
            for size in (SIDE, look_alike.SIDE)
            for path in (context.paths.train_manifest, context.paths.test_manifest)
        ]
        return self

    def held_out(self, bar: Progress) -> HeldOut | None:
        if not len(self.held):
            return None
        config, context = self.context.config, self.context
        student = build_student(config, self.train.num_classes, config.graph.scope, False)
        load_model(student, context.paths.root, "student")
        student.to(context.device).eval()
        x_QD = np.zeros((len(self.held), config.student.dim), np.float16)
        z_Qd = np.zeros((len(self.held), config.graph.dim), np.float32)
        with (
            torch.inference_mode(),
            closing(_reader(context, context.paths.test_manifest, context.views())) as reader,
        ):
            for rows in bar(list(chunks(len(self.held), READ)), "embed held-out"):
                batch = reader.read(Request(np.arange(rows.start, rows.stop), CLEAN))
                x, z = student.embed(torch.from_numpy(batch.images).to(context.device))
                good = batch.valid
                x_QD[rows.start : rows.stop][good] = x.float().cpu().numpy()[good]
                z_Qd[rows.start : rows.stop][good] = z.float().cpu().numpy()[good]
        return HeldOut(x_QD, z_Qd, self.held.label_N)

    def pictures(self, rows: Sequence[int]) -> list[bytes | None]:
        return _jpegs(self._readers[0], rows)

    def held_pictures(self, rows: Sequence[int]) -> list[bytes | None]:
        return _jpegs(self._readers[1], rows)

    def look(self, rows: np.ndarray) -> np.ndarray:
        return _thumbnails(self._readers[2], rows)

    def look_held(self, rows: np.ndarray) -> np.ndarray:
        return _thumbnails(self._readers[3], rows)

    def same_bytes(self, a: int, b: int) -> bool:
        if self.held.size_N[a] != self.train.size_N[b]:
            return False
        return _crc(self.held, a) == _crc(self.train, b)

    def middle_size(self) -> tuple[int, int] | None:
        return middle_size(self.train, self.context.config.data.source)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()


def _of_run(folder: Path) -> Source:
    context = context_of(folder)
    root = context.paths.root
    if context.config.graph.scope != "dataset":
        raise UserError(
            f"this run has no graph of its training images: graph.scope={context.config.graph.scope}",
            where=str(folder),
            remedy="audit a run with graph.scope=dataset",
        )
    check_built_on(root, "graph", "student")
    found = latest_version(root / "graph")
    if found is None:
        raise unfinished(folder, "it has no graph", "graph")
    version = open_version(found)
    train = load_manifest(context.paths.train_manifest)
    held = load_manifest(context.paths.test_manifest)
    if not np.array_equal(version.labels, train.label_N):
        raise UserError(
            "this run's graph was built from other training images than its manifest lists",
            where=str(found),
            remedy="`cnn2gnn run --update` with the run's config, then audit it",
        )
    twin_N = np.asarray(version.twin) if (found / "twin.npy").is_file() else None
    used, memory = context.relabel_list(), root / MODEL / artefact.MEMORY
    training = TrainingSet(
        version.x, np.asarray(version.z), np.asarray(version.labels), version.candidates, twin_N,
        train.classes,
    )  # fmt: skip
    return _RunSource(
        context.config.name,
        training,
        unique_keys(train),
        names_of(train),
        set(names_of(held)),
        unique_keys(held),
        held.label_N,
        [] if used is None else [used],
        _forgotten_names(train, forgotten_of_run(root)),
        memory=memory if (memory / store.HEAD).is_file() else None,
    ).open(context, train, held)


class _ModelSource(Source):
    thumbnails: Thumbnails
    identity: tuple[str, str]

    def pictures(self, rows: Sequence[int]) -> list[bytes | None]:
        return self.thumbnails.jpegs(rows)

    def look(self, rows: np.ndarray) -> np.ndarray:
        return self.thumbnails.look(rows)

    @property
    def has_pictures(self) -> bool:
        return self.thumbnails.any

    def all_pictures(self, size: int) -> Iterator[list[bytes | None]]:
        return self.thumbnails.blocks(size)

    def forgotten_meanwhile(self) -> list[str]:
        assert self.memory is not None
        listed = sorted(set(forgotten(self.memory)).intersection(self.keys))
        again = Memory.open(self.memory).ids_of(listed) if listed else {}  # added after that
        return [key for key in listed if key not in again]

    def has_forgotten(self) -> bool:
        assert self.memory is not None
        return not set(self.forgotten).issuperset(forgotten(self.memory))

    def is_replaced(self) -> bool:
        assert self.memory is not None
        return artefact.identity(self.memory.parent) != self.identity


def _of_model(folder: Path) -> Source:
    config, identity = artefact.read_config(folder), artefact.identity(folder)
    artefact.check_files(folder, read=False)
    if not (folder / artefact.MEMORY / store.HEAD).is_file():
        raise UserError(
            "this model has no memory of its training images",
            where=str(folder),
            remedy="export a run with graph.scope=dataset, or audit such a run",
        )
    memory = Memory.open(folder / artefact.MEMORY)
    keys, name = memory.keys(memory.live_ids), str(config.source.get("name", folder.name))
    removed = memory.keys(np.flatnonzero(~memory.live))
    known = {key: row for row, key in enumerate([*keys, *removed])}
    listed = decisions.listed(memory.root)  # may name images in another way (SHARD/KEY)
    known = {name: known[key] for name, _, key in listed if key in known} | known
    source = _ModelSource(
        name,
        training_set(memory),
        keys,
        known,
        earlier=[memory.root / decisions.FILE] if listed else [],
        forgotten=forgotten(memory.root),
        warning="" if artefact.RELABELLED in config.source else _NOT_KEPT,
        memory=memory.root,
    )
    source.thumbnails, source.identity = Thumbnails(memory), identity
    return source


def _forgotten_names(train: Manifest, keys: Sequence[str]) -> list[str]:
    """Forgotten keys as names of training images, as far as they are any."""
    names, known = unique_keys(train), names_of(train)
    # Where several images have a key, it names no image in a relabel list, but all of them are left out.
    rows = np.flatnonzero(rows_named(train, keys)).tolist()
    shared = shared_keys(train)
    others = [key for key in keys if key not in known and key not in shared]
    return [*(names[row] for row in rows), *others]


def _reader(context: Context, manifest: Path, views: ViewSpec) -> Reader:
    stream = context.config.stream
    return Reader(
        ReaderSpec(str(manifest), views, 0, CacheSpec(stream.cache_dir, stream.cache_bytes))
    )


def _thumbnails(reader: Reader, rows: np.ndarray) -> np.ndarray:
    found = np.empty((len(rows), look_alike.SIDE, look_alike.SIDE, 3), np.uint8)
    blocks = list(chunks(len(rows), READ))
    for some in progress(blocks, "compare pictures", leave=False, disable=len(blocks) < 8):
        batch = reader.read(Request(np.asarray(rows[some.start : some.stop], np.int64), CLEAN))
        found[some.start : some.stop] = batch.images
    return found


def _jpegs(reader: Reader, rows: Sequence[int]) -> list[bytes | None]:
    from PIL import Image

    found: list[bytes | None] = []
    for some in chunks(len(rows), READ):
        batch = reader.read(Request(np.asarray(rows[some.start : some.stop], np.int64), CLEAN))
        for image, valid in zip(batch.images, batch.valid, strict=True):
            data = io.BytesIO()
            Image.fromarray(image).save(data, "JPEG", quality=QUALITY)
            found.append(data.getvalue() if valid else None)
    return found


def _crc(manifest: Manifest, row: int) -> int:
    if manifest.crc_N is not None:
        return int(manifest.crc_N[row])
    return zlib.crc32(_encoded(manifest, row))


def _encoded(manifest: Manifest, row: int) -> bytes:
    path = manifest.shards[int(manifest.shard_N[row])].path
    return urls.read_range(path, int(manifest.offset_N[row]), int(manifest.size_N[row]))


def middle_size(manifest: Manifest, packed_from: str) -> tuple[int, int] | None:
    """Height and width of the image of median shorter side among ``SEEN_SIZES``; None: none can be read."""
    if packed_from == "digits":
        return DIGITS
    sizes = []
    rows = np.linspace(0, len(manifest) - 1, min(len(manifest), SEEN_SIZES)).astype(int)
    for row in rows.tolist():
        with suppress(CorruptSample):
            sizes.append(image_size(_encoded(manifest, row)))
    return sorted(sizes, key=min)[len(sizes) // 2] if sizes else None
