"""The same objects through `proxy.compute` and through kube-proxy 1.36.2 in nftables mode, as its rules were recorded.

The reader of kube-proxy's rules below goes by NFT-5 to NFT-12 and shares nothing with what it checks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ryaml

from proxy.assemble import Assembler, precedence_of
from proxy.compute import compute
from proxy.config.settings import Settings
from proxy.node import node_facts, view_of
from proxy.objects import EndpointSlice, Node, Service, ServiceCIDR, convert
from proxy.sources.base import Resource
from proxy.state import State
from rules.forwarding import (
    Backend,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    Prefix,
    Protocol,
    Refusal,
    SourcePrefix,
    parse_address,
)
from tests.builders import networks

RECORDING = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
SETTINGS = Settings(
    mode="nftables", cluster_cidrs=networks("10.244.0.0/16", "fd00:244::/32"), bind_address="192.168.50.11"
)
INTERFACES = {"eth0": [parse_address("192.168.50.11"), parse_address("fd00:50::11")]}
OF_THE_API_SERVER = parse_address("10.96.0.1")
"""The Service default/kubernetes, which the API server made by itself and objects.yaml doesn't have."""


class Seen(NamedTuple):
    """A route as far as kube-proxy's rules show it."""

    backends: frozenset[Backend]
    local_backends: frozenset[Backend] | None
    refusal: Refusal | None
    affinity: int
    source_ranges: tuple[Prefix, ...]


def computed(family: Family) -> ForwardingTable:
    """Everything from the YAML to the table, as the agent does it."""
    state = State("node1")
    kinds = {kind.KIND: kind for kind in (Service, EndpointSlice, Node)}
    text = (RECORDING / "objects.yaml").read_text()
    items: list[Any] = ryaml.loads(text)["items"]  # type: ignore[attr-defined]  # exported, its stub doesn't say so
    objects = [convert(kinds[item["kind"]], item) for item in items]
    state.replace(Resource.NODES, [each for each in objects if isinstance(each, Node)])
    state.replace(Resource.SERVICES, [each for each in objects if isinstance(each, Service)])
    state.replace(Resource.SLICES, [each for each in objects if isinstance(each, EndpointSlice)])
    cidrs = convert(ServiceCIDR, {"spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/112"]}})
    view = view_of(SETTINGS, "node1", state.node, INTERFACES)
    assembler = Assembler(family)
    assembler.set_node(node_facts(SETTINGS, state.node, INTERFACES, [cidrs])[family])
    for key in state.take_changes().services:
        service = state.services[key]
        outcome = compute(service, state.slices_of(key), view, family)
        assert outcome.problems == ()
        assembler.update(key, precedence_of(service.metadata), outcome)
    return assembler.table()


