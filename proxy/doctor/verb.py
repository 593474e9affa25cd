"""`sluice doctor`: everything that may keep connections from their Services on this node, worst first.

    the agent, or manifests ─┐
    the kernel's tables ─────┼─▶ Known ─▶ findings ─▶ a line each
    the rest of the node ────┘

The checks are those of `sluice explain`, asked of every frontend at once: a finding is a likely cause
(`proxy.explain.causes`) of a connection that fails, or would.  What holds for the whole node is asked once per family,
of a connection that comes from outside and goes to a pod elsewhere.  Nothing is sent and nothing is changed.

0: nothing is wrong.  1: something is.  2: something could not be looked at, so that nobody can tell.
"""

from __future__ import annotations

import socket
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, TextIO

import msgspec

from proxy import agent_socket, flows, verify
from proxy.agent_socket import AgentError, NoAgentError
from proxy.compute import View, semantics_of
from proxy.config.settings import Settings
from proxy.doctor.findings import Known, findings, lines
from proxy.explain.evidence import Cluster
from proxy.explain.gather import Means
from proxy.explain.obstacles import backends_of
from proxy.explain.surroundings import Surroundings
from proxy.objects import ZONE_LABEL, EndpointSlice, Key, Node, ObjectError, Service, by_service, convert
from proxy.report import Status
from proxy.verify import CannotTellError, Verified
from rules.dataplane import DataplaneError
from rules.diff import fit
from rules.forwarding import Family, ForwardingTable
from rules.words import one_line

Format = Literal["text", "json"]

WRITES_TO_CHECK = "iptables"
"""The mode whose check makes a chain and takes it away: who only looks does without."""


def main(
    settings: Settings,
    filename: str,
    format_: Format,
    *,
    out: TextIO | None = None,
    means: Means = Means(),  # noqa: B008  # immutable
) -> int:
    """Look, print, and return what the head of this module says.

    Args:
        settings: the effective configuration; without manifests only where the agent's socket is.
        filename: manifests, in place of the agent; `-` is standard input; empty: ask the agent.
        format_: how to print it.
        out: standard output unless given.
        means: how this node is read.
    """
    out = sys.stdout if out is None else out
    try:
        known = from_manifests(settings, filename, means) if filename else from_agent(settings.run_directory, means)
    except (CannotTellError, AgentError) as error:
        sys.stderr.write(f"sluice doctor: {error}\n")
        return 2
    return tell(known, format_, out)


def tell(known: Known, format_: Format, out: TextIO) -> int:
    """Print what is wrong; the exit code, as the head of this module says."""
    found = findings(known)
    for line in known.unread:
        sys.stderr.write(f"sluice doctor: {line}\n")
    wrong = any(each.severity != "note" for each in found)
    if format_ == "json":
        value = {"healthy": not wrong and not known.unread, "findings": found, "unread": known.unread}
        out.write(msgspec.json.format(msgspec.json.encode(value)).decode() + "\n")
    else:
        out.writelines(f"{one_line(line)}\n" for line in lines(found, known))
    return 2 if known.unread else int(wrong)


# --- looking ---------------------------------------------------------------------------------------------------------


def from_agent(run_directory: str, means: Means = Means()) -> Known:  # noqa: B008  # immutable
    """What the running agent knows, and this node's kernel; without an agent the kernel alone.

    Raises:
        AgentError: the agent's objects cannot be read.
    """
    try:
        status = agent_socket.status(run_directory)
    except NoAgentError as error:
        return _without_agent(str(error), means)
    except AgentError as error:
        # One is there, and this command may not ask it, or gets no answer.
        known = _without_agent(str(error), means)
        return msgspec.structs.replace(known, absent="", unread=(f"the agent: {error}", *known.unread))
    unread: list[str] = []
    lacking: tuple[str, ...] = ()
    verified: tuple[Verified, ...] = ()
    surroundings: Surroundings | None = None
    stale: Mapping[str, int] = {}
    labels = {family.label: family for family in Family}
    served = {labels[each.family]: each.dataplane for each in status.families}
    wanted = {family: agent_socket.table(family, run_directory) for family in served}
    tables = {family: fit(table, head.capabilities) for family, (table, head) in wanted.items()}
    if status.network_namespace == agent_socket.network_namespace():
        surroundings = _around(tables.values(), means)
        lacking = tuple(lacking_of(in_doubt(status), means))
        stale = stale_of(
            flows.look(
                flows.Chosen(stale=True),
                run_directory=run_directory,
                open_conntrack=means.open_conntrack,
                tables=tuple(tables.values()),
            )
        )
    try:
        if status.synced:
            verified = tuple(verify.against_agent(run_directory, means.open_dataplane))
    except (AgentError, CannotTellError, DataplaneError) as error:
        unread.append(f"the kernel is not compared: {error}")
    return Known(
        tables=tables,
        cluster=cluster_of(agent_socket.objects("", run_directory), status),
        status=status,
        surroundings=surroundings,
        verified=verified,
        stale=stale,
        lacking=lacking,
        unread=tuple(unread),
    )


