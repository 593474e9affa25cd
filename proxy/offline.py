"""A node without a cluster to ask: what manifests say of it, and of the Services that it is to serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from proxy.addresses import lenient_address
from proxy.compute import View
from proxy.config.settings import Settings
from proxy.node import Interfaces, node_facts, normal_node_name, view_of
from proxy.objects import EndpointSlice, Key, Node, by_service
from proxy.sources.manifest_objects import Loaded
from rules.forwarding import Address, Family, NodeFacts


class Standing(NamedTuple):
    """A node as manifests and settings describe it, and the slices that they have for each Service."""

    name: str
    interfaces: Interfaces
    view: View
    facts: Mapping[Family, NodeFacts]
    slices: Mapping[Key, tuple[EndpointSlice, ...]]
    problems: tuple[str, ...]
    """What is wrong with the manifests, and with the choice of the node, one line each."""


def standing_of(loaded: Loaded, settings: Settings, hostname: str, interfaces: Interfaces | None) -> Standing:
    """The node that the settings name, else the one with this machine's name, else the only one there is.

    `interfaces` are its own; None: it has the addresses that its Node object says.

    Raises:
        ValueError: the node's name is empty (NOD-1).
    """
    problems = [str(problem) for problem in loaded.problems]
    name, node = _choose_node(loaded.nodes, settings.hostname_override, hostname, problems)
    if interfaces is None:
        interfaces = {"node": tuple(_addresses(node))}
    return Standing(
        name=name,
        interfaces=interfaces,
        view=view_of(settings, name, node, interfaces, standalone=node is None),
        facts=node_facts(settings, node, interfaces, loaded.service_cidrs, standalone=node is None),
        slices=by_service(loaded.slices),
        problems=tuple(problems),
    )


def _choose_node(nodes: Sequence[Node], override: str, hostname: str, problems: list[str]) -> tuple[str, Node | None]:
    """The node to compute for: its name, and its object where there is one."""
    name = normal_node_name(override, hostname)
    by_name = {node.metadata.name: node for node in nodes}
    if name in by_name or not nodes:
        return name, by_name.get(name)
    if not override and len(nodes) == 1:
        return nodes[0].metadata.name, nodes[0]
    known = ", ".join(sorted(by_name))
    problems.append(f"no Node is called {name}: choose one of {known} with --hostname-override")
    return name, None


def _addresses(node: Node | None) -> Iterator[Address]:
    """The addresses that a Node says it has."""
    for each in node.status.addresses if node is not None else ():
        try:
            yield lenient_address(each.address)
        except ValueError:
            continue  # a host name