class Recorded:
    """One of kube-proxy's tables, from the text of `nft list ruleset`."""

    def __init__(self, family: Family) -> None:
        text = (RECORDING / "nftables.nft").read_text()
        tables = re.findall(r"^table (ip6?) kube-proxy \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
        body = dict(tables)["ip" if family is Family.IPV4 else "ip6"]
        blocks = re.findall(r"^\t(?:set|map|chain) (\S+) \{\n(.*?)^\t\}", body, re.MULTILINE | re.DOTALL)
        self._blocks: dict[str, str] = dict(blocks)

    def elements(self, name: str) -> list[tuple[list[str], str]]:
        """Keys and verdicts of a set or a map."""
        found = re.search(r"elements = \{(.*?)\}", self._blocks[name], re.DOTALL)
        if found is None:
            return []
        elements = [re.sub(r' comment "[^"]*"', "", each).strip() for each in found[1].split(",")]
        pairs = [each.partition(" : ") for each in elements]
        return [(key.split(" . "), verdict) for key, _, verdict in pairs]

    def _backends(self, chain: str) -> frozenset[Backend]:
        block = self._blocks.get(chain, "")
        if "goto endpoint-" in block:
            targets = re.findall(r"goto (endpoint-\S+?),? ", block)
            block = "".join(self._blocks[target] for target in targets)
            pairs = re.findall(r"dnat to (\S+):(\d+)", block)
        else:
            pairs = re.findall(r"\d+ : (\S+) \. (\d+)", block)
        return frozenset(Backend(parse_address(host), int(port)) for host, port in pairs)

    def _affinity(self, chain: str) -> int:
        found = re.search(r"@(affinity-\S+)", self._blocks.get(chain, ""))
        minutes = re.search(r"timeout (\d+)m", self._blocks[found[1]]) if found else None
        return 60 * int(minutes[1]) if minutes else 0

    def routes(self) -> dict[Frontend, Seen]:
        verdicts: dict[Frontend, list[str]] = {}
        for name in ("service-ips", "no-endpoint-services", "service-nodeports", "no-endpoint-nodeports"):
            for key, verdict in self.elements(name):
                address = parse_address(key[0]) if len(key) == 3 else b""
                frontend = Frontend(address, Protocol[key[-2].upper()], int(key[-1]))
                verdicts.setdefault(frontend, []).append(verdict)
        firewalls = {parse_address(key[0]): verdict.split()[-1] for key, verdict in self.elements("firewall-ips")}
        routes = {}
        for frontend, found in verdicts.items():
            refusal = Refusal.DROP if "drop" in found else Refusal.REJECT if "goto reject-chain" in found else None
            chain = next(
                (each.split()[-1] for each in found if not each.startswith("goto reject") and each != "drop"), ""
            )
            base = chain.partition("-")[2]
            backends, local = self._backends(chain), None
            if chain.startswith("external-"):
                backends = self._backends(f"service-{base}")
                if "short-circuit" in self._blocks[chain]:
                    local = self._backends(f"local-{base}")
            ranges = re.search(r"saddr != \{(.*?)\}", self._blocks.get(firewalls.get(frontend.address, ""), ""))
            texts = [each.strip() for each in ranges[1].split(",")] if ranges else []
            routes[frontend] = Seen(
                backends, local, refusal, self._affinity(f"service-{base}"), tuple(sorted(networks(*texts)))
            )
        return routes

    def hairpins(self) -> frozenset[Endpoint]:
        return frozenset(
            Endpoint(parse_address(key[0]), Protocol[key[2].upper()], int(key[3]))
            for key, _ in self.elements("hairpin-connections")
        )


@pytest.mark.parametrize("family", Family)
def test_routes_are_those_of_kube_proxy(family: Family) -> None:
    ours = {
        frontend: Seen(route.backends, route.local_backends, route.refusal, route.affinity, route.source_ranges)
        for frontend, route in computed(family).routes.items()
    }
    theirs = {
        frontend: seen for frontend, seen in Recorded(family).routes().items() if frontend.address != OF_THE_API_SERVER
    }
    assert len(theirs) == (22 if family is Family.IPV4 else 3)
    assert ours == theirs


@pytest.mark.parametrize("family", Family)
def test_hairpins_are_those_of_kube_proxy(family: Family) -> None:
    assert computed(family).hairpins == Recorded(family).hairpins()


@pytest.mark.parametrize(
    ("family", "pods", "services"),
    [(Family.IPV4, "10.244.0.0/16", "10.96.0.0/16"), (Family.IPV6, "fd00:244::/32", "fd00:10:96::/112")],
)
def test_the_facts_of_the_node_are_those_of_kube_proxy(family: Family, pods: str, services: str) -> None:
    facts = computed(family).node
    recorded = Recorded(family)
    assert facts.node_port_addresses == frozenset(parse_address(key[0]) for key, _ in recorded.elements("nodeport-ips"))
    assert facts.detector == SourcePrefix(networks(pods)[0])
    assert facts.service_cidrs == networks(services)


def test_the_objects_have_what_the_recording_is_for() -> None:
    """A recording without the cases would show nothing."""
    routes = Recorded(Family.IPV4).routes().values()
    assert any(seen.affinity for seen in routes)
    assert any(seen.source_ranges for seen in routes)
    assert any(seen.local_backends for seen in routes)
    assert {seen.refusal for seen in routes} == {None, Refusal.REJECT, Refusal.DROP}