def from_manifests(settings: Settings, filename: str, means: Means = Means()) -> Known:  # noqa: B008  # immutable
    """What manifests come to on this node, and its kernel.

    Raises:
        CannotTellError: the manifests cannot be read or used.
    """
    from proxy import modes  # noqa: PLC0415  # as below: only where manifests are asked about
    from proxy.interfaces import read_addresses  # noqa: PLC0415  # netlink
    from proxy.offline import standing_of  # noqa: PLC0415  # the parsers
    from proxy.render import render_on  # noqa: PLC0415  # likewise
    from proxy.sources.manifest_files import Unreadable  # noqa: PLC0415  # likewise
    from proxy.sources.manifest_loading import given  # noqa: PLC0415  # likewise
    from proxy.sources.manifest_objects import FileError  # noqa: PLC0415  # likewise

    try:
        loaded = given(filename)
        standing = standing_of(loaded, settings, socket.gethostname(), read_addresses())
        rendered = render_on(standing, loaded.services)
    except (Unreadable, FileError) as error:
        raise CannotTellError(str(error)) from None
    except ValueError as error:
        raise CannotTellError(f"--hostname-override: {error}") from None
    if loaded.unusable:
        raise CannotTellError(f"nothing in {filename} can be used")
    supported = modes.supported_families()
    tables = {table.family: table for table in rendered.tables if table.family in supported}
    unread: list[str] = []
    verified: tuple[Verified, ...] = ()
    lacking: tuple[str, ...] = ()
    try:
        mode = modes.choose(settings.mode, settings.iptables_backend)
        if mode != WRITES_TO_CHECK:
            lacking = tuple(lacking_of(dict.fromkeys(tables, mode), means))
        verified = tuple(verify.against_tables(tables.values(), mode, means.open_dataplane))
    except DataplaneError as error:
        unread.append(f"the kernel is not compared: {error}")
    return Known(
        tables=tables,
        cluster=Cluster(
            view=standing.view,
            services={each.key: each for each in loaded.services},
            slices=standing.slices,
        ),
        surroundings=_around(tables.values(), means),
        verified=verified,
        compare=f"sluice verify -f {filename}",
        problems=rendered.problems,
        lacking=lacking,
        unread=tuple(unread),
    )


def _around(tables: Iterable[ForwardingTable], means: Means) -> Surroundings:
    """The node beside our rules, and its ways to these tables' backends."""
    return means.look(*backends_of(route for table in tables for route in table.routes.values()))


def _without_agent(why: str, means: Means) -> Known:
    from proxy.dump import read_all  # noqa: PLC0415  # only where no agent answers

    shown, failures = read_all(means.open_dataplane)
    tables: dict[Family, ForwardingTable] = {}
    for _, table in shown:
        # Remains of another mode may be there too.
        if table.family not in tables or len(tables[table.family].routes) < len(table.routes):
            tables[table.family] = table
    unread = tuple(f"the kernel could not be read: {each}" for each in failures)
    if not shown and not unread and means.look().other_proxies:
        return _of_another(why, means)
    return Known(tables=tables, surroundings=_around(tables.values(), means), absent=why, unread=unread)


def _of_another(why: str, means: Means) -> Known:
    """What is known of a node whose Services another proxy carries."""
    from proxy.foreign.explain import one_each  # noqa: PLC0415  # where sluice's rules are, nobody needs it
    from proxy.foreign.sources import PROXY, from_node, without_them  # noqa: PLC0415  # likewise
    from rules.foreign.gathering import ForeignError  # noqa: PLC0415  # likewise

    unread: tuple[str, ...] = ()
    carrier = ""
    tables: dict[Family, ForwardingTable] = {}
    try:
        readings, problems = one_each(from_node())
        unread = tuple(problems)
        tables = {family: each.reading.table for family, each in readings.items()}
        carrier = PROXY if tables else ""
    except (ForeignError, DataplaneError) as error:
        unread = (f"rules of another proxy could not be read: {error}",)
    node = _around(tables.values(), means)
    return Known(
        tables=tables,
        surroundings=without_them(node) if tables else node,
        absent=why,
        carrier=carrier,
        unread=unread,
    )


def stale_of(report: flows.Report) -> dict[str, int]:
    """How many flows are stale, by the label of their Service's port."""
    return dict(Counter(each.service for each in report.flows if each.stale))


def in_doubt(status: Status) -> dict[Family, str]:
    """The dataplanes of which nobody knows whether the kernel has what they need: what they wrote would show it."""
    labels = {family.label: family for family in Family}
    return {
        labels[each.family]: each.dataplane for each in status.families if each.syncs.failures or not each.syncs.count
    }


def lacking_of(dataplanes: Mapping[Family, str], means: Means) -> Iterator[str]:
    """What this node does not have that these dataplanes need."""
    for family, name in dataplanes.items():
        try:
            dataplane = means.open_dataplane(name, family)
            try:
                dataplane.check()
            finally:
                dataplane.close()
        except DataplaneError as error:
            yield f"{name} does not work for {family.label}: {error}"


def cluster_of(objects: Iterable[Mapping[str, object]], status: Status) -> Cluster:
    """The objects of an agent, as they come over its socket, seen from its node.

    Raises:
        AgentError: they cannot be read.
    """
    services: dict[Key, Service] = {}
    slices: list[EndpointSlice] = []
    zone = ""
    try:
        for each in objects:
            kind = each["kind"]
            if kind == Service.KIND:
                service = convert(Service, each)
                services[service.key] = service
            elif kind == EndpointSlice.KIND:
                slices.append(convert(EndpointSlice, each))
            elif kind == Node.KIND:
                zone = convert(Node, each).metadata.labels.get(ZONE_LABEL, "")
    except (ObjectError, KeyError, TypeError) as error:
        raise AgentError(f"the agent's objects cannot be read: {error}") from None
    view = View(node_name=status.node, zone=zone, semantics=semantics_of(status.behaviour))
    return Cluster(view=view, services=services, slices=by_service(slices))
