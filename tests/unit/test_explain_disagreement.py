"""Where what is wanted and what the kernel holds differ, as far as one connection could notice."""

from __future__ import annotations

import msgspec
import pytest

from proxy.compute import View
from proxy.explain.disagreement import disagreements
from proxy.explain.evidence import Cluster, Evidence
from rules.forwarding import Endpoint, Family, ForwardingTable, Kind, Protocol, Route, parse_address
from tests.builders import at, backends

POD = parse_address("10.244.1.11")
DNS = at("10.96.0.10:53")
WANTED = ForwardingTable(
    family=Family.IPV4,
    routes={DNS: Route(kind=Kind.CLUSTER_IP, backends=backends("10.244.1.11 53"), label="kube-system/dns:tcp")},
    hairpins=frozenset({Endpoint(POD, Protocol.TCP, 53)}),
)


def differing(*hairpins: Endpoint) -> list[str]:
    held = msgspec.structs.replace(WANTED, hairpins=frozenset(hairpins))
    cluster = Cluster(view=View(node_name="node1"), wanted={Family.IPV4: WANTED})
    evidence = Evidence(source="kernel", words="", tables={}, cluster=cluster, kernel={Family.IPV4: held})
    return list(disagreements({DNS}, Family.IPV4, evidence))


@pytest.mark.parametrize("protocol", [Protocol.UDP, Protocol.SCTP])
def test_hairpins_of_another_protocol_are_another_services(protocol):
    assert differing(Endpoint(POD, Protocol.TCP, 53), Endpoint(POD, protocol, 53)) == []


def test_a_hairpin_of_these_frontends_is_told():
    assert differing() == ["hairpin 10.244.1.11:53/TCP: wanted, and not in the kernel"]
