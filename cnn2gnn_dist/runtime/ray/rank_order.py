"""Which rank gets which place of a group: consecutive ranks on the same node, and where they were before."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Node = tuple[str, str]
"""Address of a node, and its id, which differs between two nodes with the same address."""


def order(places: Sequence[Node], before: Sequence[Node] | None = None) -> list[int]:
    """Return the place of each rank, an index into ``places``.

    Ranks of one node are consecutive, nodes in the order of their addresses, so that the same nodes give
    the same order in every process. A rank stays on its node of ``before`` if that still has a place: its
    partitions are in that host's page cache.

    Args:
        places: the node of each place.
        before: the node of each rank in an earlier group; None or of another length: there was none.
    """
    free = sorted(range(len(places)), key=lambda place: (_key(places[place]), place))
    if before is None or len(before) != len(places):
        return free
    found: list[int | None] = []
    for node in before:
        place = next((place for place in free if places[place] == node), None)
        if place is not None:
            free.remove(place)
        found.append(place)
    rest = iter(free)
    return [next(rest) if place is None else place for place in found]


def _key(node: Node) -> tuple[int, int, str, str]:
    address, number = node
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return (0, 0, address, number)
    return (found.version, int(found), address, number)
