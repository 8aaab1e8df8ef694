"""What all hosts of a run must see identically: its folder, before anything begins; shards; each stage's files."""

from __future__ import annotations

import contextlib
import json
import logging
import re
from functools import partial
from pathlib import Path

from cnn2gnn_dist import ledger
from cnn2gnn_dist.config import Config
from cnn2gnn_dist.data.storage.urls import is_remote
from cnn2gnn_dist.errors import UserError
from cnn2gnn_dist.graph import version
from cnn2gnn_dist.pipeline.planning import Step
from cnn2gnn_dist.pipeline.registry import Stage
from cnn2gnn_dist.runtime.group import collectives, exchange, members
from cnn2gnn_dist.runtime.hosts import host_checks
from cnn2gnn_dist.runtime.shared_files import handover, host_folders, shared_folder
from cnn2gnn_dist.stages.shared.context import RunPaths, load_manifest
from cnn2gnn_dist.training.precision import has_bfloat16

_log = logging.getLogger(__name__)

COMPARED = {".json", ".arrow"}
"""Suffixes of the files for which a reading host has no other check that it reads the right contents."""


def check_hosts(config: Config, device: str) -> None:
    """Check every host of a group before anything is locked or trained (collective).

    Finds out whether hosts share the run's folder (``host_folders``).

    Raises:
        UserError: one has too little room, or sees another folder than the others, without a storage through
            which they could exchange files; on every rank.
    """  # noqa: DOC501
    if collectives.world_size() == 1:
        return
    cache = _cache(config)
    shares = device == "cuda" or config.graph.sampling.sampler == "distdgl"
    root = Path(str(config.run.dir))

    data = [*_local(config.data.train), *_local(config.data.test)]
    reads = (
        collectives.rank() == 0 or config.data.source == "shards"
    )  # other sources are read from packed shards

    def look() -> None:
        own = [cache] if cache else []
        host_checks.check_answers([root, *own, *(data if reads else [])])
        host_checks.check_rank(cache, shares)

    exchange.every_rank(look)
    storage = config.run.storage
    try:
        separate = shared_folder.check(root, may_be_separate=storage is not None)
    except UserError as error:
        if storage is not None:
            raise
        also = "or, on disks of the hosts' own, run.storage=s3://BUCKET/FOLDER"
        raise _shared(error.what, error.where, f"{error.remedy}; {also}") from None
    host_folders.begin(separate)
    if separate:
        _check_separate(config)
    if separate and collectives.rank() == 0:
        _log.info(
            f"each host has a run.dir of its own: what one writes reaches the others through {storage}"
        )


def _check_separate(config: Config) -> None:
    """Check that nothing needs a folder that all hosts share."""
    remedy = "or a run.dir that all hosts share: each host has one of its own"
    if config.graph.sampling.sampler == "distdgl":
        what = "DGL's servers read what other hosts have written"
        where = "graph.sampling.sampler=distdgl"
        raise _shared(what, where, f"graph.sampling.sampler=table, {remedy}")
    if config.cluster.reader_resources:
        what = "readers on hosts without a rank have nothing to read"
        raise _shared(what, "cluster.reader_resources", f"leave it out, {remedy}")


def _shared(what: str, where: str, remedy: str) -> UserError:
    """An error that every rank raises, and rank 0 reports."""
    error = UserError(what, where=where, remedy=remedy)
    error.shared = True
    return error


def _names(given: str | list[str] | None) -> list[str]:
    return [given] if isinstance(given, str) else given or []


def _local(given: str | list[str] | None) -> list[Path]:
    """The local images or shards that a field names; of each name the part before any wildcard."""
    return [Path(re.split(r"[*?\[{]", n)[0] or ".") for n in _names(given) if not is_remote(n)]


def _cache(config: Config) -> Path | None:
    """This host's folder for copies of remote shards; None if the run keeps none."""
    data, stream = config.data, config.stream
    remote = any(map(is_remote, [*_names(data.train), *_names(data.test)]))
    kept = data.source == "shards" and remote and stream.cache_bytes
    return Path(stream.cache_dir).expanduser() if kept else None


