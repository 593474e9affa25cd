"""Scenarios through `sluice explain`: what it answers to a probe must be what the probe expects.  Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from proxy.config.settings import Settings
from proxy.demo import plan
from proxy.explain.answer import answer
from proxy.explain.asked import AskedAddress, Client
from proxy.explain.data import outcome_data
from proxy.explain.evidence import Evidence, of_this_node
from proxy.explain.manifests import from_manifests
from proxy.explain.surroundings import Surroundings
from proxy.node import Interfaces
from proxy.sources.manifest_loading import loads
from rules.explanation import Origin, Outcome, Reaches
from rules.forwarding import Address, Backend, Family, ForwardingTable, Protocol, format_address, parse_address
from tests.scenarios.schema import Answered, Case, Manifest, join

INTERFACES: Interfaces = {
    "lo": (parse_address("127.0.0.1"), parse_address("::1")),
    "eth0": tuple(parse_address(address) for address in plan.NODE1.addresses),
}
"""Those of node1."""


def wanted(case: Case, objects: Iterable[Manifest], settings: Settings) -> Evidence:
    """What objects come to on node1, without any kernel."""
    loaded = loads("scenario.json", msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
    return from_manifests(loaded, settings, "node1", _asked(case), interfaces=INTERFACES)


def live(tables: Iterable[ForwardingTable]) -> Evidence:
    """What was read from node1's kernel, and nothing else."""
    node = Surroundings(
        addresses=frozenset(address for addresses in INTERFACES.values() for address in addresses),
        node_ips={Family.IPV4: parse_address(plan.NODE1.ipv4[0]), Family.IPV6: parse_address(plan.NODE1.ipv6[0])},
    )
    return of_this_node({table.family: table for table in tables}, node)


def wrong_answer(case: Case, evidence: Evidence) -> str:
    """How the answer to a probe differs from what the probe expects; empty when it does not."""
    found = answer(_asked(case), client_of(case), evidence).answers[0].explanation
    if isinstance(case.expect, Answered):
        expected: Any = _expected(case.expect)
        told: Any = _told(found.outcome)
        if case.expect.sticky and isinstance(found.outcome, Reaches) and not found.outcome.affinity:
            told = "no affinity"
    else:
        expected = {"refused": "rejected"}.get(case.expect.how, case.expect.how)
        told = type(found.outcome).__name__.lower()
    if expected == told:
        return ""
    steps = "; ".join(step.words for step in found.steps)
    return f"{case}: explained from {evidence.words} as {outcome_data(found.outcome)} ({steps}), expected {expected}"


def client_of(case: Case) -> Client:
    """Who connects, as explain is told; the node itself leaves its address to the kernel."""
    if case.host == "node1":
        return Client(address=parse_address(case.source)) if case.source else Client(origin=Origin.NODE)
    host = plan.HOSTS[case.host]
    own = host.ipv6[0] if ":" in case.target.address else host.ipv4[0]
    interface = host.interface if host.node == "node1" else "eth0"
    return Client(address=parse_address(case.source or own), interface=interface)


def _asked(case: Case) -> AskedAddress:
    target = case.target
    return AskedAddress(parse_address(target.address), target.port, Protocol[target.protocol])


def _expected(expect: Answered) -> dict[str, str]:
    source = expect.source
    return {name: source if isinstance(source, str) else source[name.rpartition(":")[0]] for name in expect.backends}


def _told(outcome: Outcome) -> dict[str, str] | str:
    if not isinstance(outcome, Reaches):
        return type(outcome).__name__.lower()
    return {_name(share.backend): "masqueraded" if share.masqueraded else "kept" for share in outcome.shares}


def _name(backend: Backend) -> str:
    address: Address = backend.address
    host = plan.HOST_OF.get(text := format_address(address))
    return f"{host}:{backend.port}" if host else join(text, backend.port)
