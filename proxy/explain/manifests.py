"""Evidence from manifests: what they come to on one node.

Only those Services are computed that could have to do with what is asked: a cluster dump has thousands.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from proxy.addresses import lenient_address
from proxy.assemble import Assembler, precedence_of
from proxy.compute import View, compute
from proxy.config.settings import Settings
from proxy.explain.asked import Asked, AskedAddress
from proxy.explain.evidence import Cluster, Evidence
from proxy.explain.mentions import naming
from proxy.node import Interfaces
from proxy.objects import EndpointSlice, Key, Service
from proxy.offline import standing_of
from proxy.service_spec import exposure_of
from proxy.sources.manifest_objects import Loaded
from rules.forwarding import (
    Address,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    InputInterfacePrefix,
    Route,
    family_of,
)
from rules.node_ports import is_loopback


def from_manifests(
    loaded: Loaded,
    settings: Settings,
    hostname: str,
    asked: Asked,
    *,
    words: str = "the manifests",
    interfaces: Interfaces | None = None,
) -> Evidence:
    """What manifests come to on one node.

    `interfaces` are the node's; None: it has the addresses that its Node object says.

    Raises:
        ValueError: the node's name is empty (NOD-1).
    """
    standing = standing_of(loaded, settings, hostname, interfaces)
    view, facts, slices = standing.view, standing.facts, standing.slices
    problems = [*standing.problems]
    by_interface = any(isinstance(each.detector, InputInterface | InputInterfacePrefix) for each in facts.values())
    addresses, ports = _concerned(loaded, slices, view, asked)
    near = [service for service in loaded.services if _is_near(service, view, addresses, ports)]
    tables: dict[Family, ForwardingTable] = {}
    winners: dict[str, str] = {}
    claims: dict[Key, dict[tuple[Family, Frontend], Route]] = defaultdict(dict)
    for family in Family:
        assembler = Assembler(family)
        assembler.set_node(facts[family])
        for service in near:
            outcome = compute(service, slices.get(service.key, ()), view, family)
            assembler.update(service.key, precedence_of(service.metadata), outcome)
            claims[service.key] |= {(family, frontend): route for frontend, route in outcome.routes.items()}
            problems += (f"Service {service.key}: {problem}" for problem in outcome.problems)
        winners |= {str(each.frontend): str(each.winner) for each in assembler.conflicts()}
        tables[family] = assembler.table()
    keys = {service.key for service in near}
    if isinstance(asked, AskedAddress):
        keys |= {service.key for service in naming(loaded.services, asked.address)}
    else:
        keys.add(asked.key)
    cluster = Cluster(
        view=view,
        services={service.key: service for service in loaded.services if service.key in keys},
        slices={key: slices.get(key, ()) for key in keys},
        winners=winners,
        wanted=tables,
        claims=claims,
        names=tuple(str(service.key) for service in loaded.services),
        local_pods=_local_pods(loaded, view) if by_interface else frozenset(),
    )
    return Evidence(
        source="manifests",
        words=f"{words}, as node {standing.name} would have it",
        tables=tables,
        local_addresses=frozenset(address for addresses in standing.interfaces.values() for address in addresses),
        node_ips={family: address for family, address in view.node_ips.items() if not is_loopback(address)},
        cluster=cluster,
        problems=tuple(dict.fromkeys(problems)),
    )


def _concerned(
    loaded: Loaded, slices: Mapping[Key, tuple[EndpointSlice, ...]], view: View, asked: Asked
) -> tuple[frozenset[Address], frozenset[int]]:
    """The addresses and the ports that a frontend has in common with what is asked."""
    if isinstance(asked, AskedAddress):
        return frozenset([asked.address]), frozenset([asked.port])
    frontends: set[Frontend] = set()
    for service in loaded.services:
        if service.key == asked.key:
            for family in Family:
                frontends |= compute(service, slices.get(asked.key, ()), view, family).routes.keys()
    # Other Services with a frontend where this one has a node port come before it (NFT-28).
    nodes = view.node_ips.values() if any(frontend.is_node_port for frontend in frontends) else ()
    addresses = {*(frontend.address for frontend in frontends if frontend.address), *nodes}
    return frozenset(addresses), frozenset(frontend.port for frontend in frontends)


def _is_near(service: Service, view: View, addresses: AbstractSet[Address], ports: AbstractSet[int]) -> bool:
    """Whether a Service could have to do with these addresses, or has one of these node ports."""
    if any(port.node_port in ports for port in service.spec.ports if port.node_port):
        return True
    for family in {family_of(address) for address in addresses}:
        exposure = exposure_of(service, family, node_ip=None, external_ips=view.external_ips, problems=[])
        if exposure is not None and not addresses.isdisjoint(
            (exposure.cluster_ip, *exposure.external_ips, *exposure.load_balancer)
        ):
            return True
    return False


def _local_pods(loaded: Loaded, view: View) -> frozenset[Address]:
    found = set()
    for each in loaded.slices:
        for endpoint in each.endpoints:
            if endpoint.node_name == view.node_name and endpoint.addresses:
                with contextlib.suppress(ValueError):
                    found.add(lenient_address(endpoint.addresses[0]))
    return frozenset(found)


def interfaces_of(texts: Iterable[str]) -> Interfaces:
    """Addresses that somebody says the node has.

    Raises:
        ValueError: one is no address.
    """
    return {"node": tuple(lenient_address(text.strip()) for text in texts if text.strip())}
