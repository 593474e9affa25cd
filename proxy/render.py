"""`sluice render`: what would be programmed for a set of manifests, without root, network or cluster."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable
from typing import NamedTuple

from proxy.assemble import Assembler, precedence_of
from proxy.compute import compute
from proxy.config.settings import Settings
from proxy.node import Interfaces
from proxy.objects import Service
from proxy.offline import Standing, standing_of
from proxy.output import Format, Shown, write
from proxy.sources.manifest_files import Unreadable
from proxy.sources.manifest_loading import given
from proxy.sources.manifest_objects import FileError, Loaded
from rules.forwarding import Family, ForwardingTable


class Rendered(NamedTuple):
    """What comes of manifests."""

    tables: tuple[ForwardingTable, ...]
    problems: tuple[str, ...]
    """What was left out or should be known, one line each, sorted as found."""


def main(settings: Settings, filename: str, format_: Format) -> int:
    """Print what `filename` (a file, a directory, or `-` for standard input) comes to; 2 if it cannot be read."""
    try:
        loaded = given(filename)
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
    if loaded.unusable:
        return 2
    write([Shown("", table) for table in rendered.tables], format_)
    return 0


def render(loaded: Loaded, settings: Settings, hostname: str, *, interfaces: Interfaces | None = None) -> Rendered:
    """The tables of both families for loaded manifests, on the node that `proxy.offline.standing_of` chooses.

    Raises:
        ValueError: the node's name is empty (NOD-1).
    """
    return render_on(standing_of(loaded, settings, hostname, interfaces), loaded.services)


def render_on(standing: Standing, services: Iterable[Service]) -> Rendered:
    """The tables of both families for some Services on a node."""
    problems = [*standing.problems]
    tables = []
    for family in Family:
        assembler = Assembler(family)
        assembler.set_node(standing.facts[family])
        for service in services:
            outcome = compute(service, standing.slices.get(service.key, ()), standing.view, family)
            assembler.update(service.key, precedence_of(service.metadata), outcome)
            problems += (f"Service {service.key}: {problem}" for problem in outcome.problems)
        for frontend, winner, losers in assembler.conflicts():
            names = ", ".join(map(str, losers))
            problems.append(f"{frontend} is claimed by several Services: {winner} has it, {names} would be next")
        tables.append(assembler.table())
    return Rendered(tuple(tables), tuple(dict.fromkeys(problems)))
