"""An actor on every node of a Ray cluster, for questions that each node must answer itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cnn2gnn_dist.errors import last_line
from cnn2gnn_dist.runtime.hosts import node_survey
from cnn2gnn_dist.runtime.hosts.node_survey import Node, Peer

ANSWER_SECONDS = 120.0
"""Seconds for a node to start the actor, which imports this package, and to answer."""


@ray.remote(num_cpus=0, max_restarts=0)
class _Answering:
    """One node's answers; ``address``: of the node, as the cluster knows it."""

    def __init__(self, address: str) -> None:
        self._address = address

    def look(self, folder: str | None) -> None:
        self.node = node_survey.look(self._address, folder)

    def write_probe(self, folder: str) -> str:
        path, self.node.shared = node_survey.write_probe(folder)
        return path

    def find_probe(self, path: str) -> None:
        self.node.shared = node_survey.find_probe(path)

    def serve(self, token: str) -> tuple[str, int]:
        self.peer = Peer(self.node.address, token)
        return self.node.address, self.peer.port

    def measure(self, token: str, first: tuple[str, int], following: tuple[str, int]) -> Node:
        node_survey.measure(self.node, token, first, following)
        return self.node


class Asked:
    """Actors on all nodes, by address and id of the node; those that don't answer are dropped.

    Attributes:
        failed: by address, why a node gave no answer.
    """

    def __init__(self) -> None:
        own = ray.get_runtime_context().get_node_id()
        known = sorted(ray.nodes(), key=lambda one: one["NodeID"] != own)
        self.actors: dict[tuple[str, str], Any] = {}
        self.failed: dict[str, str] = {}
        for one in known:
            address, number = one["NodeManagerAddress"], one["NodeID"]
            if not one["Alive"]:
                self.failed[address] = "it is dead"
                continue
            here = NodeAffinitySchedulingStrategy(number, soft=False)
            actor: Any = _Answering
            options = {"name": f"doctor-{address}-{number[:6]}", "scheduling_strategy": here}
            self.actors[address, number] = actor.options(**options).remote(address)
            self.failed.pop(address, None)  # it has come back under another id

    def ask(self, call: str, *arguments: Any) -> list[Any]:
        """The answers, in the order of ``actors``."""
        asked = {one: getattr(a, call).remote(*arguments) for one, a in self.actors.items()}
        return self.answers(asked)

    def answers(self, asked: dict[tuple[str, str], Any]) -> list[Any]:
        """Wait for answers; actors that give none are dropped."""
        done, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=ANSWER_SECONDS)
        said = []
        for one, reference in asked.items():
            try:
                if reference not in done:
                    raise TimeoutError(f"no answer within {ANSWER_SECONDS:g} s")
                said.append(ray.get(reference))
            except (RayError, OSError) as error:
                self.failed[one[0]] = last_line(error)
                del self.actors[one]
        return said


def survey(folder: str | None, token: str) -> tuple[list[Node], dict[str, str]]:
    """Ask every node of the cluster that this process has joined, its own node first.

    Args:
        folder: one that all nodes should share; None: not checked.
        token: required by the nodes' servers from each other.

    Returns:
        The nodes that answered; and by address why others did not.
    """
    nodes = Asked()
    nodes.ask("look", folder)
    if folder and nodes.actors:
        first = next(iter(nodes.actors.values()))
        if path := ray.get(first.write_probe.remote(folder)):
            nodes.ask("find_probe", path)
            Path(path).unlink(missing_ok=True)
    places = nodes.ask("serve", token)
    asked = {
        one: actor.measure.remote(token, places[0], after)
        for (one, actor), after in zip(nodes.actors.items(), places[1:] + places[:1], strict=True)
    }
    return nodes.answers(asked), nodes.failed
