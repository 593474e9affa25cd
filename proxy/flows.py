"""`sluice conntrack`: the flows through Services, and which of them are stale.

Whose flow it is, is read from the kernel's rules.  What is stale is told by the running agent, which knows the
endpoints that serve without being used for new connections.  Without an agent the rules have to do: then an endpoint
that terminates and still serves counts as gone.

In mode userspace connection tracking has no flow of a Service: a note says where they are.

0: done.  1: no Service is what was asked for.  2: something could not be read or deleted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TextIO

from proxy import agent_socket, dump, modes
from proxy.agent_socket import RUN_DIRECTORY, AgentError, NoAgentError
from proxy.conntrack import Serving, is_stale
from proxy.output import Shown
from rules.dataplane import Dataplane, DataplaneError
from rules.forwarding import Address, Backend, Family, ForwardingTable, Frontend, Protocol
from rules.netlink.conntrack import ANSWERED, Flow
from rules.netlink.conntrack_table import Conntrack

Format = Literal["table", "count", "json"]
Open = Callable[[str, Family], Dataplane]

_RELAYED = (
    "in mode userspace workers carry the flows, and connection tracking has none: sluice dump --counters counts those "
    "that are open, sluice trace tells of new ones, and UDP flows to endpoints that are gone end by themselves"
)
_HEADINGS = ("SERVICE", "CLIENT", "FRONTEND", "BACKEND", "STATE")
_COUNT_HEADINGS = ("SERVICE", "BACKEND", "FLOWS", "UNANSWERED", "STALE")


class Found(NamedTuple):
    """A flow through a Service."""

    family: Family
    service: str
    """`namespace/service:port`; empty where the kernel holds no label."""
    flow: Flow
    stale: bool
    draining: bool = False
    """Whether its endpoint gets no new connections, and it is left to go on."""

    @property
    def client(self) -> str:
        return str(Backend(self.flow.source, self.flow.source_port))

    @property
    def frontend(self) -> str:
        flow = self.flow
        return str(Frontend(flow.destination, Protocol(flow.protocol), flow.port))

    @property
    def backend(self) -> str:
        """Empty when none was chosen."""
        return str(self.flow.backend) if self.flow.translated else ""

    @property
    def answered(self) -> bool:
        return bool(self.flow.status & ANSWERED)


class Chosen(NamedTuple):
    """Which flows are asked for; what is empty admits all."""

    service: str = ""
    """A Service or one of its ports: `name`, `namespace/name` or `namespace/name:port`."""
    address: Address = b""
    """Of the client, the frontend or the backend."""
    stale: bool = False
    """Stale ones alone."""

    def names(self, label: str) -> bool:
        """Whether a Service's port is asked for."""
        key, _, _ = label.partition(":")
        return self.service in {"", label, key, key.partition("/")[2]}

    def admits(self, found: Found) -> bool:
        """Whether a flow is asked for."""
        flow = found.flow
        return (
            self.names(found.service)
            and self.address in {b"", flow.source, flow.destination, flow.reply_source}
            and (found.stale or not self.stale)
        )


class Report(NamedTuple):
    """The flows of a node."""

    judge: str
    """Who said what is stale: `the agent`, `the rules`."""
    flows: Sequence[Found]
    problems: Sequence[str] = ()
    """What could not be read or deleted, a line each."""
    tables: int = 1
    """How many families have rules of ours."""
    deleted: int | None = None
    """How many were deleted; None: none was to be."""
    whose: str = "sluice"
    """The proxy whose Services they go through."""
    notes: Sequence[str] = ()
    """What should be known beside them, a line each."""
    unknown: str = ""
    """The Service that was asked for, if none of that name has a frontend."""


def main(
    format_: Format,
    *,
    chosen: Chosen = Chosen(),  # noqa: B008  # immutable
    delete_stale: bool = False,
    run_directory: str = RUN_DIRECTORY,
    open_dataplane: Open = modes.open_dataplane,
    open_conntrack: Callable[[Family], Conntrack] = Conntrack,
    other: bool = False,
    out: TextIO | None = None,
) -> int:
    """Print the flows, or delete the stale ones and print those; `other`: those through kube-proxy's rules."""
    report = look(
        chosen,
        delete_stale=delete_stale,
        run_directory=run_directory,
        open_dataplane=open_dataplane,
        open_conntrack=open_conntrack,
        other=other,
    )
    return show(report, format_, sys.stdout if out is None else out)


def look(
    chosen: Chosen = Chosen(),  # noqa: B008  # immutable
    *,
    delete_stale: bool = False,
    run_directory: str = RUN_DIRECTORY,
    open_dataplane: Open = modes.open_dataplane,
    open_conntrack: Callable[[Family], Conntrack] = Conntrack,
    other: bool = False,
    tables: Sequence[ForwardingTable] | None = None,
) -> Report:
    """The flows of this node.

    Args:
        chosen: which of them.
        delete_stale: delete the stale ones; no others are told of.
        run_directory: the agent's.
        open_dataplane: how the node's rules are read.
        open_conntrack: how its flows are.
        other: those through kube-proxy's rules.
        tables: the node's tables, where they are known already; None: read them.
    """
    problems: list[str] = []
    if tables is None:
        shown, problems = _read_other() if other else dump.read_all(open_dataplane)
        tables = [each.table for each in shown]
    found: list[Found] = []
    deleted: int | None = 0 if delete_stale else None
    chosen = chosen._replace(stale=chosen.stale or delete_stale)
    judge = "the agent"
    notes: list[str] = []
    labelled = any(chosen.names(route.label) for table in tables for route in table.routes.values())
    unknown = chosen.service if tables and not labelled else ""
    for table in tables:
        if table.node.relayed:
            notes = [_RELAYED]
            continue
        serving = _ask(table.family, run_directory, problems)
        if serving is None:
            judge, serving = "the rules", serving_of(table)
        try:
            with open_conntrack(table.family) as conntrack:
                flows = sorted(filter(chosen.admits, through(table, serving, conntrack)), key=_place)
                if deleted is not None:
                    deleted += conntrack.delete(each.flow for each in flows)
        except (OSError, ValueError) as error:
            problems.append(f"connection tracking of {table.family.label}: {error}")
            continue
        found += flows
    whose = "kube-proxy" if other else "sluice"
    return Report(judge, found, problems, len(tables), deleted, whose, notes, "" if found else unknown)


