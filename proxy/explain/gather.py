"""Gathering the evidence: from the agent, from the kernel and the node around it, from manifests."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from proxy import modes
from proxy.agent_socket import AgentError, NoAgentError
from proxy.config.settings import RUN_DIRECTORY, Settings
from proxy.explain.agent import Known, ask
from proxy.explain.asked import Asked, AskedAddress, Client
from proxy.explain.causes import key_of_label
from proxy.explain.evidence import Evidence, of_this_node
from proxy.explain.obstacles import backends_of
from proxy.explain.surroundings import Surroundings, look
from proxy.node import Interfaces
from rules.dataplane import Dataplane, DataplaneError
from rules.forwarding import Address, Family, ForwardingTable, family_of
from rules.netlink.conntrack_table import Conntrack


class UnanswerableError(Exception):
    """There is no evidence; the message says why and what to do."""


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """Where evidence is looked for; nothing said: the agent, else the kernel."""

    filename: str = ""
    """Manifests; `-` is standard input."""
    node_addresses: tuple[str, ...] = ()
    """Of the node that the manifests are about; empty: its Node object says them."""
    live: bool = False
    """The kernel, in any case; objects of the agent or of the manifests stand beside it."""
    run_directory: str = RUN_DIRECTORY


class Means(NamedTuple):
    """How this node is read."""

    open_dataplane: Callable[[str, Family], Dataplane] = modes.open_dataplane
    look: Callable[..., Surroundings] = look
    open_conntrack: Callable[[Family], Conntrack] = Conntrack


def gather(where: Where, settings: Settings, asked: Asked, client: Client, means: Means) -> Evidence:
    """The evidence for a question; `settings` are those that manifests are computed with.

    Raises:
        UnanswerableError: there is none.
        ValueError: something of it makes no sense.
    """
    if where.node_addresses and (where.live or not where.filename):
        raise ValueError("--node-addresses are for manifests (-f): a kernel knows its own")
    if where.filename:
        return _from_file(where, settings, asked, client, means)
    try:
        known = ask(asked, _families(asked, client), where.run_directory)
    except NoAgentError:
        return _of_this_node(asked, client, means)
    except AgentError as error:
        problems = (f"{error}: the kernel alone is explained",)
        return msgspec.structs.replace(_of_this_node(asked, client, means), problems=problems)
    return _with_agent(where, known, asked, client, means)


def _from_file(where: Where, settings: Settings, asked: Asked, client: Client, means: Means) -> Evidence:
    """What manifests come to, or the kernel beside them."""
    # YAML: 0.05 s that answers about this node do without.
    from proxy.explain.manifests import from_manifests, interfaces_of  # noqa: PLC0415
    from proxy.sources.manifest_files import Unreadable  # noqa: PLC0415
    from proxy.sources.manifest_loading import given  # noqa: PLC0415
    from proxy.sources.manifest_objects import FileError  # noqa: PLC0415

    try:
        loaded = given(where.filename)
    except (Unreadable, FileError) as error:
        raise UnanswerableError(str(error)) from None
    if loaded.unusable:
        raise UnanswerableError("; ".join(map(str, loaded.problems)))
    hostname = socket.gethostname()
    if where.live:
        evidence = _of_this_node(asked, client, means)
        own: Interfaces = {"node": tuple(sorted(evidence.local_addresses))}
        wanted = from_manifests(loaded, settings, hostname, asked, interfaces=own)
        return msgspec.structs.replace(evidence, cluster=wanted.cluster, problems=wanted.problems)
    interfaces: Interfaces | None = None
    if where.node_addresses:
        interfaces = interfaces_of(where.node_addresses)
    elif not loaded.nodes:
        # Without a cluster, manifests are about the machine that they lie on (DESIGN 4.14).
        interfaces = {"node": tuple(sorted(means.look().addresses))}
    words = "standard input" if where.filename == "-" else where.filename
    return from_manifests(loaded, settings, hostname, asked, words=words, interfaces=interfaces)


def _with_agent(where: Where, known: Known, asked: Asked, client: Client, means: Means) -> Evidence:
    """What the agent wants and what the kernel holds, if they are of one network namespace."""
    cluster = known.cluster
    words = f"the agent on node {cluster.view.node_name}"
    if not known.here:
        note = "the agent is of another network namespace than this command"
        if where.live:
            alone = _of_this_node(asked, client, means)
            return msgspec.structs.replace(alone, problems=(f"{note}: the kernel alone is explained",))
        compared = (f"{note}: the kernel is not compared",)
        return Evidence(source="agent", words=words, tables=cluster.wanted, cluster=cluster, problems=compared)
    problems: tuple[str, ...] = ()
    if known.pending:
        problems = ("the agent is about to write changes: where it differs from the kernel, ask again",)
    try:
        evidence = _of_this_node(asked, client, means)
    except UnanswerableError as error:
        if where.live:
            raise
        node = means.look(*_addresses(asked, client), *_backends(cluster.wanted, asked))
        evidence = msgspec.structs.replace(of_this_node({}, node), kernel=None)
        problems = (f"{error}: the kernel is not compared",)
    evidence = msgspec.structs.replace(evidence, cluster=cluster, problems=problems)
    if where.live:
        return evidence
    return msgspec.structs.replace(evidence, source="agent", words=words, tables=cluster.wanted)


def _of_this_node(asked: Asked, client: Client, means: Means) -> Evidence:
    tables = _read(_families(asked, client), means)
    return of_this_node(tables, means.look(*asked_ways(tables, asked, client)))


def asked_ways(tables: Mapping[Family, ForwardingTable], asked: Asked, client: Client) -> tuple[Address, ...]:
    """The addresses to which the kernel is asked for the ways: of both ends, and of the backends between them."""
    return (*_addresses(asked, client), *_frontends(tables, asked), *_backends(tables, asked))


def _read(families: Iterable[Family], means: Means) -> dict[Family, ForwardingTable]:
    """What the kernel holds of these families.

    Raises:
        UnanswerableError: it could not be read.
    """
    tables: dict[Family, ForwardingTable] = {}
    for name in modes.present():
        for family in families:
            try:
                dataplane = means.open_dataplane(name, family)
                try:
                    table = dataplane.read()
                finally:
                    dataplane.close()
            except DataplaneError as error:
                raise UnanswerableError(f"{error}; -f FILE explains manifests instead") from None
            # Remains of another mode may be there too, until the agent has removed them.
            if table is not None and (family not in tables or len(tables[family].routes) < len(table.routes)):
                tables[family] = table
    return tables


def _families(asked: Asked, client: Client) -> Sequence[Family]:
    if isinstance(asked, AskedAddress):
        return (family_of(asked.address),)
    return (family_of(client.address),) if client.address is not None else tuple(Family)


def _addresses(asked: Asked, client: Client) -> list[bytes]:
    """The addresses that the ways are asked of."""
    destination = asked.address if isinstance(asked, AskedAddress) else None
    return [address for address in (client.address, destination) if address is not None]


def _frontends(tables: Mapping[Family, ForwardingTable], asked: Asked) -> list[bytes]:
    """The addresses of a Service that is asked about: the node's own connections have the sources of these ways."""
    if isinstance(asked, AskedAddress):
        return []
    routes = (each for table in tables.values() for each in table.routes.items())
    return sorted({at.address for at, each in routes if at.address and key_of_label(each.label) == asked.key})


def _backends(tables: Mapping[Family, ForwardingTable], asked: Asked) -> list[bytes]:
    """The backends that what is asked about may lead to, as far as these tables say."""
    routes = (each for table in tables.values() for each in table.routes.items())
    if isinstance(asked, AskedAddress):
        addresses = (b"", asked.address)
        return backends_of(each for at, each in routes if at.port == asked.port and at.address in addresses)
    return backends_of(each for _, each in routes if key_of_label(each.label) == asked.key)
