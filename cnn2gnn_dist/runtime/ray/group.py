"""A group of ranks as Ray actors: placed together, started together, restarted together.

A collective cannot replace a lost member, so when one rank dies all are replaced, and the stage
resumes from its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cnn2gnn_dist import log
from cnn2gnn_dist.errors import FolderInUse, PeerFailed, PeerLost, Preempted, UserError, last_line
from cnn2gnn_dist.runtime import preemption
from cnn2gnn_dist.runtime.group import rendezvous
from cnn2gnn_dist.runtime.ranks import Ranks
from cnn2gnn_dist.runtime.ray import errors as ray_errors
from cnn2gnn_dist.runtime.ray import rank_order
from cnn2gnn_dist.runtime.ray import session as ray_session

_log = logging.getLogger(__name__)

READY_SECONDS = 60.0
FEWER_SECONDS = 15.0
"""Seconds to wait for a smaller group's places: they are free, or held by a group that has just ended."""
GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class GroupSpec:
    """Resources that a group of ranks requests from the cluster.

    ``fewer``: world sizes to continue with, largest first, if there is no room for all ranks.
    """

    world_size: int
    cpus_per_rank: float = 1.0
    gpus_per_rank: float = 0.0
    max_failures: int = 3
    grace_s: float = 2.5
    wait_s: float = READY_SECONDS
    strategy: str = "PACK"
    ranks_per_node: int | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    fewer: Sequence[int] = ()

    def bundles(self) -> tuple[list[dict[str, float]], str]:
        """What a placement group reserves, and how: a bundle for each rank, or for the ranks of each node."""
        together = self.ranks_per_node or 1
        if self.world_size % together:
            raise UserError(
                f"{self.world_size} ranks can't be divided into groups of {together}",
                where="cluster.ranks_per_node, run.ranks",
                remedy="a number of ranks that is a multiple of cluster.ranks_per_node",
            )
        rank = {"CPU": self.cpus_per_rank, "GPU": self.gpus_per_rank, **self.resources}
        bundle = {name: together * value for name, value in rank.items() if value}
        strategy = "STRICT_SPREAD" if self.ranks_per_node else self.strategy
        return [bundle or {"CPU": 0.0}] * (self.world_size // together), strategy


def run_group(
    target: str,
    kwargs: dict[str, Any],
    spec: GroupSpec,
) -> list[Any]:
    """Call ``target`` ("module:function") as ``target(ranks=Ranks, **kwargs)`` on every rank.

    Returns the results in rank order. A group that loses a rank is replaced as a whole,
    at most ``spec.max_failures`` times, by a smaller one if there is no longer room (``spec.fewer``). It is also
    started again while, for ``spec.wait_s`` after that, a lost rank still holds the run's folder.

    Raises:
        UserError: a rank raised one (not retried); the cluster has no room; the
            group failed too often.
    """  # noqa: DOC501
    nodes: list[rank_order.Node] = []
    losses, deadline = 0, 0.0
    while True:
        try:
            with ray_session.exit_code_kept():
                wait_s = spec.wait_s if losses else READY_SECONDS
                return _attempt(target, kwargs, spec, nodes, wait_s)
        except LostRank as lost:
            losses, deadline = losses + 1, time.monotonic() + spec.wait_s
            if losses > spec.max_failures:
                raise UserError(
                    f"the group of {spec.world_size} ranks lost a rank {losses} times; last: {lost}",
                    where="cluster.max_failures",
                    remedy="see the log above; the same command resumes from the last checkpoint",
                ) from None
            _log.warning(f"a rank was lost ({lost}); restarting the group from the last checkpoint")
        except FolderInUse as error:
            # A rank whose host is cut off is replaced, but holds the folder until its collectives fail.
            if time.monotonic() > deadline:
                raise
            _log.warning(f"{error.what}, perhaps a lost rank; starting the group again")


class LostRank(Exception):
    """A rank died or stopped answering; the others can't continue without it."""


def _attempt(
    target: str,
    kwargs: dict[str, Any],
    spec: GroupSpec,
    nodes: list[rank_order.Node],
    wait_s: float = READY_SECONDS,
) -> list[Any]:
    """Place, start and await a group; ``nodes``: each rank's node so far, replaced by its current one."""
    spec, group = _reserved(spec, wait_s)
    try:
        # Places are numbered by their bundle; a bundle may have several.
        places = [place // (spec.ranks_per_node or 1) for place in range(spec.world_size)]
        of_bundle = _nodes(group)
        order = rank_order.order([of_bundle[bundle] for bundle in places], nodes)
        nodes[:] = [of_bundle[places[place]] for place in order]
        tag = uuid.uuid4().hex[:6]
        actors = [
            _Rank.options(  # type: ignore[attr-defined]
                name=f"rank-{rank}-{tag}",
                num_cpus=spec.cpus_per_rank,
                num_gpus=spec.gpus_per_rank,
                resources=dict(spec.resources),
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, places[place], placement_group_capture_child_tasks=False
                ),
            ).remote(rank)
            for rank, place in enumerate(order)
        ]
        refs = _launch(actors, target, kwargs, spec, nodes)
        try:
            return _gather(refs)
        except SystemExit:
            _wait_for_saves(actors, refs, spec.grace_s)
            raise
    finally:
        remove_placement_group(group)


def _reserved(spec: GroupSpec, wait_s: float) -> tuple[GroupSpec, PlacementGroup]:
    """Reserve places for the group, or for the largest smaller one for which there is room.

    Raises:
        UserError: there is no room, even after ``wait_s``.
    """
    bundles, strategy = spec.bundles()
    for world_size in (spec.world_size, *spec.fewer):
        fitting = replace(spec, world_size=world_size)
        group = placement_group(fitting.bundles()[0], strategy=strategy)
        try:
            if _placed(group, wait_s if world_size == spec.world_size else FEWER_SECONDS):
                if world_size < spec.world_size:
                    _log.warning(
                        f"there is room for {world_size} of {spec.world_size} ranks: the run continues with "
                        f"{world_size} (cluster.min_ranks){_gone()}"
                    )
                return fitting, group
        except BaseException:
            remove_placement_group(group)
            raise
        remove_placement_group(group)
    raise UserError(
        f"the cluster has no room for {spec.world_size} ranks of {bundles[0]}"
        + f" on {len(bundles)} nodes" * (strategy == "STRICT_SPREAD")
        + f", nor for {min(spec.fewer, default=0)}" * bool(spec.fewer)
        + f"; it has {ray.available_resources()}{_gone()}",
        where="run.ranks",
        remedy="fewer ranks, a lower cluster.cpus_per_rank, or a larger cluster",
    )


def _nodes(group: PlacementGroup) -> dict[int, rank_order.Node]:
    """Address and id of the node of each bundle."""
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    found = placement_group_table(group)["bundles_to_node_id"]
    return {bundle: (addresses.get(node, ""), node) for bundle, node in found.items()}


def _placed(group: Any, wait_s: float) -> bool:
    """Wait for room; after ``READY_SECONDS`` log what is awaited."""
    if group.wait(min(wait_s, READY_SECONDS)):
        return True
    if wait_s <= READY_SECONDS:
        return False
    _log.warning(f"waiting for room, for up to {wait_s:g} s (cluster.wait_s){_gone()}")
    return bool(group.wait(wait_s - READY_SECONDS))


def _gone() -> str:
    """Names of the hosts that this cluster has lost."""
    there = {node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}
    lost = {node["NodeManagerHostname"] for node in ray.nodes()} - there
    return f"; lost: {', '.join(sorted(lost))}" if lost else ""


def _wait_for_saves(actors: list[Any], refs: list[Any], grace_s: float) -> None:
    """This process was asked to stop: give the ranks ``grace_s`` seconds for a last checkpoint."""
    for actor in actors:
        actor.request_stop.remote()
    _log.warning(
        f"asked to stop: the ranks save their step, for up to {grace_s:g} s (cluster.grace_s)"
    )
    done, unanswered = ray.wait(refs, num_returns=len(refs), timeout=grace_s)
    failures = [failure for failure in map(_failure, done) if failure is not None]
    causes = map(ray_errors.cause_of, failures)
    said = {cause.what for cause in causes if isinstance(cause, Preempted)}
    lost = f"no step finished within {grace_s:g} s: progress since the last checkpoint is lost"
    for line in sorted(said) or [lost if unanswered else "no rank was training"]:
        _log.warning(line)


def _launch(
    actors: list[Any],
    target: str,
    kwargs: dict[str, Any],
    spec: GroupSpec,
    places: Sequence[rank_order.Node],
) -> list[Any]:
    nodes = _answers([actor.node.remote() for actor in actors], places)
    address, port = _answers([actors[0].rendezvous.remote()], places)[0]
    refs = []
    for rank, actor in enumerate(actors):
        # Ray shows each actor only its own GPU, which is then number 0 there.
        local = 0 if spec.gpus_per_rank else nodes[:rank].count(nodes[rank])
        ranks = Ranks(rank, local, spec.world_size, address, port)
        local_world_size = nodes.count(nodes[rank])
        refs.append(
            actor.run.remote(
                target, ranks, local_world_size, kwargs, list(sys.path), log.verbosity()
            )
        )
    return refs


def _answers(refs: list[Any], places: Sequence[rank_order.Node]) -> list[Any]:
    """The ranks' answers before they start to work.

    Raises:
        UserError: the package can't be imported on some hosts.
        LostRank: a rank is gone.
    """  # noqa: DOC501
    failures = [_failure(ref) for ref in refs]
    wrong = [(place, failure) for place, failure in zip(places, failures, strict=False) if failure]
    if not wrong:
        return list(ray.get(refs))
    absent = [(place, why) for place, failure in wrong if (why := ray_errors.not_imported(failure))]
    if not absent:
        raise verdict([failure for _, failure in wrong], unanswered=False) from None
    names = {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes()}
    hosts = dict.fromkeys(names.get(node, address) for (address, node), _ in absent)
    raise UserError(
        f"this package can't be imported on {', '.join(hosts)}: {absent[0][1]}",
        where="the environment of the cluster's hosts",
        remedy="install it there at the same path and version, or send it along: cnn2gnn submit --send-package",
    )


def _gather(refs: list[Any]) -> list[Any]:
    """Results of all ranks.

    Raises:
        UserError: a rank reports a mistake of the user's.
        LostRank: a rank died, or hangs while the others failed.
        RayTaskError: a rank raised something else: a bug, not worth a retry.
    """  # noqa: DOC501
    pending = list(refs)
    while pending:
        done, pending = ray.wait(pending, num_returns=1)
        failure = _failure(done[0])
        if failure is not None:
            break
    else:
        return ray.get(refs)
    # The first failure is often only a consequence of another rank's: look at all of them.
    done, unanswered = (
        ray.wait(pending, num_returns=len(pending), timeout=GRACE_SECONDS) if pending else ([], [])
    )
    failures = [failure, *(f for f in map(_failure, done) if f is not None)]
    raise verdict(failures, unanswered=bool(unanswered)) from None


def verdict(failures: list[RayError], unanswered: bool) -> Exception:
    """What a group has ended with: a user's mistake, a lost rank, or a bug (see ``_gather``)."""
    causes = [ray_errors.cause_of(one) for one in failures]
    lost = [
        ray_errors.why_lost(one)
        for one, cause in zip(failures, causes, strict=True)
        if cause is None
    ]
    for cause in causes:
        if isinstance(cause, UserError) and not isinstance(cause, PeerLost | PeerFailed):
            return cause
    if lost:
        return LostRank(lost[0])
    if told := [cause for cause in causes if isinstance(cause, PeerFailed)]:
        pairs = zip(failures, causes, strict=True)
        bugs = [one for one, cause in pairs if not isinstance(cause, UserError | None)]
        return min(bugs, key=_is_consequence) if bugs else told[0]
    if silent := [cause.what for cause in causes if isinstance(cause, PeerLost)]:
        return LostRank(silent[0])
    if unanswered:
        return LostRank(f"no answer; another rank failed with {last_line(failures[0])}")
    return min(failures, key=_is_consequence)


def _failure(reference: Any) -> RayError | None:
    try:
        ray.get(reference)
    except RayError as error:
        return error
    return None


def _is_consequence(error: RayError) -> bool:
    """Whether an error looks like the consequence of a lost peer rather than its cause."""
    text = str(error)
    return "Connection" in text or "gloo" in text or "NCCL" in text


@ray.remote(max_restarts=0, concurrency_groups={"notices": 1})  # type: ignore[call-overload]
class _Rank:
    """One rank of a group; a request to stop reaches it while it works."""

    def __init__(self, index: int) -> None:
        self._index = index

    def __repr__(self) -> str:
        # Ray puts this before the rank's lines in the driver's log.
        return f"rank {self._index}"

    def rendezvous(self) -> tuple[str, int]:
        address = ray.util.get_node_ip_address()
        return address, rendezvous.reserve(address)

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    @ray.method(concurrency_group="notices")
    def request_stop(self) -> None:
        preemption.request_stop()

    def run(
        self,
        target: str,
        ranks: Ranks,
        local_world_size: int,
        kwargs: dict[str, Any],
        path: list[str],
        verbosity: int,
    ) -> Any:
        """Call the target; ``local_world_size`` is the number of ranks on this node."""
        sys.path.extend(entry for entry in path if entry not in sys.path)
        os.environ.update(ranks.environment(), LOCAL_WORLD_SIZE=str(local_world_size))
        os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # set by a launcher around the cluster
        module, _, function = target.partition(":")
        with log.console(verbosity, ranks.rank):
            return getattr(import_module(module), function)(ranks=ranks, **kwargs)
