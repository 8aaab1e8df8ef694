"""Settings of the images: which ones, how they become arrays, and how they reach a training process."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from cnn2gnn_dist import consistency
from cnn2gnn_dist.config_section import PATH, Section


class DataConfig(Section):
    """Which images, and which of them are held out."""

    source: Literal["shards", "digits", "parquet", "imagefolder", "cifar10", "cifar100"] = Field(
        "digits",
        description="shards: index WebDataset shards as they are; the others are packed into shards first",
    )
    train: str | list[str] | None = Field(
        None,
        description="the training images: shards (globs, {0000..1023}, a folder, URLs), Parquet files (globs, a "
        "folder), or a folder with one subfolder per class",
        json_schema_extra=PATH,
    )
    test: str | list[str] | None = Field(
        None,
        description="the same for the held-out images; null: hold out the share `holdout` of each class",
        json_schema_extra=PATH,
    )
    holdout: float = Field(
        0.2, ge=0, lt=1, description="share of each class held out when `test` is null"
    )
    calibration: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the training images of each class set apart and never trained on: the exported model "
        "is calibrated on them (confidence, new classes); 0: no calibration",
    )
    shard_size: int = Field(2048, ge=1, description="samples per packed shard")
    image_column: str = Field("image", description="Parquet column of the images")
    label_column: str = Field("label", description="Parquet column of the labels")
    limit: int | None = Field(None, ge=1, description="pack only this many samples, for trials")
    relabel: str | None = Field(
        None,
        description="CSV file with the columns key and class: these training images get this class, or are left out "
        "(class drop); `cnn2gnn audit --fix` writes it",
        json_schema_extra=PATH,
    )
    num_classes: int | None = Field(
        None,
        ge=2,
        description="number of classes, which the data must not exceed; null: read from the data",
    )
    match_classes: Literal["name", "number"] = Field(
        "name",
        description="match held-out classes by name if they have names; number: trust that `train` and "
        "`test` number their classes identically",
    )
    unlabelled: bool = Field(
        False,
        description="accept training images without a label (shards: no .cls; Parquet: null or -1): they learn from "
        "soft targets only, and are never neighbors",
    )
    allow_empty_classes: bool = Field(False, description="accept classes without training images")
    checksums: bool = Field(
        False,
        description="record a CRC-32 of every image when indexing (reads them all; always on for URLs)",
    )
    max_corrupt: float = Field(
        0.001, ge=0, le=1, description="share of corrupt images above which a stage stops"
    )


class ViewsConfig(Section):
    """How an image becomes an array: size, augmentation, normalization."""

    kind: Literal["none", "shift", "crop_flip", "random_resized_crop"] = Field(
        "crop_flip",
        description="augmentation: pad and crop (shift), the same plus flip, or random resized crop plus flip",
    )
    size: int = Field(32, ge=8, description="side of the square image, in pixels")
    pad: int = Field(4, ge=0, description="pixels of padding before the crop (shift, crop_flip)")
    padding: Literal["zero", "reflect"] = Field(
        "zero", description="what the padding holds: zeros, or the image mirrored at its border"
    )
    flip: Literal["random", "alternating"] = Field(
        "random",
        description="random: each view is mirrored with a probability of one half; alternating: every second view of "
        "an image (crop_flip, random_resized_crop)",
    )
    cutout: int = Field(
        0, ge=0, description="side in pixels of a square overwritten with the mean color; 0: none"
    )
    randaugment: int = Field(0, ge=0, description="RandAugment: operations on each view; 0: none")
    magnitude: int = Field(9, ge=0, le=30, description="RandAugment: their strength")
    hook: str = Field(
        "",
        description="another library's transform, applied to each view: timm:CONFIG, as timm's --aa reads it "
        "(timm:rand-m9-mstd0.5-inc1), or MODULE:FUNCTION (docs/recipe.md)",
    )
    scale: tuple[float, float] = Field(
        (0.35, 1.0), strict=False, description="range of the area share of a random resized crop"
    )
    ratio: tuple[float, float] = Field(
        (0.75, 1.3333333333333333),
        strict=False,
        description="range of the aspect ratio of a random resized crop",
    )
    resize: float = Field(
        1.0, ge=1, description="clean view: shorter side resized to size x this, then center crop"
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), strict=False, description="mean of each channel (0..1), subtracted"
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225),
        strict=False,
        description="standard deviation of each channel (0..1), divided by",
    )

    @model_validator(mode="after")
    def _check(self) -> ViewsConfig:
        consistency.check_views(self)
        return self


class StreamConfig(Section):
    """How batches reach a training process."""

    backend: Literal["auto", "ray", "local", "processes"] = Field(
        "auto",
        description="ray: reader actors; local: threads of the training process; processes: its children, "
        "for small images; auto: ray when running under Ray, else local (with views.hook: processes)",
    )
    workers: int = Field(1, ge=1, description="reader actors (or threads, or processes) per rank")
    prefetch: int = Field(4, ge=1, description="requests that each rank keeps in flight")
    decoded_bytes: int = Field(
        0,
        ge=0,
        description="size in bytes of a node's cache of decoded images, next to the manifest (0: none); "
        "for small images; unused with random_resized_crop",
    )
    cache_dir: str = Field(
        "~/.cache/cnn2gnn/shards",
        description="folder for complete copies of remote shards, shared by all processes of a node",
        json_schema_extra=PATH,
    )
    cache_bytes: int = Field(
        20 << 30,
        ge=0,
        description="size limit of that folder in bytes (0: read only the byte ranges of samples, keep nothing)",
    )
    window: int = Field(
        16, ge=1, description="shards shuffled together; bounds random access per epoch"
    )
