"""`sluice conntrack`: the flows through Services, and which of them are stale.

Whose flow it is, is read from the kernel's rules.  What is stale is told by the running agent, which knows the
endpoints that serve without being used for new connections.  Without an agent the rules have to do: then an endpoint
that terminates and still serves counts as gone.

0: done.  2: something could not be read or deleted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TextIO

from proxy import agent_socket, dump, modes
from proxy.agent_socket import RUN_DIRECTORY, AgentError, NoAgentError
from proxy.conntrack import Serving, is_stale
from rules.dataplane import Dataplane
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, Protocol
from rules.netlink.conntrack import ANSWERED, Flow
from rules.netlink.conntrack_table import Conntrack

Format = Literal["table", "json"]
Open = Callable[[str, Family], Dataplane]

_HEADINGS = ("SERVICE", "CLIENT", "FRONTEND", "BACKEND", "STATE")


class Found(NamedTuple):
    """A flow through a Service."""

    family: Family
    service: str
    """`namespace/service:port`; empty where the kernel holds no label."""
    flow: Flow
    stale: bool

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


def main(
    format_: Format,
    *,
    delete_stale: bool = False,
    run_directory: str = RUN_DIRECTORY,
    open_dataplane: Open = modes.open_dataplane,
    open_conntrack: Callable[[Family], Conntrack] = Conntrack,
    out: TextIO | None = None,
) -> int:
    """Print the flows, or delete the stale ones and print those."""
    out = sys.stdout if out is None else out
    shown, problems = dump.read_all(open_dataplane)
    found: list[Found] = []
    deleted: int | None = 0 if delete_stale else None
    judge = "the agent"
    for table in (each.table for each in shown):
        serving = _ask(table.family, run_directory, problems)
        if serving is None:
            judge, serving = "the rules", serving_of(table)
        try:
            with open_conntrack(table.family) as conntrack:
                flows = sorted(through(table, serving, conntrack), key=_place)
                if deleted is not None:
                    flows = [each for each in flows if each.stale]
                    deleted += conntrack.delete(each.flow for each in flows)
        except (OSError, ValueError) as error:
            problems.append(f"connection tracking of {table.family.label}: {error}")
            continue
        found += flows
    for problem in problems:
        sys.stderr.write(f"sluice conntrack: {problem}\n")
    if not shown and not problems:
        sys.stderr.write("sluice conntrack: nothing of sluice is in the kernel of this network namespace\n")
    if format_ == "json":
        value: dict[str, Any] = {"judgedBy": judge, "flows": [_to_json(each) for each in found]}
        out.write(json.dumps(value if deleted is None else {**value, "deleted": deleted}, indent=2) + "\n")
    else:
        out.writelines(f"{line}\n" for line in _lines(found))
        if deleted is not None:
            out.write(f"{deleted} stale flow{'' if deleted == 1 else 's'} deleted, judged by {judge}\n")
    return 2 if problems else 0


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
                yield Found(table.family, route.label, flow, stale)


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
    return f"{state}, stale" if found.stale else state


def _lines(found: Iterable[Found]) -> Iterator[str]:
    rows = [_HEADINGS]
    rows += [(each.service or "-", each.client, each.frontend, each.backend or "none", _state(each)) for each in found]
    if len(rows) == 1:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _to_json(found: Found) -> dict[str, Any]:
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
    }
