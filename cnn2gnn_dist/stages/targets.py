"""Stage ``targets``: the teacher's soft targets of every training image, one Parquet file per shard."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnn2gnn_dist import log
from cnn2gnn_dist.data import soft_targets as soft
from cnn2gnn_dist.data.images.views import CLEAN
from cnn2gnn_dist.data.index.manifest import Manifest
from cnn2gnn_dist.data.reading.pool import ReaderPool
from cnn2gnn_dist.data.reading.reader import Request
from cnn2gnn_dist.runtime.group import collectives, exchange, members
from cnn2gnn_dist.runtime.shared_files import handover, host_folders
from cnn2gnn_dist.stages.shared.context import Context, CorruptCount, chunks, load_manifest
from cnn2gnn_dist.stages.shared.networks import Teacher, final_checkpoint, load_model
from cnn2gnn_dist.stages.shared.predictions import check_held_out
from cnn2gnn_dist.stages.shared.ready_logits import read_logits
from cnn2gnn_dist.training import ds_config
from cnn2gnn_dist.training.checkpoint.manager import Checkpoints
from cnn2gnn_dist.training.engine import Engine


def view_numbers(views: int) -> list[int]:
    """The views that get soft targets: 0..V-1, or only the clean image for V = 0."""
    return list(range(views)) if views else [CLEAN]


def shard_file(folder: Path, manifest: Manifest, shard: int) -> Path:
    """Path of one shard's soft targets (its number distinguishes equal names in two folders)."""
    return folder / f"{shard:06d}-{Path(manifest.shards[shard].path).stem}.parquet"


def run(context: Context, teacher_key: str) -> list[Path]:
    """Write the missing files; return all files. Shards are assigned to ranks round-robin.

    With ZeRO-3 a forward pass is collective: ranks that are done keep running along until all are.
    Otherwise shards of unequal size, or one extra shard on a rank, may keep the others waiting.

    Raises:
        UserError: more corrupt images than ``data.max_corrupt``, on every rank.
    """
    config = context.config
    manifest = load_manifest(context.paths.train_manifest)
    meta = {"key": context.key}
    shards = [s for s, size in enumerate(manifest.shard_sizes) if size]
    files = {s: shard_file(context.folder, manifest, s) for s in shards}
    fit = _fitting(context, files, meta)
    known = {s for one in fit for s in one}
    missing = [s for s in shards if s not in known]
    complete = [files[s] for s in fit[context.ranks.rank]]
    if len(missing) < len(shards):
        context.say(f"{len(shards) - len(missing)} of {len(shards)} shards are complete")
    if config.targets.logits is not None:
        check_held_out(context)  # otherwise the teacher's stage has
        collectives.alone(lambda: _write_ready(context, manifest, missing, files, meta))
        written = [files[s] for s in missing] if context.ranks.is_first else []
        _hand_over(context, written, complete)
        return list(files.values())
    if not missing:
        _hand_over(context, [], complete)
        _count_corrupt(context, manifest, files)
        return list(files.values())
    classify, collective = _classifier(context, manifest.num_classes, teacher_key)
    world_size = context.ranks.world_size
    shares = [missing[rank::world_size] for rank in range(world_size)]
    # Computed beforehand: asking the others would be a collective between their forward passes.
    most = max(sum(len(_plan(context, manifest, s)) for s in share) for share in shares)
    mine, forwards = shares[context.ranks.rank], 0
    with (
        collectives.uneven(),
        context.stream(context.paths.train_manifest, "targets") as stream,
    ):
        for shard in log.progress(
            mine, "targets", unit="shard", disable=not context.ranks.is_first
        ):
            forwards += _write(context, classify, stream, manifest, shard, files[shard], meta)
        if collective:
            size = config.views.size
            idle = torch.zeros(1, size, size, 3, dtype=torch.uint8, device=context.device)
            for _ in range(most - forwards):
                classify(idle)
    _hand_over(context, [files[s] for s in mine], complete)
    _count_corrupt(context, manifest, files)
    return list(files.values())


def _precision(context: Context) -> str:
    """What the teacher computes in here; with ``precision=auto`` the stage's key does not tell."""
    return str(context.compute_dtype("teacher")).removeprefix("torch.")


def _fitting(context: Context, files: dict[int, Path], meta: dict[str, Any]) -> list[list[int]]:
    """The shards that each rank has complete files of, in the precision of this device (collective)."""
    precision = None if context.config.targets.logits is not None else _precision(context)

    def look() -> dict[int, str | None]:
        here = files if host_folders.acts(context.ranks.rank) else {}
        whole = (s for s, path in here.items() if soft.is_complete(path, meta))
        return {s: soft.precision_of(files[s]) for s in whole}

    found = exchange.every_rank(look)
    fit = [[s for s, made in one.items() if made in (None, precision)] for one in found]
    known = {s for one in fit for s in one}
    other = {s: str(made) for one in found for s, made in one.items() if s not in known}
    if other:
        context.warn(
            f"the targets of {len(other)} shards were computed in {', '.join(sorted(set(other.values())))}, "
            f"and this device computes in {precision}: they are computed again, so that all have one precision"
        )
    return fit


def _hand_over(context: Context, mine: list[Path], complete: list[Path]) -> None:
    """Wait until all hosts see the files that each rank has written, and earlier ones (collective).

    ``complete``: the earlier ones in this rank's folder, if it acts for that.
    """
    if not members.on_several_hosts():
        return
    sums = host_folders.are_separate()
    own = handover.described(context.folder, {path.name: sums for path in [*mine, *complete]})
    everyone = collectives.all_gather_object(own)
    together = {name: what for part in everyone for name, what in part.items()}
    handover.hand_over(context.folder, lambda: together)


