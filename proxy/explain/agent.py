"""Evidence from the running agent: what it wants, and the objects of the Services that are asked about."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from proxy import agent_socket
from proxy.agent_socket import AgentError
from proxy.compute import Decision, View, compute, semantics_of
from proxy.explain.asked import Asked, AskedAddress
from proxy.explain.causes import key_of_label
from proxy.explain.evidence import Cluster
from proxy.explain.mentions import naming
from proxy.objects import EndpointSlice, Key, ObjectError, Service, convert
from proxy.report import EndpointReport, Status
from proxy.selection import Reason
from rules.diff import fit
from rules.forwarding import Family, ForwardingTable, Frontend, Route


class Known(NamedTuple):
    """What an agent knows."""

    cluster: Cluster
    here: bool
    """Whether it is the agent of this network namespace."""
    pending: bool
    """Whether the kernel is about to be changed."""


def ask(asked: Asked, families: Iterable[Family], run_directory: str) -> Known:
    """What the agent knows of what is asked.

    Raises:
        NoAgentError: none runs here.
        AgentError: it does not answer.
    """
    status = agent_socket.status(run_directory)
    served = {each.family for each in status.families}
    wanted = {family: _wanted(family, run_directory) for family in families if family.label in served}
    view = View(node_name=status.node, semantics=semantics_of(status.behaviour))
    services: dict[Key, Service] = {}
    slices: dict[Key, tuple[EndpointSlice, ...]] = {}
    claims: dict[Key, Mapping[tuple[Family, Frontend], Route]] = {}
    decided: dict[tuple[Key, Family], tuple[Decision, ...]] = {}
    concerned = _concerned(asked, wanted.values())
    if isinstance(asked, AskedAddress) and not concerned:
        services = {each.key: each for each in naming(_services(run_directory), asked.address)}
    for key in concerned:
        service, slices[key] = _objects(key, run_directory)
        if service is None:
            continue
        services[key] = service
        claims[key] = {
            (family, frontend): route
            for family in wanted
            for frontend, route in compute(service, slices[key], view, family).routes.items()
        }
        reports = agent_socket.decisions(str(key), run_directory)
        for family in wanted:
            decided[key, family] = tuple(_decision(each) for each in reports if each.family == family.label)
    cluster = Cluster(
        view=view,
        services=services,
        slices=slices,
        winners={each.frontend: each.winner for each in status.contested},
        wanted=wanted,
        claims=claims,
        decided=decided,
        troubles=troubles_of(status),
    )
    here = status.network_namespace == agent_socket.network_namespace()
    return Known(cluster, here, any(each.syncs.pending for each in status.families))


def troubles_of(status: Status) -> dict[str, str]:
    """What is wrong with Services, by their names; of those of manifests the reason has the name."""
    found: dict[str, str] = {}
    for each in status.troubles:
        _, service, text = f"{each.subject}: {each.reason}".partition("Service ")
        name, colon, why = text.partition(": ")
        if service and colon and " " not in name:
            found.setdefault(name, why)
    return found


def _wanted(family: Family, run_directory: str) -> ForwardingTable:
    """What the agent wants, as far as its dataplane can have it: packets meet nothing else."""
    wanted = agent_socket.table(family, run_directory)
    return fit(wanted.table, wanted.head.capabilities)


def _concerned(asked: Asked, tables: Iterable[ForwardingTable]) -> set[Key]:
    """The Services that an answer may be about."""
    if not isinstance(asked, AskedAddress):
        return {asked.key}
    found = (
        table.routes.get(Frontend(address, asked.protocol, asked.port))
        for table in tables
        for address in (asked.address, b"")
    )
    return {key for route in found if route is not None and (key := key_of_label(route.label)) is not None}


def _services(run_directory: str) -> Iterator[Service]:
    """All that can be read."""
    for each in agent_socket.objects("", run_directory):
        with contextlib.suppress(ObjectError, KeyError, TypeError):
            if each["kind"] == Service.KIND:
                yield convert(Service, each)


def _objects(key: Key, run_directory: str) -> tuple[Service | None, tuple[EndpointSlice, ...]]:
    service: Service | None = None
    slices = []
    try:
        for each in agent_socket.objects(str(key), run_directory):
            if each["kind"] == Service.KIND:
                service = convert(Service, each)
            elif each["kind"] == EndpointSlice.KIND:
                slices.append(convert(EndpointSlice, each))
    except (ObjectError, KeyError, TypeError) as error:
        raise AgentError(f"the agent's objects cannot be read: {error}") from None
    return service, tuple(slices)


def _decision(report: EndpointReport) -> Decision:
    def reason(name: str | None) -> Reason | None:
        try:
            return Reason[name] if name else None
        except KeyError:
            raise AgentError(f"the agent has a reason {name} that this sluice does not know") from None

    return Decision(
        port=report.port,
        endpoint=report.endpoint,
        slice=report.slice,
        node=report.node,
        cluster=reason(report.cluster),
        local=reason(report.local),
    )
