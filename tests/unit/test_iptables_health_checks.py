"""Health-check node ports on their way into the table: let in where the mode means what iptables means (TRF-27)."""

from __future__ import annotations

import pytest

from proxy.assemble import Assembler, precedence_of
from proxy.compute import compute
from proxy.objects import Service
from rules.dataplane import Capabilities
from rules.diff import compare
from rules.forwarding import Delta, Family, NodeFacts
from tests.builders import service, view


def checked(name: str, port: int, address: str = "172.30.0.41") -> Service:
    return service(
        name,
        cluster_ip=address,
        vips=["1.2.3.4"],
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        healthCheckNodePort=port,
    )


def put(assembler: Assembler, *services: Service, mode: str = "iptables") -> None:
    for each in services:
        outcome = compute(each, [], view(mode), assembler.family)
        assembler.update(each.key, precedence_of(each.metadata), outcome)


@pytest.mark.parametrize(
    ("mode", "let_in"), [("iptables", {30000}), ("", {30000}), ("ipvs", {30000}), ("nftables", set())]
)
def test_the_mode_says_whether_they_are_let_in(mode: str, let_in: set[int]) -> None:
    """B-55: without any endpoint, too."""
    assembler = Assembler(Family.IPV4)
    put(assembler, checked("svc", 30000), mode=mode)
    assert assembler.table().node.health_check_ports == let_in


def test_a_port_is_let_in_until_the_last_service_leaves_it_and_the_other_facts_stay() -> None:
    assembler = Assembler(Family.IPV4)
    one, other = checked("one", 30000), checked("other", 30000, "172.30.0.42")
    put(assembler, one, other)
    assembler.set_node(NodeFacts(mark=8))
    assert assembler.take_delta().node == NodeFacts(mark=8, health_check_ports=frozenset({30000}))
    assembler.update(one.key, precedence_of(one.metadata), None)
    assert assembler.take_delta().node is None
    put(assembler, checked("other", 30001, "172.30.0.42"))
    assert assembler.take_delta() == Delta(node=NodeFacts(mark=8, health_check_ports=frozenset({30001})))
    assembler.set_node(NodeFacts(mark=16))
    assert assembler.node == NodeFacts(mark=16, health_check_ports=frozenset({30001}))
    assembler.update(other.key, precedence_of(other.metadata), None)
    assert assembler.take_delta().node == NodeFacts(mark=16)


def test_a_dataplane_that_cannot_let_anything_in_does_not_drift_by_that() -> None:
    assembler = Assembler(Family.IPV4)
    put(assembler, checked("svc", 30000))
    wanted = assembler.table()
    held = Assembler(Family.IPV4)
    put(held, checked("svc", 30000), mode="nftables")
    found = held.table()
    assert not compare(wanted, found, Capabilities(), but=wanted.routes.keys())
    [change] = compare(wanted, found, Capabilities(health_check_ports=True), but=wanted.routes.keys()).node
    assert change == ("health-check ports let in", "30000", "none")