def _read_other() -> tuple[list[Shown], list[str]]:
    """kube-proxy's tables, and why they could not be read."""
    from proxy.foreign.sources import from_node  # noqa: PLC0415  # the decoders, for those who ask for it
    from rules.foreign.gathering import ForeignError  # noqa: PLC0415  # likewise

    try:
        return [Shown(each.dataplane, each.reading.table) for each in from_node()], []
    except (ForeignError, DataplaneError) as error:
        return [], [str(error)]


def show(report: Report, format_: Format, out: TextIO) -> int:
    """Print what was found; the exit code, as the head of this module says."""
    for problem in (*report.problems, *report.notes):
        sys.stderr.write(f"sluice conntrack: {problem}\n")
    if not report.tables and not report.problems:
        sys.stderr.write(f"sluice conntrack: nothing of {report.whose} is in the kernel of this network namespace\n")
    elif report.unknown:
        sys.stderr.write(f"sluice conntrack: no Service {report.unknown} has a frontend here: sluice dump lists them\n")
    elif not report.flows and not (report.problems or report.notes) and report.deleted is None:
        sys.stderr.write("sluice conntrack: there is no such flow\n")
    deleted = report.deleted
    if format_ == "json":
        value: dict[str, Any] = {"judgedBy": report.judge, "flows": [to_json(each) for each in report.flows]}
        value["notes"] = list(report.notes)
        out.write(json.dumps(value if deleted is None else {**value, "deleted": deleted}, indent=2) + "\n")
    else:
        out.writelines(f"{line}\n" for line in (_counts if format_ == "count" else _lines)(report.flows))
        stale = sum(each.stale for each in report.flows)
        if deleted is not None:
            out.write(f"{_count(deleted, 'stale flow')} deleted, judged by {report.judge}\n")
        elif stale:
            out.write(f"{_count(stale, 'flow')} of {len(report.flows)} stale, judged by {report.judge}")
            out.write(": sluice conntrack --delete-stale deletes them\n")
    return 2 if report.problems else int(bool(report.unknown))


def serving_of(table: ForwardingTable) -> dict[Frontend, Serving]:
    """What rules alone say of who serves the UDP frontends: those that new connections are given to."""
    return {
        frontend: route.backends | (route.local_backends or frozenset())
        for frontend, route in table.routes.items()
        if frontend.protocol is Protocol.UDP
    }


def through(table: ForwardingTable, serving: Mapping[Frontend, Serving], conntrack: Conntrack) -> Iterator[Found]:
    """The flows to the frontends of a table.

    Raises:
        OSError: the kernel refused.
        DecodeError: what it said is no list of flows.
    """
    for protocol in Protocol:
        for flow in conntrack.flows(protocol):
            stale = is_stale(flow, serving)
            route = table.routes.get(Frontend(flow.destination, protocol, flow.port))
            if route is None and (flow.translated or stale):
                # Untranslated, it would be anybody's that has the same port.
                route = table.routes.get(Frontend(b"", protocol, flow.port))
            if route is not None:
                used = route.backends if route.local_backends is None else route.backends | route.local_backends
                draining = not stale and flow.translated and flow.backend not in used
                yield Found(table.family, route.label, flow, stale, draining)


def _ask(family: Family, run_directory: str, problems: list[str]) -> dict[Frontend, Serving] | None:
    try:
        if agent_socket.status(run_directory).network_namespace != agent_socket.network_namespace():
            return None
        return agent_socket.serving(family, run_directory)
    except NoAgentError:
        return None
    except AgentError as error:
        problems.append(str(error))
        return None


def _place(found: Found) -> tuple[str, str, str]:
    return found.service, found.frontend, found.client


def _state(found: Found) -> str:
    state = "answered" if found.answered else "unanswered"
    if found.draining:
        return f"{state}, draining"
    return f"{state}, stale" if found.stale else state


def _lines(found: Iterable[Found]) -> Iterator[str]:
    yield from _table(
        _HEADINGS,
        [(each.service or "-", each.client, each.frontend, each.backend or "none", _state(each)) for each in found],
    )


def _counts(found: Iterable[Found]) -> Iterator[str]:
    """How many flows each backend of each Service has."""
    counts: dict[tuple[str, str], list[int]] = {}
    for each in found:
        count = counts.setdefault((each.service or "-", each.backend or "none"), [0, 0, 0])
        for place, counted in enumerate((True, not each.answered, each.stale)):
            count[place] += counted
    yield from _table(_COUNT_HEADINGS, [(*key, *map(str, count)) for key, count in sorted(counts.items())])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _table(headings: Sequence[str], found: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows under headings; nothing where there are no rows."""
    if not found:
        return
    rows = [headings, *found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def to_json(found: Found) -> dict[str, Any]:
    return {
        "family": found.family.label,
        "service": found.service,
        "protocol": Protocol(found.flow.protocol).name,
        "client": found.client,
        "frontend": found.frontend.partition("/")[0],
        "backend": found.backend or None,
        "masqueraded": found.flow.masqueraded,
        "answered": found.answered,
        "stale": found.stale,
        "draining": found.draining,
    }