def _write_ready(
    context: Context,
    manifest: Manifest,
    shards: list[int],
    files: dict[int, Path],
    meta: dict[str, Any],
) -> None:
    """Write the files of these shards from ``targets.logits``."""
    path = context.config.targets.logits
    if not shards or path is None:
        return
    log_NC = read_logits(Path(path), manifest)
    for shard in shards:
        first = int(np.searchsorted(manifest.shard_N, shard))
        ids = np.arange(first, first + int(manifest.shard_sizes[shard]))
        indices, log_probs = _top(
            torch.from_numpy(log_NC[first : first + len(ids)]), context.config.targets.top_k
        )
        soft.write_shard(
            files[shard],
            ids=ids,
            view_count=1,
            indices=indices[None],
            log_probs=log_probs[None],
            meta=meta,
        )


def _top(log_BC: Tensor, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The classes [B, K] that are kept, most likely first, and their log-probabilities in float16."""
    top, classes = log_BC.topk(min(top_k or log_BC.shape[1], log_BC.shape[1]), dim=1)
    return classes.cpu().numpy().astype(np.int32), top.cpu().numpy().astype(np.float16)


def _count_corrupt(context: Context, manifest: Manifest, files: dict[int, Path]) -> None:
    """Count all files' corrupt images, including those of an earlier attempt (collective)."""
    mine = list(files.values())[context.ranks.rank :: context.ranks.world_size]
    limit = context.config.data.max_corrupt
    corrupt = CorruptCount(limit, len(manifest), what="training images")
    for path in mine:
        corrupt.seen.update(soft.corrupt_samples(path))
    found = corrupt.check()
    if not found:
        return
    some = "; ".join(sorted(found.values())[:3])
    context.warn(f"{len(found)} corrupt images have uniform targets: {some}")
    labels = np.asarray(manifest.label_N)
    lost = np.setdiff1d(labels, np.delete(labels, list(found)))
    lost = lost[lost >= 0]
    if len(lost):
        names = ", ".join(f"'{manifest.classes[label]}'" for label in lost[:5])
        context.warn(
            f"{len(lost)} classes without a training image that can be read, so they can't be "
            f"learned: {names}"
        )


def _classifier(
    context: Context, num_classes: int, teacher_key: str
) -> tuple[Callable[[Tensor], Tensor], bool]:
    """The trained teacher, and whether its forward pass is collective (ZeRO-3)."""
    config, settings = context.config, context.config.teacher
    model = Teacher(config, num_classes, initial=False)
    model.compute_dtype = context.compute_dtype("teacher")
    # Batch sizes that the file fixes are those of training.
    source = context.deepspeed_of("teacher") | dict.fromkeys(ds_config.BATCHES, "auto")
    world_size = context.ranks.world_size
    resolved = ds_config.resolve(
        source,
        world_size=world_size,
        global_batch=world_size,
        accumulation=1,
        lr=settings.lr,
        weight_decay=0.0,
        clip=0.0,
        device=context.device,
        stage=settings.zero_stage,
        precision=config.precision,
    )
    if resolved["zero_optimization"]["stage"] == 3 and world_size > 1:
        engine = Engine(model, resolved, device=context.device)
        last = final_checkpoint(context.paths.root, "teacher")
        Checkpoints(last.parent, teacher_key).load(engine, only=last, force=True, answering=True)
        engine.eval()
        return torch.no_grad()(engine), True
    load_model(model, context.paths.root, "teacher")
    model.to(context.device).eval()
    return torch.no_grad()(model), False


def _plan(context: Context, manifest: Manifest, shard: int) -> list[Request]:
    """One request per forward pass: all views of a shard's images."""
    settings = context.config.targets
    first = int(np.searchsorted(manifest.shard_N, shard))
    ids = np.arange(first, first + int(manifest.shard_sizes[shard]))
    return [
        Request(ids[rows.start : rows.stop], number)
        for number in view_numbers(settings.views)
        for rows in chunks(len(ids), settings.batch)
    ]


def _write(
    context: Context,
    classify: Callable[[Tensor], Tensor],
    stream: ReaderPool,
    manifest: Manifest,
    shard: int,
    path: Path,
    meta: dict[str, Any],
) -> int:
    """Write one shard's file; return the number of forward passes."""
    settings = context.config.targets
    first = int(np.searchsorted(manifest.shard_N, shard))
    ids = np.arange(first, first + int(manifest.shard_sizes[shard]))
    numbers = view_numbers(settings.views)
    plan = _plan(context, manifest, shard)
    indices, log_probs = [], []
    corrupt = CorruptCount(limit=1.0, total=len(ids))
    for batch in stream.batches(plan):
        corrupt.note(batch)
        images, _, valid_B = context.to_device(batch)
        log_BC = classify(images).float().log_softmax(1)
        # Nothing can be learned from the teacher's output for a black image.
        log_BC = log_BC.where(valid_B[:, None] > 0, -math.log(log_BC.shape[1]))
        classes, top = _top(log_BC, settings.top_k)
        indices.append(classes)
        log_probs.append(top)
    shape = (len(numbers), len(ids), -1)
    soft.write_shard(
        path,
        ids=ids,
        view_count=len(numbers),
        indices=np.concatenate(indices).reshape(shape),
        log_probs=np.concatenate(log_probs).reshape(shape),
        meta=meta,
        corrupt=corrupt.seen,
        precision=_precision(context),
    )
    return len(plan)
