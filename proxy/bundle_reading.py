"""What is in an archive of `sluice bundle`, and `dump`, `explain` and `verify` of one.

An archive comes from strangers: it is read as a stream, of known files, up to a length, and nothing of it is written
anywhere.
"""

from __future__ import annotations

import sys
import tarfile
from typing import Any, Literal, NamedTuple

import msgspec

from proxy.agent_socket import AgentError
from proxy.compute import compute
from proxy.doctor import cluster_of
from proxy.dump import Filter
from proxy.explain.asked import Asked, AskedAddress, parse_asked, parse_client
from proxy.explain.evidence import Evidence
from proxy.explain.verb import tell
from proxy.objects import Key
from proxy.output import Format, Shown, select, write
from proxy.report import Status
from proxy.verify import Verified, report
from rules.dataplane import Capabilities
from rules.diff import compare as tables_apart
from rules.diff import fit
from rules.forwarding import (
    Address,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    NodeFacts,
    Route,
    family_of,
)

FORMAT = 1
TOP = "sluice-bundle"
"""The directory in the archive."""
LONGEST = 32 << 20
"""Bytes of one file; ten thousand Services take some ten million."""
MOST_FILES = 32


class BundleError(Exception):
    """An archive cannot be written, or is none that can be read; the message is one line."""


class SavedTable(msgspec.Struct, frozen=True, kw_only=True):
    """A forwarding table in a file; addresses are in base 64."""

    whose: str
    """`wanted` by the agent, or `held` by the kernel."""
    dataplane: str
    family: Family
    node: NodeFacts
    capabilities: Capabilities
    routes: tuple[tuple[Frontend, Route], ...] = ()
    hairpins: tuple[Endpoint, ...] = ()
    damage: tuple[str, ...] = ()

    @property
    def table(self) -> ForwardingTable:
        return ForwardingTable(
            family=self.family,
            node=self.node,
            routes=dict(self.routes),
            hairpins=frozenset(self.hairpins),
            damage=frozenset(self.damage),
        )


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the archive."""

    name: str
    bytes: int
    cut: bool = False
    """Whether its beginning is missing, as it was too long."""


class Missing(msgspec.Struct, frozen=True, kw_only=True):
    """What could not be had."""

    name: str
    why: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in an archive."""

    format: int
    version: str
    taken: str
    """In UTC, as RFC 3339 has it."""
    node: str
    """As the agent calls it; else the machine's name."""
    addresses: tuple[Address, ...] = ()
    """The node's own."""
    node_ips: tuple[Address, ...] = ()
    """Of each family the one by which others reach it."""
    files: tuple[Entry, ...] = ()
    missing: tuple[Missing, ...] = ()


class Bundle(NamedTuple):
    """An archive that was read."""

    manifest: Manifest
    status: Status | None
    objects: list[Any]
    tables: tuple[SavedTable, ...]

    def tables_of(self, whose: str) -> list[SavedTable]:
        return [each for each in self.tables if each.whose == whose]


def read(name: str) -> Bundle:
    """What an archive holds; nothing of it is written anywhere.

    Raises:
        BundleError: it is none, or a file of it cannot be read.
    """
    wanted = ("manifest.json", "status.json", "objects.json", "tables.json")
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(name, "r|gz") as archive:
            for number, member in enumerate(archive, 1):
                short = member.name.removeprefix(f"{TOP}/")
                # Whatever is passed over has to be unpacked as well.
                if member.size > LONGEST or number > MOST_FILES or short in found:
                    raise BundleError(f"{name}: {short!r} is there twice, or there is more than in a bundle")
                if short not in wanted or not member.isreg():
                    continue
                file = archive.extractfile(member)
                found[short] = file.read() if file is not None else b""
        manifest = msgspec.json.decode(found["manifest.json"], type=Manifest)
        if manifest.format != FORMAT:
            raise BundleError(f"{name}: its format is {manifest.format}, and this sluice reads {FORMAT}")
        tables = msgspec.json.decode(found["tables.json"], type=tuple[SavedTable, ...])
        status = msgspec.json.decode(found["status.json"], type=Status) if "status.json" in found else None
        listed = msgspec.json.decode(found["objects.json"], type=dict[str, Any]) if "objects.json" in found else {}
    except KeyError as error:
        raise BundleError(f"{name}: it is no bundle of sluice: it has no {error.args[0]}") from None
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        raise BundleError(f"{name}: it cannot be read: {' '.join(str(error).split())}") from None
    items = listed.get("items", [])
    return Bundle(manifest, status, items if isinstance(items, list) else [], tables)


