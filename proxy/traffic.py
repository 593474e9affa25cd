"""`sluice dump --counters`: what has passed each Service.

The running agent is asked, which counts where `trafficCounters` says so and in mode userspace always.  Without it, the
flows that connection tracking has open are added up: what has ended is not known then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import msgspec

from proxy import agent_socket, modes
from proxy.agent_socket import RUN_DIRECTORY, AgentError, NoAgentError
from proxy.counters import NOTHING, Ledger, Report, Row, Traffic, by_service_port
from proxy.dump import Filter, Open, read_all
from proxy.output import Format, Shown, frontend_of, select, to_json
from rules.forwarding import Family, Protocol
from rules.netlink.conntrack import DESTINATION_NAT
from rules.netlink.conntrack_table import Conntrack

_TOTALS = ("SERVICE", "PROTOCOL", "OPEN", "CONNECTIONS", "PACKETS IN", "BYTES IN", "PACKETS OUT", "BYTES OUT")
_PARTS = ("SERVICE", "FRONTEND", "BACKEND", *_TOTALS[2:])


class Counted(NamedTuple):
    """What was counted, and by whom."""

    by: str
    """`agent`, or `open flows`: of those alone."""
    report: Report
    rows: list[Row]


def main(
    format_: Format,
    wanted: Filter,
    *,
    run_directory: str = RUN_DIRECTORY,
    open_dataplane: Open = modes.open_dataplane,
    open_conntrack: Callable[[Family], Conntrack] = Conntrack,
) -> int:
    """Print it; 0, 1 if nothing is what was asked for, 2 if something could not be read."""
    shown, problems = read_all(open_dataplane)
    counted, why = count(shown, problems, run_directory, open_conntrack)
    if wanted != Filter():
        shown = [each._replace(table=select(each.table, wanted.admits)) for each in shown]
    rows = _of_tables(counted.rows, shown)
    nothing = [] if rows else ["nothing has passed any Service that is asked about"]
    for problem in (*problems, *([why] if why else []), *counted.report.problems, *nothing):
        sys.stderr.write(f"sluice dump: {problem}\n")
    if format_ in {"json", "yaml"}:
        _write_json(shown, counted, rows)
    else:
        sys.stdout.writelines(f"{line}\n" for line in _lines(rows, wide=format_ == "wide"))
    if problems:
        return 2
    return 1 if wanted != Filter() and not any(each.table.routes for each in shown) else 0


def count(
    shown: Iterable[Shown], problems: list[str], run_directory: str, open_conntrack: Callable[[Family], Conntrack]
) -> tuple[Counted, str]:
    """What was counted, and why it is of open flows only; what could not be read is added to `problems`."""
    try:
        if agent_socket.status(run_directory).network_namespace != agent_socket.network_namespace():
            why = "the agent is of another network namespace than this command"
        else:
            report, rows = agent_socket.counters(run_directory)
            if report.on:
                return Counted("agent", report, rows), ""
            why = "the agent does not count (trafficCounters)"
    except NoAgentError:
        why = "no agent runs"
    except AgentError as error:
        why = str(error)
    rows = []
    for name, table in shown:
        # IPVS translates by itself: its flows lack the bit.
        status = 0 if name == "ipvs" else DESTINATION_NAT
        ledger = Ledger(table.family, lambda table=table: table.routes)  # type: ignore[misc]  # each its own table
        try:
            with open_conntrack(table.family) as conntrack:
                ledger.begin()
                for protocol in Protocol:
                    ledger.see(conntrack.flows(protocol, status))
                ledger.finish()
        except (OSError, ValueError) as error:
            problems.append(f"connection tracking of {table.family.label}: {error}")
        rows += ledger.rows()
    return Counted("open flows", Report(on=False), rows), f"{why}: this is of the flows that are open, and no others"


def _of_tables(rows: Iterable[Row], shown: Iterable[Shown]) -> list[Row]:
    """The rows of frontends that tables have; of service ports, where rows name no frontend."""
    routes = [(each.table.family.label, *each_route) for each in shown for each_route in each.table.routes.items()]
    frontends = {(family, str(frontend)) for family, frontend, _ in routes}
    services = {(family, route.label) for family, _, route in routes}
    return [
        row
        for row in rows
        if ((row.family, row.frontend) in frontends if row.frontend else (row.family, row.service) in services)
    ]


def _lines(rows: Iterable[Row], *, wide: bool) -> Iterator[str]:
    """Aligned text: a line for each service port, or when wide for each of its frontends and backends."""
    if wide:
        cells = [
            (
                row.service,
                row.frontend or "(all)",
                row.backend or ("(gone)" if row.frontend else "(all)"),
                *_figures(row.traffic),
            )
            for row in sorted(rows, key=lambda row: (row.service, row.family, row.frontend, row.backend))
        ]
        heads: tuple[str, ...] = _PARTS
    else:
        totals: dict[tuple[str, str], Traffic] = {}
        for port, traffic in by_service_port(rows).items():
            place = port.service, port.protocol
            totals[place] = totals.get(place, NOTHING) + traffic
        cells = [(*place, *_figures(traffic)) for place, traffic in sorted(totals.items())]
        heads = _TOTALS
    if not cells:
        return
    texts = len(heads) - 6
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for line in (heads, *cells):
        pairs = zip(line, widths, strict=True)
        aligned = (
            cell.ljust(width) if place < texts else cell.rjust(width) for place, (cell, width) in enumerate(pairs)
        )
        yield "  ".join(aligned).rstrip()


def _figures(traffic: Traffic) -> tuple[str, ...]:
    return tuple(
        map(
            str,
            (
                traffic.open,
                traffic.connections,
                traffic.packets_in,
                traffic.bytes_in,
                traffic.packets_out,
                traffic.bytes_out,
            ),
        )
    )


def _write_json(shown: Iterable[Shown], counted: Counted, rows: Iterable[Row]) -> None:
    """The tables as `dump` has them, each route with its traffic."""
    by_frontend: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_frontend.setdefault((row.family, row.frontend or row.service), []).append(row)
    tables: list[dict[str, Any]] = []
    for each in shown:
        table = to_json(each)
        labels = {str(frontend): route.label for frontend, route in each.table.routes.items()}
        for route in table["routes"]:
            frontend = frontend_of(route)
            family = each.table.family.label
            found = by_frontend.get((family, frontend)) or by_frontend.get((family, labels[frontend]), [])
            total = NOTHING
            for row in found:
                total += row.traffic
            route["traffic"] = {
                **msgspec.to_builtins(total),
                "backends": {row.backend: msgspec.to_builtins(row.traffic) for row in found if row.backend},
            }
        tables.append(table)
    value = {"tables": tables, "counters": {"by": counted.by, **msgspec.to_builtins(counted.report)}}
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
