"""`sluice explain` of another proxy's rules: what becomes of a connection by what they hold.

Objects stand beside them where they are known (of manifests, the API server, or an agent that runs here too): then
every difference between what is wanted and what the rules do to this connection is told.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec

from proxy.agent_socket import AgentError, NoAgentError
from proxy.beside import beside
from proxy.config.settings import Settings
from proxy.explain.agent import ask
from proxy.explain.asked import Asked, AskedAddress, Client, parse_asked, parse_client
from proxy.explain.evidence import Cluster, Evidence, of_this_node
from proxy.explain.gather import asked_ways
from proxy.explain.surroundings import Surroundings, look
from proxy.explain.verb import tell
from proxy.explain.watching import watch
from proxy.foreign import wanted
from proxy.foreign.sources import PROXY, Files, Found, are_large, from_files, from_node, likely_mode, without_them
from proxy.foreign.wanted import CannotTellError, Objects
from proxy.node import Interfaces
from rules.dataplane import DataplaneError
from rules.foreign.comparison import as_held_by, named
from rules.foreign.gathering import ForeignError, Reading
from rules.forwarding import Address, Endpoint, Family, ForwardingTable, Frontend, Route, family_of
from rules.node_ports import is_loopback

Read = Callable[[Iterable[Family]], Sequence[Found]]
Readings = dict[Family, Found]


class Where(msgspec.Struct, frozen=True, kw_only=True):
    """Where rules and objects are looked for."""

    files: Files = Files("", ())
    node_addresses: tuple[Address, ...] = ()
    """Of the node that saved rules are of; empty: its Node object says them, or its rules for node ports."""
    configured: bool = False
    """Whether the settings are the proxy's own.  Otherwise the node's facts are taken from its rules."""


class Means(msgspec.Struct, frozen=True):
    """How this node is read."""

    read: Read = from_node
    look: Callable[..., Surroundings] = look


def main(
    target: str,
    client: str,
    where: Where,
    settings: Settings,
    *,
    interface: str = "",
    as_json: bool = False,
    again: bool = False,
    means: Means = Means(),  # noqa: B008  # frozen
) -> int:
    """Answer a question on standard output; 0 it works, 1 it does not, 2 usage or nobody could tell.

    The arguments are those of `proxy.explain.verb.main`.
    """
    try:
        asked, who = parse_asked(target), parse_client(client, interface)
        if again:
            unanswered = (ValueError, CannotTellError, ForeignError, AgentError, DataplaneError, OSError)
            return watch(asked, who, lambda: gather(where, settings, asked, who, means), unanswered, as_json=as_json)
        evidence = gather(where, settings, asked, who, means)
    except (ValueError, CannotTellError, ForeignError, DataplaneError) as error:
        sys.stderr.write(f"sluice explain: {error}\n")
        return 2
    return tell(asked, who, evidence, as_json=as_json)


def gather(where: Where, settings: Settings, asked: Asked, client: Client, means: Means) -> Evidence:
    """The evidence for a question.

    Raises:
        CannotTellError: the objects cannot be had.
        DataplaneError: a program failed.
        ForeignError: there are no rules of another proxy, or none that can be read.
        ValueError: something makes no sense.
    """
    if isinstance(asked, AskedAddress) and client.address is not None and len(client.address) != len(asked.address):
        raise ValueError(f"--from is {family_of(client.address).label}, and {asked} is not")
    if where.files.rules:
        return _of_files(where, settings, asked)
    return _of_this_node(where, settings, asked, client, means)


def _of_files(where: Where, settings: Settings, asked: Asked) -> Evidence:
    """By rules that were saved, of a node that may be anywhere."""
    large = are_large(where.files)
    addresses = where.node_addresses
    interfaces: Interfaces | None = {"node": addresses} if addresses else None
    manifests: Evidence | None = None
    likely = ""
    with beside(lambda: from_files(where.files.rules), list[Found], worth_it=large) as reading:
        objects = wanted.of_given(where.files.manifests, settings)
        # What is wanted depends on the mode of the rules: the likely one, while the other process decodes them.
        if objects and large and (likely := likely_mode(where.files)):
            manifests = _manifests(objects, settings, asked, likely, interfaces)
        found = reading()
    readings, problems = one_each(found)
    evidence = of_this_node(_tables(readings), Surroundings())
    cluster: Cluster | None = None
    if objects:
        if manifests is None or likely != _mode(readings):
            manifests = _manifests(objects, settings, asked, _mode(readings), interfaces)
        cluster, addresses = manifests.cluster, addresses or tuple(manifests.local_addresses)
        problems += manifests.problems
        evidence = msgspec.structs.replace(evidence, node_ips=manifests.node_ips)
    addresses = addresses or _own_addresses(found) or _node_port_addresses(found)
    tables = _tables(with_names(readings, cluster))
    return msgspec.structs.replace(
        evidence,
        tables=tables,
        kernel=tables,
        words=f"{_title(readings)}, saved in {', '.join(where.files.rules)}",
        surroundings=None,
        live=False,
        proxy=PROXY,
        local_addresses=frozenset(addresses),
        node_ips={**_first_of_each(addresses), **evidence.node_ips},
        cluster=as_held(cluster, readings, configured=where.configured),
        problems=tuple(dict.fromkeys([*problems, *notes_of(readings, asked, cluster)])),
    )


def _of_this_node(where: Where, settings: Settings, asked: Asked, client: Client, means: Means) -> Evidence:
    """By the rules in this node's kernel."""
    destination = asked.address if isinstance(asked, AskedAddress) else None
    ends = [each for each in (client.address, destination) if each is not None]
    families = tuple({family_of(each) for each in ends}) or tuple(Family)
    readings, problems = one_each(means.read(families))
    if not readings:
        raise ForeignError(f"{PROXY} has no rules in this network namespace")

    def looked(tables: Mapping[Family, ForwardingTable]) -> Evidence:
        node = means.look(*asked_ways(tables, asked, client))
        return without_device(of_this_node(tables, without_them(node)), readings)

    evidence = looked(_tables(readings))
    cluster: Cluster | None = None
    if objects := wanted.of_given(where.files.manifests, settings):
        interfaces = {"node": tuple(sorted(evidence.local_addresses))}
        manifests = _manifests(objects, settings, asked, _mode(readings), interfaces)
        cluster = manifests.cluster
        problems += manifests.problems
    else:
        try:
            known = ask(asked, families, settings.run_directory)
        except NoAgentError:
            pass
        except AgentError as error:
            problems.append(f"{error}: the rules alone are explained")
        else:
            cluster = known.cluster if known.here else None
    tables = _tables(with_names(readings, cluster))
    if set(asked_ways(tables, asked, client)) > set(asked_ways(_tables(readings), asked, client)):
        evidence = looked(tables)  # in mode ipvs objects alone say which routes are those of a Service
    return msgspec.structs.replace(
        evidence,
        tables=tables,
        kernel=tables,
        words=f"{_title(readings)} on this node",
        live=False,
        proxy=PROXY,
        cluster=as_held(cluster, readings, configured=where.configured),
        problems=tuple(dict.fromkeys([*problems, *notes_of(readings, asked, cluster)])),
    )


