"""One Service as the page shows it: what it asks for, what it gets on this node, and what has passed it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from proxy.compute import Decision
from proxy.counters import NOTHING, Row, Traffic
from proxy.desired import Desired
from proxy.objects import Key, Service
from proxy.output import Shown, frontend_of, select, to_json
from proxy.selection import Reason
from proxy.serving.debug_services_map import endpoints_of, health_of
from proxy.state import State
from rules.forwarding import Family, ForwardingTable

SHOWN_ENDPOINTS = 500
"""Endpoints that are told; those that are used come first."""
_OWN = "sluice.internal/"


def detail(
    key: Key, state: State, desired: Desired, families: Iterable[Family], counted: Iterable[Row]
) -> dict[str, Any] | None:
    """What is known of a Service, as values that JSON has; None: there is no such Service."""
    service = state.services.get(key)
    if service is None:
        return None
    name = str(key)
    rows = [row for row in counted if row.service.partition(":")[0] == name]
    tables = [_table_of(name, desired, family) for family in families]
    frontends = [
        {**each, "family": table.family.label, "traffic": _sum(rows, frontend=frontend_of(each))}
        for table in tables
        for each in to_json(Shown("", table))["routes"]
    ]
    endpoints = [_endpoint(each, family, rows) for family in families for each in desired.decisions(key, family)]
    endpoints.sort(key=lambda each: (not each["used"], each["port"], each["endpoint"]))
    ready, total = endpoints_of(state.slices_of(key))
    troubles = [reason for (_, subject), reason in sorted(state.troubles.items()) if subject == f"Service {name}"]
    routes = [route for table in tables for route in table.routes.values()]
    health, why = health_of(service, routes, ready, total, troubles)
    return {
        "service": name,
        "health": health.value,
        "why": why,
        "facts": _facts(service),
        "frontends": frontends,
        "endpoints": endpoints[:SHOWN_ENDPOINTS],
        "allEndpoints": len(endpoints),
        "troubles": troubles,
        "traffic": _sum(rows),
        "gone": _sum([row for row in rows if row.frontend and not row.backend]),
    }


def _table_of(name: str, desired: Desired, family: Family) -> ForwardingTable:
    """Of a table the routes of one Service."""
    whole = ForwardingTable(family=family, node=desired.facts(family), routes=desired.routes(family))
    return select(whole, lambda _, route: route.label.partition(":")[0] == name)


def _endpoint(each: Decision, family: Family, rows: Iterable[Row]) -> dict[str, Any]:
    return {
        "family": family.label,
        "port": each.port,
        "endpoint": each.endpoint,
        "slice": each.slice,
        "node": each.node,
        "used": each.used,
        "cluster": _reason(each.cluster),
        "local": _reason(each.local),
        "traffic": _sum(rows, backend=each.endpoint),
    }


def _reason(reason: Reason | None) -> dict[str, str] | None:
    return None if reason is None else {"words": reason.text, "clause": reason.clause}


def _sum(rows: Iterable[Row], *, frontend: str = "", backend: str = "") -> dict[str, Any] | None:
    """What has passed; None: nothing was counted."""
    total: Traffic = NOTHING
    found = False
    for row in rows:
        if frontend in {"", row.frontend} and backend in {"", row.backend}:
            total += row.traffic
            found = True
    return msgspec.to_builtins(total) if found else None


def _facts(service: Service) -> list[tuple[str, str]]:
    """What the Service asks for, as far as it asks for anything: pairs of words."""
    spec = service.spec
    affinity = ""
    if spec.session_affinity != "None":
        affinity = f"{spec.session_affinity}, {spec.session_affinity_config.client_ip.timeout_seconds} s"
    ports = (
        f"{port.name or '(no name)'} {port.port}/{port.protocol}"
        + (f", node port {port.node_port}" * bool(port.node_port))
        for port in spec.ports
    )
    own = {name: value for name, value in service.metadata.annotations.items() if name.startswith(_OWN)}
    facts = (
        ("type", spec.type),
        ("ports", "; ".join(ports)),
        ("cluster IPs", ", ".join(spec.cluster_ips or filter(None, [spec.cluster_ip]))),
        ("external IPs", ", ".join(spec.external_ips)),
        ("load balancer", ", ".join(each.ip for each in service.status.load_balancer.ingress if each.ip)),
        ("source ranges", ", ".join(spec.load_balancer_source_ranges)),
        ("selector", ", ".join(f"{name}={value}" for name, value in sorted(spec.selector.items()))),
        ("internal policy", spec.internal_traffic_policy),
        ("external policy", spec.external_traffic_policy),
        ("session affinity", affinity),
        ("health check port", str(spec.health_check_node_port or "")),
        ("annotations", ", ".join(f"{name}={value}" for name, value in sorted(own.items()))),
        ("created", service.metadata.creation_timestamp),
    )
    return [(name, value) for name, value in facts if value]
