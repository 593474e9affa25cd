"""What Services ask for by annotation, and what dataplanes that cannot do it make of that."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from proxy.compute import Outcome, compute
from proxy.objects import PROXY_PROTOCOL_ANNOTATION, SCHEDULER_ANNOTATION, Service
from rules.dataplane import Capabilities
from rules.diff import compare
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, Kind, Protocol, Route, check_route, difference
from rules.nftables.model import Model
from tests.builders import endpoint, endpoint_slice, service, view

PORTS = [{"name": "a", "port": 80, "nodePort": 30080}, {"name": "b", "port": 53, "protocol": "UDP"}]


def outcome(annotations: dict[str, str], *slices: Any) -> Outcome:
    plain = service(type="NodePort", ports=PORTS)
    metadata = msgspec.structs.replace(plain.metadata, annotations=annotations)
    asked: Service = msgspec.structs.replace(plain, metadata=metadata)
    found = compute(asked, slices, view(), Family.IPV4)
    for frontend, route in found.routes.items():
        assert check_route(Family.IPV4, frontend, route) is None
    return found


def some() -> Any:
    ports = [{"name": "a", "port": 8080}, {"name": "b", "port": 53, "protocol": "UDP"}]
    return endpoint_slice([endpoint("10.180.0.1")], ports=ports)


@pytest.mark.parametrize(
    ("value", "scheduler", "problems"),
    [
        ("", "", 0),
        ("random", "", 0),
        ("round-robin", "round-robin", 0),
        ("least-connections", "least-connections", 0),
        ("rr", "round-robin", 0),
        ("wlc", "wlc", 0),
        ("fastest", "", 1),
    ],
)
def test_a_scheduler_is_one_that_is_known(value: str, scheduler: str, problems: int) -> None:
    found = outcome({SCHEDULER_ANNOTATION: value}, some())
    assert len(found.routes) == 3
    assert {route.scheduler for route in found.routes.values()} == {scheduler}
    assert len(found.problems) == problems
    assert all("round-robin" in problem and "random is used" in problem for problem in found.problems)


@pytest.mark.parametrize(("value", "sent", "problems"), [("", False, 0), ("v2", True, 0), ("v1", False, 1)])
def test_the_proxy_protocol_is_for_tcp(value: str, sent: bool, problems: int) -> None:
    found = outcome({PROXY_PROTOCOL_ANNOTATION: value}, some())
    for frontend, route in found.routes.items():
        assert route.proxy_protocol is (sent and frontend.protocol is Protocol.TCP)
    assert len(found.problems) == problems


def test_without_endpoints_there_is_nothing_to_schedule() -> None:
    """Tables are canonical: what no packet can tell is not in them."""
    found = outcome({SCHEDULER_ANNOTATION: "round-robin", PROXY_PROTOCOL_ANNOTATION: "v2"})
    assert found.routes == outcome({}).routes


@pytest.mark.parametrize(
    ("frontend", "fields"),
    [
        (Protocol.TCP, {"scheduler": "rr"}),
        (Protocol.UDP, {"proxy_protocol": True}),
        (Protocol.TCP, {"backends": frozenset(), "scheduler": "round-robin"}),
        (Protocol.TCP, {"backends": frozenset(), "proxy_protocol": True}),
    ],
)
def test_routes_that_cannot_stand(frontend: Protocol, fields: dict[str, Any]) -> None:
    backends = frozenset({Backend(bytes([10, 0, 0, 1]), 80)})
    route = Route(**{"kind": Kind.CLUSTER_IP, "backends": backends, **fields})
    assert check_route(Family.IPV4, Frontend(bytes([10, 0, 0, 9]), frontend, 80), route)


def test_what_a_dataplane_cannot_schedule_is_no_drift() -> None:
    wanted = outcome({SCHEDULER_ANNOTATION: "round-robin", PROXY_PROTOCOL_ANNOTATION: "v2"}, some()).routes
    plain = outcome({}, some()).routes
    one, other = (ForwardingTable(family=Family.IPV4, routes=routes) for routes in (wanted, plain))
    assert not compare(one, other, Capabilities())
    drift = compare(one, other, Capabilities(schedulers=frozenset({"round-robin"}), proxy_protocol=True))
    assert {change.what for each in drift.frontends for change in each.changes} == {"scheduler", "PROXY protocol"}
    [drift_of_udp] = (each for each in drift.frontends if each.frontend.protocol is Protocol.UDP)
    assert [change.what for change in drift_of_udp.changes] == ["scheduler"]


def test_nftables_elements_are_the_same_with_and_without() -> None:
    empty = ForwardingTable(family=Family.IPV4)
    batches = []
    for asked in ({}, {SCHEDULER_ANNOTATION: "round-robin"}):
        table = ForwardingTable(family=Family.IPV4, routes=outcome(asked, some()).routes)
        batches.append(Model(Family.IPV4).plan(difference(empty, table), 0.0))
    assert batches[0].added == batches[1].added