# --- the verbs ---------------------------------------------------------------------------------------------------


def dump(name: str, format_: Format, wanted: Filter) -> int:
    """Print what the kernel held; 0, 1 if nothing is what was asked for, 2 if the archive cannot be read."""
    try:
        bundle = read(name)
    except BundleError as error:
        sys.stderr.write(f"sluice dump: {error}\n")
        return 2
    held = [Shown(each.dataplane, each.table) for each in bundle.tables_of("held")]
    asked = wanted != Filter()
    if asked:
        held = [each._replace(table=select(each.table, wanted.admits)) for each in held]
    write(held, format_)
    if not any(each.table.routes for each in held) and (asked or not held):
        sys.stderr.write(
            f"sluice dump: {name}: {'no frontend is what was asked for' if asked else 'no table is in it'}\n"
        )
        return 1 if asked else 0
    return 0


def verify(name: str, format_: Literal["text", "json"]) -> int:
    """Compare what the kernel held with what the agent wanted; as `sluice verify` ends."""
    try:
        bundle = read(name)
    except BundleError as error:
        sys.stderr.write(f"sluice verify: {error}\n")
        return 2
    wanted = bundle.tables_of("wanted")
    if not wanted:
        sys.stderr.write(f"sluice verify: {name}: what was wanted is not in it, as no agent answered\n")
        return 2
    held = {(each.family, each.dataplane): each.table for each in bundle.tables_of("held")}
    compared = [
        Verified(
            each.dataplane,
            tables_apart(each.table, held.get((each.family, each.dataplane)), each.capabilities),
            len(each.routes),
            f"the kernel, {bundle.manifest.taken}",
        )
        for each in wanted
    ]
    return report(compared, "the agent", format_, sys.stdout)


def explain(name: str, target: str, client: str, *, interface: str = "", as_json: bool = False) -> int:
    """Answer a question about the node of an archive; as `sluice explain` ends."""
    try:
        asked, who = parse_asked(target), parse_client(client, interface)
        evidence = _evidence(read(name), asked)
    except (ValueError, AgentError, BundleError) as error:
        sys.stderr.write(f"sluice explain: {error}\n")
        return 2
    return tell(asked, who, evidence, as_json=as_json)


def _evidence(bundle: Bundle, asked: Asked) -> Evidence:
    """What the agent wanted and knew, and what the kernel held."""
    manifest = bundle.manifest
    held: dict[Family, ForwardingTable] = {}
    for each in bundle.tables_of("held"):
        if each.family not in held or len(held[each.family].routes) < len(each.routes):
            held[each.family] = each.table
    local = frozenset(manifest.addresses)
    node_ips = {family_of(each): each for each in manifest.node_ips}
    words = f"the bundle of node {manifest.node}, {manifest.taken}"
    if bundle.status is None:
        return Evidence(
            source="kernel", words=words, tables=held, local_addresses=local, node_ips=node_ips, kernel=held
        )
    tables = {each.family: fit(each.table, each.capabilities) for each in bundle.tables_of("wanted")}
    cluster = cluster_of(bundle.objects, bundle.status)
    claims: dict[Key, dict[tuple[Family, Frontend], Route]] = {}
    if not isinstance(asked, AskedAddress) and (service := cluster.services.get(asked.key)) is not None:
        claims[asked.key] = {
            (family, frontend): route
            for family in tables
            for frontend, route in compute(
                service, cluster.slices.get(asked.key, ()), cluster.view, family
            ).routes.items()
        }
    winners = {each.frontend: each.winner for each in bundle.status.contested}
    cluster = msgspec.structs.replace(cluster, wanted=tables, claims=claims, winners=winners)
    return Evidence(
        source="agent",
        words=words,
        tables=tables,
        local_addresses=local,
        node_ips=node_ips,
        cluster=cluster,
        kernel=held,
    )