def without_device(evidence: Evidence, readings: Readings) -> Evidence:
    """The evidence without the addresses that mode ipvs has bound: they are Services', and none of the node's."""
    own = {family: each.reading.own for family, each in readings.items() if each.reading.own is not None}
    if not own:
        return evidence
    others = frozenset(each for each in evidence.local_addresses if family_of(each) not in own)
    addresses = others.union(*own.values())
    node_ips = {family: each for family, each in evidence.node_ips.items() if each in addresses}
    return msgspec.structs.replace(
        evidence, local_addresses=addresses, node_ips={**_first_of_each(_outer(addresses)), **node_ips}
    )


def with_names(readings: Readings, cluster: Cluster | None) -> Readings:
    """What was read with the names that objects have, where rules have none."""
    if cluster is None:
        return readings
    return {
        family: each._replace(reading=named(each.reading, cluster.wanted[family])) if family in cluster.wanted else each
        for family, each in readings.items()
    }


def notes_of(readings: Readings, asked: Asked, cluster: Cluster | None) -> Iterator[str]:
    """What should be known beside an answer by rules, a sentence each."""
    for each in readings.values():
        yield from each.reading.notes
    of_ipvs = [each.reading.table for each in with_names(readings, cluster).values() if each.reading.mode == "ipvs"]
    if of_ipvs and cluster is None and not isinstance(asked, AskedAddress):
        yield "in ipvs mode nothing has the names of Services: ask about an address, or give manifests with -f"
    if any(
        route.policy_local and _is_asked(frontend, route, asked)
        for table in of_ipvs
        for frontend, route in table.routes.items()
    ):
        yield (
            "in ipvs mode local pods and the node are given the same backends as everybody, under policy Local too, "
            "where the node is not masqueraded (IPVS-15, IPVS-21)"
        )


