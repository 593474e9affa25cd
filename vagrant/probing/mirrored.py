"""The other node in node1's part: names and addresses of the two nodes and of their pods change places.

Scenarios are written for an agent on node1.  With this, the same files are run against the agent of node2: objects and
probes are turned round on their way to the machines, and outcomes on their way back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from proxy.demo import plan
from proxy.demo.probes import Outcome, Probe, Server
from vagrant.probing.machines import LabProbes


def _swaps() -> dict[str, str]:
    pairs = [(one.name, other.name) for one, other in zip(plan.PODS1, plan.PODS2, strict=True)]
    pairs += [
        (mine, theirs)
        for one, other in [(plan.NODE1, plan.NODE2), *zip(plan.PODS1, plan.PODS2, strict=True)]
        for mine, theirs in zip(one.addresses, other.addresses, strict=False)
    ]
    pairs += list(zip(plan.POD_CIDRS["node1"], plan.POD_CIDRS["node2"], strict=True))
    pairs.append(("node1", "node2"))
    return dict(pairs) | {theirs: mine for mine, theirs in pairs}


SWAPS = _swaps()
NODE1_ALONE = frozenset(plan.NODE1.addresses) - SWAPS.keys()
"""Addresses of node1 that have no counterpart on node2."""


def turned(text: str) -> str:
    """A name, an address or a network of one node as that of the other; all else as it is."""
    return SWAPS.get(text, text)


def turned_round(value: Any) -> Any:
    """Objects with all names and addresses turned."""
    if isinstance(value, str):
        return turned(value)
    if isinstance(value, dict):
        return {key: turned_round(each) for key, each in value.items()}
    if isinstance(value, list):
        return [turned_round(each) for each in value]
    return value


class MirroredProbes:
    """`LabProbes` with the two nodes in each other's place."""

    def __init__(self, probes: LabProbes) -> None:
        self._probes = probes

    def open(self, servers: Iterable[Server]) -> None:
        self._probes.open(each._replace(host=turned(each.host), address=turned(each.address)) for each in servers)

    def shut(self) -> None:
        self._probes.shut()

    def probe(self, *probes: Probe) -> list[list[Outcome]]:
        return [[_back(each) for each in some] for some in self._probes.probe(*map(_there, probes))]

    def sctp(self, probes: list[Probe]) -> list[list[Outcome]]:
        return [[_back(each) for each in some] for some in self._probes.sctp([_there(each) for each in probes])]


def _there(probe: Probe) -> Probe:
    fields = {name: turned(getattr(probe, name)) for name in ("host", "address", "source")}
    return msgspec.structs.replace(probe, **fields)


def _back(outcome: Outcome) -> Outcome:
    fields: dict[str, Any] = {name: turned(getattr(outcome, name)) for name in ("host", "address", "sender")}
    for name in ("peer", "local"):
        address, port = getattr(outcome, name)
        fields[name] = (turned(address), port)
    return msgspec.structs.replace(outcome, **fields)
