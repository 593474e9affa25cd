"""`sluice render`: what would be programmed for a set of manifests, without root, network or cluster."""

from __future__ import annotations

import socket
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from proxy.addresses import lenient_address
from proxy.assemble import Assembler, precedence_of
from proxy.compute import compute
from proxy.config.settings import Settings
from proxy.node import Interfaces, node_facts, normal_node_name, view_of
from proxy.objects import EndpointSlice, Key, Node
from proxy.output import Format, Shown, write
from proxy.sources.manifest_objects import FileError
from proxy.sources.manifests import Loaded, Unreadable, load, loads
from rules.forwarding import Address, Family, ForwardingTable


class Rendered(NamedTuple):
    """What comes of manifests."""

    tables: tuple[ForwardingTable, ...]
    problems: tuple[str, ...]
    """What was left out or should be known, one line each, sorted as found."""


def main(settings: Settings, filename: str, format_: Format) -> int:
    """Print what `filename` (a file, a directory, or `-` for standard input) comes to; 2 if it cannot be read."""
    try:
        loaded = loads("standard input", sys.stdin.buffer.read()) if filename == "-" else load(filename)
    except (Unreadable, FileError) as error:
        sys.stderr.write(f"sluice render: {error}\n")
        return 2
    try:
        rendered = render(loaded, settings, socket.gethostname())
    except ValueError as error:
        sys.stderr.write(f"sluice render: --hostname-override: {error}\n")
        return 2
    for problem in rendered.problems:
        sys.stderr.write(f"sluice render: {problem}\n")
    if loaded.problems and not (loaded.services or loaded.slices or loaded.nodes):
        return 2
    write([Shown("", table) for table in rendered.tables], format_)
    return 0


def render(loaded: Loaded, settings: Settings, hostname: str, *, interfaces: Interfaces | None = None) -> Rendered:
    """The tables of both families for loaded manifests.

    The node is the one that the settings name, else the one with this machine's name, else the only one there is.
    `interfaces` are its own; None: it has the addresses that its Node object says.

    Raises:
        ValueError: the node's name is empty (NOD-1).
    """
    problems = [str(problem) for problem in loaded.problems]
    name, node = choose_node(loaded.nodes, settings.hostname_override, hostname, problems)
    if interfaces is None:
        interfaces = {"node": tuple(node_addresses(node))}
    view = view_of(settings, name, node, interfaces, standalone=node is None)
    facts = node_facts(settings, node, interfaces, loaded.service_cidrs, standalone=node is None)
    slices: dict[Key, list[EndpointSlice]] = defaultdict(list)
    for each in loaded.slices:
        if each.service is not None:
            slices[each.service].append(each)
    tables = []
    for family in Family:
        assembler = Assembler(family)
        assembler.set_node(facts[family])
        for service in loaded.services:
            outcome = compute(service, slices.get(service.key, ()), view, family)
            assembler.update(service.key, precedence_of(service.metadata), outcome)
            problems += (f"Service {service.key}: {problem}" for problem in outcome.problems)
        for frontend, winner, losers in assembler.conflicts():
            names = ", ".join(map(str, losers))
            problems.append(f"{frontend} is claimed by several Services: {winner} has it, {names} would be next")
        tables.append(assembler.table())
    return Rendered(tuple(tables), tuple(dict.fromkeys(problems)))


def choose_node(nodes: Sequence[Node], override: str, hostname: str, problems: list[str]) -> tuple[str, Node | None]:
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


def node_addresses(node: Node | None) -> Iterator[Address]:
    """The addresses that a Node says it has."""
    for each in node.status.addresses if node is not None else ():
        try:
            yield lenient_address(each.address)
        except ValueError:
            continue  # a host name
