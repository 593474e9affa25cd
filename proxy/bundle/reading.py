"""What is in an archive of `sluice bundle`; `proxy.bundle.verbs` answers from one.

An archive comes from strangers: it is read as a stream, of known files, up to a length, and nothing of it is written
anywhere.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from proxy.bundle.checking import check
from proxy.explain.surroundings import Surroundings
from proxy.report import Status
from rules.dataplane import Capabilities
from rules.forwarding import (
    Address,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    NodeFacts,
    Route,
)
from rules.netlink.conntrack import Flow

FORMAT = 1
TOP = "sluice-bundle"
"""The directory in the archive."""
LONGEST = 32 << 20
"""Bytes of one file; ten thousand Services take some ten million."""
MOST_FILES = 48
MOST_BYTES = 256 << 20
"""Of all files together, unpacked."""
OTHERS = "others-"
"""How the names of files begin that hold rules of others."""
_READ = ("manifest.json", "status.json", "objects.json", "tables.json", "surroundings.json", "flows.json")


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


class SavedFlow(msgspec.Struct, frozen=True, kw_only=True):
    """A flow through a Service, as connection tracking had it."""

    family: Family
    service: str
    flow: Flow
    stale: bool
    draining: bool = False


class SavedFlows(msgspec.Struct, frozen=True, kw_only=True):
    """The flows through Services."""

    judge: str
    """Who said what is stale."""
    flows: tuple[SavedFlow, ...] = ()
    left_out: int = 0
    """How many there were beyond these."""


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
    lacking: tuple[str, ...] = ()
    """What the kernel did not have that the mode needs, a line each."""
    files: tuple[Entry, ...] = ()
    missing: tuple[Missing, ...] = ()


class Bundle(NamedTuple):
    """An archive that was read."""

    name: str
    """Of the file."""
    manifest: Manifest
    status: Status | None
    objects: list[Any]
    tables: tuple[SavedTable, ...]
    surroundings: Surroundings | None = None
    """The node beside our rules; None also in archives of older versions."""
    flows: SavedFlows | None = None
    others: Mapping[str, bytes] = MappingProxyType({})
    """Rules of others by the names of the files, as iptables-save and nft print them."""

    def tables_of(self, whose: str) -> list[SavedTable]:
        return [each for each in self.tables if each.whose == whose]


def read(name: str) -> Bundle:
    """What an archive holds; nothing of it is written anywhere.

    Raises:
        BundleError: it is none, or a file of it cannot be read.
    """
    found: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(name, "r|gz") as archive:
            for number, member in enumerate(archive, 1):
                short = member.name.removeprefix(f"{TOP}/")
                # Whatever is passed over has to be unpacked as well.
                total += member.size
                if member.size > LONGEST or total > MOST_BYTES or number > MOST_FILES or short in found:
                    raise BundleError(f"{name}: {short!r} is there twice, or there is more than in a bundle")
                if not (short in _READ or short.startswith(OTHERS)) or not member.isreg():
                    continue
                file = archive.extractfile(member)
                found[short] = file.read() if file is not None else b""
        manifest = msgspec.json.decode(found["manifest.json"], type=Manifest)
        if manifest.format != FORMAT:
            raise BundleError(f"{name}: its format is {manifest.format}, and this sluice reads {FORMAT}")
        tables = msgspec.json.decode(found["tables.json"], type=tuple[SavedTable, ...])
        status = msgspec.json.decode(found["status.json"], type=Status) if "status.json" in found else None
        flows = msgspec.json.decode(found["flows.json"], type=SavedFlows) if "flows.json" in found else None
        around = None
        if "surroundings.json" in found:
            around = msgspec.json.decode(found["surroundings.json"], type=Surroundings)
        check(manifest, tables, flows.flows if flows is not None else (), around)
        listed = msgspec.json.decode(found["objects.json"], type=dict[str, Any]) if "objects.json" in found else {}
    except KeyError as error:
        raise BundleError(f"{name}: it is no bundle of sluice: it has no {error.args[0]}") from None
    except TypeError:  # tarfile's own, where the header of gzip has no end
        raise BundleError(f"{name}: it cannot be read: it ends too early") from None
    except (tarfile.TarError, OSError, EOFError, ValueError, RecursionError) as error:
        why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
        raise BundleError(f"{name}: it cannot be read: {why}") from None
    items = listed.get("items", [])
    return Bundle(
        name,
        manifest,
        status,
        items if isinstance(items, list) else [],
        tables,
        around,
        flows,
        {name: data for name, data in found.items() if name.startswith(OTHERS)},
    )