def _is_asked(frontend: Frontend, route: Route, asked: Asked) -> bool:
    """Whether a question may be about a route."""
    if isinstance(asked, AskedAddress):
        return frontend.port == asked.port and frontend.address in (b"", asked.address)
    return route.label.partition(":")[0] == str(asked.key)


def _manifests(
    objects: Objects, settings: Settings, asked: Asked, mode: str, interfaces: Interfaces | None
) -> Evidence:
    """What manifests come to where the proxy runs in some mode."""
    from proxy.explain.manifests import from_manifests  # noqa: PLC0415  # YAML, which others do without

    told = wanted.in_mode(settings, mode)
    return from_manifests(objects.loaded, told, socket.gethostname(), asked, interfaces=interfaces)


def as_held(cluster: Cluster | None, readings: Readings, *, configured: bool) -> Cluster | None:
    """What is wanted in the words of the rules, and without what only all Services together can tell."""
    if cluster is None:
        return None
    tables = dict(cluster.wanted)
    for family in tables.keys() & readings.keys():
        reading = readings[family].reading
        told = as_held_by(reading, tables[family], configured=configured)
        ports = reading.table.node.health_check_ports
        node = msgspec.structs.replace(told.node, health_check_ports=ports)
        hairpins = told.hairpins | (reading.table.hairpins - _endpoints(told))
        tables[family] = msgspec.structs.replace(told, node=node, hairpins=hairpins)
    return msgspec.structs.replace(cluster, wanted=tables)


def _endpoints(table: ForwardingTable) -> set[Endpoint]:
    """All endpoints of a table's routes."""
    return {
        Endpoint(backend.address, frontend.protocol, backend.port)
        for frontend, route in table.routes.items()
        for backend in route.backends | (route.local_backends or frozenset())
    }


def one_each(found: Sequence[Found]) -> tuple[Readings, list[str]]:
    """Of each family the rules with most frontends, and what is left out."""
    chosen: Readings = {}
    problems: list[str] = []
    for each in sorted(found, key=lambda each: -len(each.reading.table.routes)):
        first = chosen.setdefault(each.reading.table.family, each)
        if first is not each:
            family = each.reading.table.family.label
            problems.append(f"{family}: {first.title} are explained, and there are its {each.dataplane} rules too")
    return chosen, problems


def _title(readings: Readings) -> str:
    return next(iter(readings.values())).title


def _mode(readings: Readings) -> str:
    return next(iter(readings.values())).reading.mode


def _tables(readings: Readings) -> dict[Family, ForwardingTable]:
    return {family: each.reading.table for family, each in readings.items()}


def _node_port_addresses(found: Iterable[Found]) -> tuple[Address, ...]:
    readings: Iterable[Reading] = (each.reading for each in found)
    return tuple(sorted(address for each in readings for address in each.table.node.node_port_addresses or ()))


def _own_addresses(found: Iterable[Found]) -> tuple[Address, ...]:
    """The node's own addresses, where they were saved beside its rules."""
    return tuple(_outer(frozenset(address for each in found for address in each.reading.own or ())))


def _outer(addresses: Iterable[Address]) -> list[Address]:
    """Addresses in order, loopback last."""
    return sorted(addresses, key=lambda each: (is_loopback(each), each))


def _first_of_each(addresses: Iterable[Address]) -> dict[Family, Address]:
    first: dict[Family, Address] = {}
    for address in addresses:
        first.setdefault(family_of(address), address)
    return first