def bfloat16_everywhere(config: Config, device: str) -> bool:
    """Whether all ranks' devices have bfloat16, with a warning if only some do (collective).

    A group partly in bfloat16 would give the results of neither precision, at the speed of the slower ranks.
    """
    have = collectives.all_gather_object(has_bfloat16(device))
    if any(have) and not all(have) and config.precision == "auto" and collectives.rank() == 0:
        lacking = ", ".join(members.name_of(rank) for rank, has in enumerate(have) if not has)
        _log.warning(
            f"{lacking} without bfloat16 instructions: all ranks compute in float32 "
            "(precision=bfloat16 emulates it there)"
        )
    return all(have)


def ends_here(stage: Stage, stages: list[Stage]) -> bool:
    """Whether no stage in which all ranks work builds on this one's files."""
    return all(stage.name not in later.needs or later.alone for later in stages)


def hand_over(folder: Path, step: Step) -> None:
    """Wait until all hosts see the files of a complete stage (collective).

    Files with their own checksums (weights, targets) are compared by size only.
    """

    def files() -> dict[str, handover.Written]:
        assert step.entry is not None
        names = [name for name, _ in step.entry.outputs] + [ledger.DONE]
        if ledger.held(folder):  # they are in the run's storage, and not needed here
            names = [name for name in names if (folder / name).is_file()]
        return handover.described(folder, {n: Path(n).suffix in COMPARED for n in names})

    handover.hand_over(folder, files)


def bring_inputs(root: Path, folders: list[str], brought: set[str]) -> None:
    """Give hosts with folders of their own what a stage builds on, as far as rank 0 has it (collective).

    Args:
        root: the run's folder.
        folders: of the complete stages that it builds on.
        brought: digests of what this process has brought before; added to.

    Raises:
        UserError: the storage fails, or a disk is full.
    """
    if not host_folders.are_separate():
        return
    for name in folders:
        folder = root / name

        def here(folder: Path = folder) -> tuple[str, list[str]]:
            entry = ledger.finished(folder)
            names = [*(name for name, _ in entry.outputs), ledger.DONE] if entry else []
            there = [name for name in names if (folder / name).is_file()]
            about = {"key": entry.key, "digest": entry.digest} if entry else {}
            return ledger.digest_of(folder.name, {**about, "files": there}), there

        digest, names = collectives.alone(here)
        if digest not in brought:
            handover.hand_over(folder, partial(as_written, folder, names))
            brought.add(digest)


def as_written(folder: Path, names: list[str]) -> dict[str, handover.Written]:
    """Describe files of a complete stage.

    A checkpoint's or a graph's as they were written, by its manifest: one that has been damaged on this disk since
    must not replace another host's. The others as this rank reads them.
    """
    found: dict[str, handover.Written] = {}
    for name in names:
        if Path(name).name == version.MANIFEST:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                listed = json.loads((folder / name).read_text(encoding="utf-8"))["files"]
                for file, (size, sha) in listed.items():
                    found[str(Path(name).parent / file)] = handover.Written(int(size), str(sha))
    others = dict.fromkeys([name for name in names if name not in found], True)
    written = handover.described(folder, others)
    return {name: written[name] if name in written else found[name] for name in names}


def check_shards(paths: RunPaths) -> None:
    """Check that every host sees all shards, before any of them is needed (collective).

    Packed ones that hosts have to exchange are left out: they are compared when a stage needs them.

    Raises:
        UserError: a host misses one, even after waiting a while for newly packed ones.
    """
    if not members.on_several_hosts():
        return
    rank = collectives.rank()

    def look() -> None:
        for path in (paths.train_manifest, paths.test_manifest):
            manifest = load_manifest(path)
            near = (Path(s.path).parent for s in manifest.shards if not is_remote(s.path))
            host_checks.check_answers(dict.fromkeys(near))
            packed = any(Path(shard.path).is_relative_to(paths.root) for shard in manifest.shards)
            if packed and host_folders.are_separate():
                continue
            handover.patiently(manifest.check_shards, handover.WAIT_S if packed else 0.0)

    exchange.every_rank(lambda: look() if members.speaks_for_host(rank) else None)
