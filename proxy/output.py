"""Forwarding tables for people and for programs: rows, aligned text, JSON.

Everything is sorted, so that equal tables print alike: by Service, kind and frontend, backends by address and port.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TextIO

from rules.diff import detector_words
from rules.forwarding import (
    Backend,
    ForwardingTable,
    Frontend,
    InputInterface,
    Kind,
    NodeFacts,
    Refusal,
    Route,
    SourcePrefix,
    format_address,
)

Format = Literal["table", "wide", "json", "yaml"]

SHOWN_BACKENDS = 3
"""How many backends a row shows unless it is wide."""

COLOURED = 2000
"""Routes of a table that a terminal shows in colour: more take seconds to lay out."""

_KINDS = {kind: place for place, kind in enumerate(Kind)}
_REFUSALS = {Refusal.REJECT: "rejected", Refusal.DROP: "dropped"}


class Row(NamedTuple):
    """One frontend, in text."""

    service: str
    """`namespace/service:port`; empty where the kernel holds no label."""
    kind: str
    frontend: str
    policy: str
    """`Cluster` or `Local`; empty for a ClusterIP."""
    backends: tuple[str, ...]
    local_backends: tuple[str, ...] | None
    refusal: str
    """`rejected` or `dropped`: what happens to those who find no backend; else empty."""
    ranges: tuple[str, ...]
    affinity: int
    scheduler: str
    """How a backend is chosen; empty: at random."""
    proxy_protocol: bool
    masquerade: str
    """Whose source is rewritten (see `masquerade`); empty where there is no backend."""


class Shown(NamedTuple):
    """A table, and where it comes from."""

    dataplane: str
    """The dataplane that holds it; empty for one that none holds."""
    table: ForwardingTable


def table_rows(table: ForwardingTable) -> list[Row]:
    """The routes of a table as text, sorted."""
    return [_row(frontend, route, table.node) for frontend, route in _sorted_routes(table)]


def select(table: ForwardingTable, wanted: Callable[[Frontend, Route], bool]) -> ForwardingTable:
    """The table with those routes alone, and without its hairpins: for showing only."""
    return ForwardingTable(
        family=table.family,
        node=table.node,
        routes={frontend: route for frontend, route in table.routes.items() if wanted(frontend, route)},
        damage=table.damage,
    )


def write(shown: Sequence[Shown], format_: Format, out: TextIO | None = None) -> None:
    """Print tables to `out` (standard output unless given); with colours where that is a terminal."""
    out = sys.stdout if out is None else out
    if format_ in {"json", "yaml"}:
        value = {"tables": [to_json(each) for each in shown]}
        out.write(_yaml(value) if format_ == "yaml" else json.dumps(value, indent=2) + "\n")
        return
    wide = format_ == "wide"
    for index, each in enumerate(shown):
        if index:
            out.write("\n")
        if out.isatty() and len(each.table.routes) <= COLOURED:
            _write_rich(each, out, wide=wide)
        else:
            _write_plain(each, out, wide=wide)


def to_json(shown: Shown) -> dict[str, Any]:
    """A table as values that JSON has, addresses as text."""
    table = shown.table
    result: dict[str, Any] = {"dataplane": shown.dataplane} if shown.dataplane else {}
    return result | {
        "family": table.family.label,
        "node": _facts_json(table.node),
        "routes": [_route_json(frontend, route, table.node) for frontend, route in _sorted_routes(table)],
        "hairpins": [str(endpoint) for endpoint in sorted(table.hairpins)],
        "damage": sorted(table.damage),
    }


def frontend_of(route: Mapping[str, Any]) -> str:
    """The frontend of a route of `to_json`, as `str` of a `Frontend` has it."""
    address = route["address"]
    host = "*" if address is None else f"[{address}]" if ":" in address else address
    return f"{host}:{route['port']}/{route['protocol']}"


def masquerade(route: Route, node: NodeFacts) -> str:
    """Whose source is rewritten to the node's address, but for a backend that reaches itself (TRF-3 to TRF-7)."""
    if not route.backends:
        return ""
    if route.kind is not Kind.CLUSTER_IP:
        return "the node" if route.policy_local else "everybody"
    if node.masquerade_all:
        return "everybody"
    return "who is no local pod" if node.detector is not None else "nobody"


