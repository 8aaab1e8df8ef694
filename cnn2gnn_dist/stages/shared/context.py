"""What a stage gets: the config, its ranks, the run's folder, the digests of its inputs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.images.views import ViewSpec
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.corrupt import CorruptSamples
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Batch, ReaderSpec
from cnn2gnn_dist.data.reading.shard_files import CacheSpec
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.run_storage.session import RunStorage
from cnn2gnn_dist.run_storage.training_copies import TrainingCopies
from cnn2gnn_dist.runtime.group import collectives
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.training import ds_config, precision

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunPaths:
    """Paths of the parts of a run."""

    root: Path

    @property
    def shards(self) -> Path:
        """Packed shards."""
        return self.root / "shards"

    @property
    def train_manifest(self) -> Path:
        """Manifest of the training images."""
        return self.root / "manifest" / "train.arrow"

    @property
    def test_manifest(self) -> Path:
        """Manifest of the held-out images."""
        return self.root / "manifest" / "test.arrow"

    @property
    def calibration_manifest(self) -> Path:
        """Manifest of the images set apart from training; absent without ``data.calibration``."""
        return self.root / "manifest" / "calibration.arrow"

    @property
    def relabel_list(self) -> Path:
        """The relabel list that the manifests were made with; absent without ``data.relabel``."""
        return self.root / "manifest" / "relabel.csv"

    @property
    def manifests(self) -> tuple[Path, ...]:
        """Training, held-out and calibration manifest; the last one may be absent."""
        return self.train_manifest, self.test_manifest, self.calibration_manifest

    @property
    def targets(self) -> Path:
        """Soft targets, one Parquet file per shard."""
        return self.root / "targets"

    @property
    def bank(self) -> Path:
        """The final graph with its features: what unseen images attach to."""
        return self.root / "bank"

    @property
    def results(self) -> Path:
        """The results of the run."""
        return self.root / "results.json"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.root / "report.html"


@dataclass(frozen=True)
class Context:
    """One stage's view of the run.

    ``key`` identifies this stage's config and inputs (checkpoints carry it), ``folder`` is
    its own folder, ``device`` is "cpu" or "cuda", ``inside_ray`` whether the process runs under Ray,
    ``about`` the config fields behind the key, ``force`` whether to accept a checkpoint of another key,
    ``deepspeed`` the DeepSpeed configs that were read for all ranks, ``storage`` where rank 0 also keeps
    the run, ``bfloat16`` whether no rank's device lacks it.
    """

    config: Config
    ranks: Ranks
    paths: RunPaths
    folder: Path
    key: str
    device: str
    inside_ray: bool
    about: dict[str, Any] = field(default_factory=dict)
    force: bool = False
    deepspeed: dict[str, dict[str, Any]] = field(default_factory=dict)
    storage: RunStorage | None = None
    bfloat16: bool = True

    def relabel_list(self) -> Path | None:
        """The relabel list that the training images were made with; None without one.

        For a run from before the stage ``index`` kept it, the file that the config names.
        """
        kept, named = self.paths.relabel_list, self.config.data.relabel
        if kept.is_file():
            return kept
        return None if named is None else Path(named)

    def copies(self) -> TrainingCopies | None:
        """Where this stage's checkpoints are also kept; None without ``run.storage``."""
        if self.config.run.storage is None:
            return None
        return TrainingCopies(self.storage, self.folder, self.config.run.storage)

    def deepspeed_of(self, model: str) -> dict[str, Any]:
        """The DeepSpeed config of "teacher" or "student", read by one process for all ranks."""
        if model in self.deepspeed:
            return self.deepspeed[model]
        return ds_config.load(getattr(self.config, model).ds_config)

    def compute_dtype(self, model: str) -> torch.dtype:
        """The precision in which "teacher" or "student" (and the control) computes on all ranks."""
        read = self.deepspeed_of(model)
        return precision.choose(self.config.precision, self.device, read, self.bfloat16)

    def say(self, text: str, stage: str | None = None) -> None:
        """Log one line, once for all ranks; ``stage``: a stage other than the running one."""
        self._say(logging.INFO, text, stage)

    def warn(self, text: str, stage: str | None = None) -> None:
        """Log a warning, once for all ranks: something to know although the run continues."""
        self._say(logging.WARNING, text, stage)

    def _say(self, level: int, text: str, stage: str | None) -> None:
        if self.ranks.is_first:
            _log.log(level, text, extra={} if stage is None else {"stage": stage})

    def views(self) -> ViewSpec:
        """The views of this run's images."""
        v = self.config.views
        return ViewSpec(
            kind=v.kind,
            size=v.size,
            seed=self.config.seed,
            pad=v.pad,
            scale=v.scale,
            ratio=v.ratio,
            flip=v.kind in ("crop_flip", "random_resized_crop"),
            resize=v.resize,
            reflect=v.padding == "reflect",
            alternating=v.flip == "alternating",
            cutout=v.cutout,
            randaugment=v.randaugment,
            magnitude=v.magnitude,
            hook=v.hook,
            fill=(round(255 * v.mean[0]), round(255 * v.mean[1]), round(255 * v.mean[2])),
        )

    def reader_spec(self, manifest: Path) -> ReaderSpec:
        """How a manifest's samples are read in this run."""
        settings = self.config.stream
        return ReaderSpec(
            str(manifest),
            self.views(),
            settings.decoded_bytes,
            CacheSpec(settings.cache_dir, settings.cache_bytes),
        )

    def stream(self, manifest: Path, name: str) -> ReaderPool:
        """A stream of this rank's batches from a manifest's samples."""
        settings = self.config.stream
        return ReaderPool(
            self.reader_spec(manifest),
            backend=settings.backend,
            workers=settings.workers,
            prefetch=settings.prefetch,
            name=f"{self.config.name}-{name}-rank{self.ranks.rank}-reader",
            resources=self.config.cluster.reader_resources,
        )

    def to_device(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images uint8 [n, H, W, 3], labels int64 [n], valid float32 [n] on the device."""
        images, labels, valid = batch.tensors(self.device)
        return images, labels, valid.float()


@dataclass
class CorruptCount(CorruptSamples):
    """Counts all ranks' corrupt samples and stops a stage that finds too many.

    Attributes:
        total: samples of the data set.
        what: the data set, in errors.
    """

    total: int
    what: str = "images"

    def check(self) -> dict[int, str]:
        """All ranks' corrupt samples (collective).

        Raises:
            UserError: more than the limit, on every rank.
        """
        everyone: dict[int, str] = {}
        for seen in collectives.all_gather_object(self.seen):
            everyone.update(seen)
        if self.exceeds(len(everyone)):
            some = "; ".join(sorted(everyone.values())[:5])
            share = math.ceil(1000 * len(everyone) / self.total) / 1000
            raise UserError(
                f"{len(everyone)} corrupt {self.what} among {self.total}, more than the limit of "
                f"{self.limit:.2%}: {some}",
                where="data.max_corrupt",
                remedy="fix or remove these images and run the same command with --update, "
                f"or leave them out: data.max_corrupt={share:g}; if a packed shard is "
                "damaged and its images are not: delete it, and `cnn2gnn run` repacks it",
            )
        return everyone


def load_manifest(path: Path, stage: str = "index") -> Manifest:
    """Load a manifest of this run.

    Raises:
        UserError: it does not exist yet.
    """
    if not path.is_file():
        raise UserError(
            "the manifest is missing", where=str(path), remedy=f"run `cnn2gnn {stage}` first"
        )
    return Manifest.load(path)


def chunks(total: int, size: int) -> Iterator[range]:
    """Ranges of at most ``size`` that cover 0..total."""
    for start in range(0, total, size):
        yield range(start, min(total, start + size))