def facts_lines(table: ForwardingTable) -> Iterator[str]:
    """What holds for every route of a table, a line each."""
    node = table.node
    if not node.relayed:
        yield f"mark            {node.mark:#x}" + (
            ", every ClusterIP connection masqueraded" if node.masquerade_all else ""
        )
    yield f"local pods      {detector_words(node.detector)}"
    if node.node_port_addresses is None:
        ports = "every address but loopback"
    else:
        ports = ", ".join(_addresses(node.node_port_addresses)) or "no address"
    loopback = "127.0.0.1" if node.relayed else "127.0.0.0/8"
    yield f"node ports on   {ports}" + (f", and {loopback}" if node.loopback_node_ports else "")
    networks = ", ".join(map(str, node.service_cidrs))
    unallocated = f": unallocated addresses are {'refused' if node.relayed else 'dropped'}" if networks else ""
    yield f"service CIDRs   {networks or 'none known'}{unallocated}"
    yield f"closed ports    of a ClusterIP are {'rejected' if node.reject_closed_ports else 'left alone'}"
    if node.health_check_ports:
        yield f"health checks   let in at {', '.join(map(str, sorted(node.health_check_ports)))}"


def _sorted_routes(table: ForwardingTable) -> list[tuple[Frontend, Route]]:
    def place(item: tuple[Frontend, Route]) -> tuple[str, int, Frontend]:
        frontend, route = item
        return route.label or "\U0010ffff", _KINDS[route.kind], frontend

    return sorted(table.routes.items(), key=place)


def _row(frontend: Frontend, route: Route, node: NodeFacts) -> Row:
    return Row(
        service=route.label,
        kind=route.kind.value,
        frontend=str(frontend),
        policy=_policy(route),
        backends=_backends(route.backends),
        local_backends=None if route.local_backends is None else _backends(route.local_backends),
        refusal="" if route.refusal is None else _REFUSALS[route.refusal],
        ranges=tuple(map(str, route.source_ranges)),
        affinity=route.affinity,
        scheduler=route.scheduler,
        proxy_protocol=route.proxy_protocol,
        masquerade=masquerade(route, node),
    )


def _policy(route: Route) -> str:
    if route.kind is Kind.CLUSTER_IP:
        return ""
    return "Local" if route.policy_local else "Cluster"


def _backends(backends: Iterable[Backend]) -> tuple[str, ...]:
    return tuple(str(backend) for backend in sorted(backends))


def _addresses(addresses: Iterable[bytes]) -> list[str]:
    return [format_address(address) for address in sorted(addresses)]


def _facts_json(node: NodeFacts) -> dict[str, Any]:
    detector: dict[str, str] | None = None
    if isinstance(node.detector, SourcePrefix):
        detector = {"sourcePrefix": str(node.detector.prefix)}
    elif isinstance(node.detector, InputInterface):
        detector = {"interface": node.detector.name}
    elif node.detector is not None:
        detector = {"interfacePrefix": node.detector.prefix}
    addresses = node.node_port_addresses
    return {
        "mark": node.mark,
        "masqueradeAll": node.masquerade_all,
        "detector": detector,
        "nodePortAddresses": None if addresses is None else _addresses(addresses),
        "loopbackNodePorts": node.loopback_node_ports,
        "rejectClosedPorts": node.reject_closed_ports,
        "serviceCIDRs": list(map(str, node.service_cidrs)),
        "healthCheckPorts": sorted(node.health_check_ports),
    }


def _route_json(frontend: Frontend, route: Route, node: NodeFacts) -> dict[str, Any]:
    return {
        "service": route.label,
        "kind": route.kind.value,
        "address": format_address(frontend.address) if frontend.address else None,
        "protocol": frontend.protocol.name,
        "port": frontend.port,
        "policy": _policy(route) or None,
        "backends": list(_backends(route.backends)),
        "localBackends": None if route.local_backends is None else list(_backends(route.local_backends)),
        "refusal": None if route.refusal is None else route.refusal.value,
        "affinitySeconds": route.affinity,
        "sourceRanges": list(map(str, route.source_ranges)),
        "scheduler": route.scheduler or None,
        "proxyProtocol": route.proxy_protocol,
        "masquerade": masquerade(route, node),
    }


def _yaml(value: Any) -> str:
    """A value as YAML; PyYAML would take seconds where there are thousands of Services."""
    return "".join(f"{line}\n" for line in _yaml_lines(value))


def _yaml_lines(value: dict[str, Any]) -> Iterator[str]:
    for name, each in value.items():
        if isinstance(each, dict) and each:
            yield f"{name}:"
            yield from (f"  {line}" for line in _yaml_lines(each))
        elif isinstance(each, list) and each:
            yield f"{name}:"
            for item in each:
                if isinstance(item, dict):
                    first, *rest = _yaml_lines(item)
                    yield f"- {first}"
                    yield from (f"  {line}" for line in rest)
                else:
                    yield f"- {_yaml_scalar(item)}"
        else:
            yield f"{name}: {_yaml_scalar(each)}"


def _yaml_scalar(value: Any) -> str:
    # JSON is YAML, but for characters that it writes as two; words that mean nothing else need no quotes.
    if not isinstance(value, str) or (value.isascii() and not _PLAIN.fullmatch(value)):
        return json.dumps(value)
    if _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    return (
        '"' + "".join(json.dumps(each)[1:-1] if each < "\U00010000" else f"\\U{ord(each):08x}" for each in value) + '"'
    )


_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9/_.-]*(:[A-Za-z0-9/_.-]+)*")
_YAML_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null"})


# --- text ----------------------------------------------------------------------------------------------------

_HEADINGS = ("SERVICE", "KIND", "FRONTEND", "POLICY", "BACKENDS", "NOTES")


def _cells(row: Row, *, wide: bool) -> tuple[str, ...]:
    notes = []
    if row.local_backends is not None:
        notes.append(f"from outside: {_list(row.local_backends, wide=wide)}")
    if row.refusal:
        notes.append(f"without backend: {row.refusal}")
    if row.ranges:
        notes.append(f"only from {_list(row.ranges, wide=wide)}")
    if row.affinity:
        notes.append(f"affinity {row.affinity}s")
    if row.scheduler:
        notes.append(f"scheduler {row.scheduler}")
    if row.proxy_protocol:
        notes.append("PROXY protocol")
    if wide and row.masquerade:
        notes.append(f"masqueraded: {row.masquerade}")
    backends = _list(row.backends, wide=wide)
    return row.service or "-", row.kind, row.frontend, row.policy or "-", backends, "; ".join(notes)


def _list(items: Sequence[str], *, wide: bool) -> str:
    shown = items if wide else items[:SHOWN_BACKENDS]
    more = f" +{len(items) - len(shown)} more" if len(items) > len(shown) else ""
    return ", ".join(shown) + more if items else "none"


def _title(shown: Shown) -> str:
    count = len(shown.table.routes)
    where = f" in {shown.dataplane}" if shown.dataplane else ""
    return f"{shown.table.family.label}{where}: {count} frontend{'' if count == 1 else 's'}"


def _write_plain(shown: Shown, out: TextIO, *, wide: bool) -> None:
    out.write(f"{_title(shown)}\n")
    if wide or shown.table.routes:
        out.writelines(f"  {line}\n" for line in facts_lines(shown.table))
    out.writelines(f"  DAMAGE          {sentence}\n" for sentence in sorted(shown.table.damage))
    cells = [_cells(row, wide=wide) for row in table_rows(shown.table)]
    if not cells:
        return
    cells.insert(0, _HEADINGS)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line_cells in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(line_cells, widths, strict=True))
        out.write(f"{line.rstrip()}\n")


_WRAPPED = frozenset({"BACKENDS", "NOTES"})
"""Columns that are wrapped between words where a terminal is narrow."""


def _write_rich(shown: Shown, out: TextIO, *, wide: bool) -> None:
    from rich.console import Console  # noqa: PLC0415  # 60 ms that a pipe does without
    from rich.table import Table  # noqa: PLC0415  # likewise
    from rich.text import Text  # noqa: PLC0415  # likewise

    console = Console(file=out)
    console.print(Text(_title(shown), style="bold"))
    for line in facts_lines(shown.table) if wide or shown.table.routes else ():
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    for sentence in sorted(shown.table.damage):
        console.print(Text(f"  DAMAGE          {sentence}", style="bold red"), soft_wrap=True)
    rows = table_rows(shown.table)
    if not rows:
        return
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    styles: Mapping[str, str] = {"SERVICE": "cyan", "FRONTEND": "green", "NOTES": "yellow"}
    cells = [_cells(row, wide=wide) for row in rows]
    least = 0
    for heading, column in zip(_HEADINGS, zip(*cells, strict=True), strict=True):
        whole = heading not in _WRAPPED
        texts = [heading, *column] if whole else [heading, *(word for cell in column for word in cell.split())]
        longest = max(map(len, texts))
        grid.add_column(heading, style=styles.get(heading), overflow="fold", no_wrap=whole, min_width=longest)
        least += longest + 2
    for each in cells:
        grid.add_row(*map(Text, each))
    # In a terminal that is too narrow for whole names and addresses its own way of wrapping lines has to do.
    wide_enough = Console(file=out, width=max(console.width, least))
    wide_enough.print(grid)
