"""Which flows are stale (CT-1 to CT-5), from Services to matches."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from proxy.assemble import Assembler, precedence_of
from proxy.compute import Outcome, compute
from proxy.conntrack import MOST_MATCHES, Change, Serving, change, compose, is_stale, matches_of
from proxy.objects import STALE_TCP_ANNOTATION, Key, Metadata, Service, convert
from rules.forwarding import Backend, Family, Frontend, Protocol, parse_address
from rules.netlink.conntrack import ANSWERED, DESTINATION_NAT, SOURCE_NAT, Flow, Match
from tests.builders import at, backends, endpoint, endpoint_slice, service, view

UDP, TCP, SCTP = Protocol.UDP, Protocol.TCP, Protocol.SCTP
CLIENT = parse_address("10.20.30.40")
DNS = at("172.30.1.1:8000", UDP)
NODE_PORT = at("*:30080", UDP)


def flow(
    protocol: Protocol, to: str, backend: str | None, *, answered: bool = False, masqueraded: bool = False
) -> Flow:
    """A flow of one client; without a backend, one that nothing was chosen for."""
    frontend = at(to, protocol)
    chosen = frontend.address, frontend.port
    if backend is not None:
        chosen = at(backend).address, at(backend).port
    seen = (parse_address("192.168.0.1"), 50000) if masqueraded else (CLIENT, 40000)
    status = (ANSWERED * answered) | (DESTINATION_NAT * (backend is not None)) | (SOURCE_NAT * masqueraded)
    return Flow(
        *(CLIENT, frontend.address, protocol, 40000, frontend.port), chosen[0], seen[0], chosen[1], seen[1], status, b""
    )


def node_port_flow(address: str, protocol: Protocol, port: int, backend: str | None, **fields: bool) -> Flow:
    return flow(protocol, f"{address}:{port}", backend, **fields)


# --- B-230 ---------------------------------------------------------------------------------------------------

ADDRESSES = ("172.30.1.1", "1.2.3.4", "5.6.7.8")
SERVING_EP, NOT_SERVING_EP, DELETED_EP = "10.240.0.4", "10.240.0.5", "10.240.0.6"


def b230(*endpoints: Mapping[str, object]) -> Mapping[Frontend, Serving]:
    """The Service of TestCleanStaleEntries: UDP on a ClusterIP, an external IP, a load balancer's and a node port."""
    udp = service(
        cluster_ip="172.30.1.1",
        ports=[{"port": 8000, "protocol": "UDP", "nodePort": 30080}],
        type="LoadBalancer",
        externalIPs=["1.2.3.4"],
        vips=["5.6.7.8"],
    )
    slices = [endpoint_slice(endpoints, ports=[{"name": "", "port": 8080, "protocol": "UDP"}])] if endpoints else []
    return compute(udp, slices, view(), Family.IPV4).serving


def b230_flows() -> list[tuple[Flow, bool, str]]:
    """Every combination: the flow, whether it goes to a port of the Service, and to which endpoint."""
    found = []
    for protocol, pod in itertools.product((TCP, UDP, SCTP), (SERVING_EP, NOT_SERVING_EP, DELETED_EP)):
        for address, port in itertools.product(ADDRESSES, (8000, 8001)):
            ours = protocol is UDP and port == 8000
            found.append((flow(protocol, f"{address}:{port}", f"{pod}:8080"), ours, pod))
        for address, port in itertools.product(("127.0.0.1", "192.168.3.3"), (30080, 30081)):
            ours = protocol is UDP and port == 30080
            found.append((flow(protocol, f"{address}:{port}", f"{pod}:8080"), ours, pod))
    return found


def test_B_230_exactly_the_stale_flows_of_every_combination() -> None:
    serving = b230(endpoint(SERVING_EP), endpoint(NOT_SERVING_EP, condition="N"))
    for each, ours, pod in b230_flows():
        assert is_stale(each, serving) == (ours and pod != SERVING_EP), each
    assert is_stale(flow(UDP, "172.30.1.1:8000", f"{SERVING_EP}:8079"), serving), "to the endpoint's old port"
    for address in ADDRESSES:
        assert is_stale(flow(UDP, f"{address}:8000", None), serving), "from before there was an endpoint"


def test_B_230_without_endpoints_flows_to_those_that_were_go_too() -> None:
    """Unlike kube-proxy, which leaves them alone (CT-5); what nothing was chosen for stays, as there."""
    serving = b230()
    for each, ours, _ in b230_flows():
        assert is_stale(each, serving) == ours, each
    for address in ADDRESSES:
        assert not is_stale(flow(UDP, f"{address}:8000", None), serving)


def test_CT_2_endpoints_serve_that_no_new_connection_goes_to() -> None:
    """One that terminates, and one that hints give to another zone."""
    terminating, elsewhere, gone = "10.0.0.2", "10.0.0.3", "10.0.0.4"
    udp = service(ports=[{"port": 53, "protocol": "UDP"}])
    entries = [
        endpoint("10.0.0.1", zones=["here"]),
        endpoint(terminating, condition="ST"),
        endpoint(elsewhere, zones=["there"]),
        endpoint(gone, condition="T"),
    ]
    slices = [endpoint_slice(entries, ports=[{"name": "", "port": 53, "protocol": "UDP"}])]
    outcome = compute(udp, slices, view(zone="here"), Family.IPV4)
    frontend = at("172.30.0.41:53", UDP)
    assert outcome.routes[frontend].backends == backends("10.0.0.1", port=53)
    assert outcome.serving[frontend] == backends("10.0.0.1", terminating, elsewhere, port=53)


def test_a_flow_through_the_node_to_a_node_ports_number_keeps_its_rewritten_source() -> None:
    serving = {NODE_PORT: backends("10.240.0.4 8080")}
    assert is_stale(flow(UDP, "192.168.3.3:30080", None), serving)
    assert not is_stale(flow(UDP, "8.8.8.8:30080", None, masqueraded=True), serving)
    # At an address of the Service there is no doubt whose it is.
    assert is_stale(flow(UDP, "172.30.1.1:8000", None, masqueraded=True), {DNS: backends("10.240.0.4 8080")})


def test_an_address_goes_before_a_node_port_of_the_same_number() -> None:
    serving = {NODE_PORT: backends("10.0.0.1 53"), at("172.30.0.1:30080", UDP): backends("10.0.0.2 53")}
    assert not is_stale(flow(UDP, "172.30.0.1:30080", "10.0.0.2:53"), serving)
    assert is_stale(flow(UDP, "172.30.0.1:30080", "10.0.0.1:53"), serving)


# --- changes -------------------------------------------------------------------------------------------------

SOME = st.frozensets(st.sampled_from(sorted(backends("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"))))
MAYBE = st.none() | SOME


def remains(flows: list[Flow], changes: Mapping[Frontend, Change]) -> list[Flow]:
    matches = matches_of(Family.IPV4, changes)
    assert matches is not None
    return [each for each in flows if not any(match.admits(each) for match in matches)]


def all_flows(frontend: Frontend, to: Serving | None) -> list[Flow]:
    """A flow to each backend, or one to none where there is none."""
    host = "192.168.3.3" if frontend.is_node_port else "172.30.1.1"
    names = [str(each) for each in sorted(to or ())] or [None]
    return [flow(UDP, f"{host}:{frontend.port}", name) for name in names]


@given(st.sampled_from([DNS, NODE_PORT]), MAYBE, SOME)
def test_matches_delete_what_a_look_at_every_flow_finds_stale(
    frontend: Frontend, before: Serving | None, after: Serving
) -> None:
    flows = all_flows(frontend, before)
    fresh = [each for each in flows if not is_stale(each, {frontend: after})]
    assert remains(flows, {frontend: change(before, after)}) == fresh


@given(st.sampled_from([DNS, NODE_PORT]), SOME.filter(bool))
def test_a_frontend_that_goes_takes_its_flows_along_and_no_others(frontend: Frontend, before: Serving) -> None:
    others = [flow(UDP, "172.30.1.2:8000", "10.0.0.1:80"), flow(TCP, "172.30.1.1:8000", "10.0.0.1:80")]
    others += [flow(UDP, "172.30.1.1:8000", None), flow(TCP, "192.168.3.3:30080", "10.0.0.1:80")]
    assert remains(all_flows(frontend, before) + others, {frontend: change(before, None)}) == others


@given(st.lists(MAYBE, min_size=2, max_size=6))
def test_changes_that_wait_for_each_other_delete_what_each_would_have(steps: list[Serving | None]) -> None:
    changes = list(itertools.starmap(change, itertools.pairwise(steps)))
    composed = changes[0]
    for each in changes[1:]:
        composed = compose(composed, each)
    last = steps[-1] or frozenset()
    # Flows may have been made to whatever served on the way.
    seen = frozenset[Backend]().union(*(step or () for step in steps))
    assert composed.lost == seen - last
    assert composed.serving == last
    assert composed.gained == bool(last and not all(steps))


@given(st.dictionaries(st.sampled_from([DNS, NODE_PORT, at("1.2.3.4:53", UDP)]), SOME.filter(bool)))
def test_nothing_changed_is_nothing_to_ask_for(serving: dict[Frontend, Serving]) -> None:
    assert matches_of(Family.IPV4, {key: change(value, value) for key, value in serving.items()}) == []


def test_an_address_that_goes_is_one_match_however_many_backends_it_had() -> None:
    many = frozenset(Backend(bytes([10, 0, 1, number]), 53) for number in range(200))
    assert matches_of(Family.IPV4, {DNS: change(many, None)}) == [
        Match(Family.IPV4, UDP, DNS.address, DNS.port, status=DESTINATION_NAT, mask=DESTINATION_NAT)
    ]
    assert matches_of(Family.IPV4, {NODE_PORT: change(many, None)}) is None


def test_many_changes_are_better_looked_up_in_one_go() -> None:
    ports = [at(f"172.30.1.1:{number}", UDP) for number in range(1, MOST_MATCHES + 2)]
    changes = {port: change(backends("10.0.0.1"), frozenset()) for port in ports}
    assert matches_of(Family.IPV4, changes) is None
    del changes[ports[0]]
    assert len(matches_of(Family.IPV4, changes) or ()) == MOST_MATCHES


# --- TCP, where a Service asks for it ------------------------------------------------------------------------


def annotated(value: str, **fields: object) -> Service:
    plain = service(**fields)  # type: ignore[arg-type]
    metadata = {"namespace": "ns", "name": "svc", "annotations": {STALE_TCP_ANNOTATION: value}}
    spec = {"clusterIP": plain.spec.cluster_ip, "ports": [{"port": each.port} for each in plain.spec.ports]}
    return convert(Service, {"metadata": metadata, "spec": spec})


WEB = at("172.30.0.41:80")


def outcome_of(value: str, *addresses: str) -> Outcome:
    return compute(annotated(value), [endpoint_slice([endpoint(each) for each in addresses])], view(), Family.IPV4)


def test_tcp_is_left_to_drain_unless_the_service_asks() -> None:
    assert not outcome_of("", "10.0.0.1").serving
    assert outcome_of("delete-unanswered", "10.0.0.1").serving == {WEB: backends("10.0.0.1")}


def test_only_connections_that_nobody_answered_are_deleted() -> None:
    serving = outcome_of("delete-unanswered", "10.0.0.1").serving
    syn, established = (flow(TCP, "172.30.0.41:80", "10.0.0.2:80", answered=each) for each in (False, True))
    assert is_stale(syn, serving)
    assert not is_stale(established, serving)
    for after in (backends("10.0.0.1"), frozenset[Backend]()):
        changes = {WEB: change(backends("10.0.0.1", "10.0.0.2"), after)}
        assert remains([syn, established], changes) == [established]


def test_another_value_of_the_annotation_is_told() -> None:
    outcome = outcome_of("reset", "10.0.0.1")
    assert not outcome.serving
    assert outcome.problems == ("annotation sluice.internal/stale-tcp-flows: 'reset' is not delete-unanswered",)


# --- from outcomes to changes --------------------------------------------------------------------------------


class Cluster:
    def __init__(self) -> None:
        self.assembler = Assembler(Family.IPV4)

    def put(
        self, name: str, *addresses: str, created: str = "2024", protocol: str = "UDP", annotation: str = ""
    ) -> None:
        one = service(name, ports=[{"port": 53, "protocol": protocol}], cluster_ip="172.30.0.1")
        if annotation:
            one.metadata.annotations[STALE_TCP_ANNOTATION] = annotation
        ports = [{"name": "", "port": 53, "protocol": protocol}]
        slices = [endpoint_slice([endpoint(each) for each in addresses], owner=name, ports=ports)]
        outcome = compute(one, slices, view(), Family.IPV4)
        self.assembler.update(Key("ns", name), precedence_of(Metadata(creation_timestamp=created, name=name)), outcome)

    def drop(self, name: str) -> None:
        self.assembler.update(Key("ns", name), precedence_of(Metadata()), None)

    def taken(self) -> list[Change]:
        return list(self.assembler.take_changes().values())


A, B = backends("10.0.0.1 53"), backends("10.0.0.2 53")
NONE: Serving = frozenset()


def test_CT_1_a_frontend_is_told_with_what_came_and_went() -> None:
    cluster = Cluster()
    cluster.put("dns", "10.0.0.1")
    assert cluster.taken() == [Change(NONE, A, gained=True)]
    cluster.put("dns", "10.0.0.1", "10.0.0.2")
    assert cluster.taken() == [Change(NONE, A | B)]
    cluster.put("dns", "10.0.0.2")
    assert cluster.taken() == [Change(A, B)]
    cluster.put("dns")
    assert cluster.taken() == [Change(B, NONE)]
    cluster.put("dns", "10.0.0.2")
    assert cluster.taken() == [Change(NONE, B, gained=True)]
    cluster.drop("dns")
    assert cluster.taken() == [Change(B, NONE)]
    assert not cluster.assembler.serving


def test_what_changed_and_changed_back_between_two_syncs_is_nothing() -> None:
    cluster = Cluster()
    cluster.put("dns", "10.0.0.1")
    cluster.taken()
    cluster.put("dns", "10.0.0.2")
    cluster.put("dns", "10.0.0.1")
    assert cluster.taken() == []


def test_a_frontend_that_changes_hands_changes_its_endpoints() -> None:
    cluster = Cluster()
    cluster.put("young", "10.0.0.2", created="2024")
    cluster.taken()
    cluster.put("old", "10.0.0.1", created="2020")
    assert cluster.taken() == [Change(B, A)]
    cluster.put("young", "10.0.0.3", created="2024")
    assert cluster.taken() == []
    cluster.put("young", "10.0.0.2", created="2010")
    assert cluster.taken() == [Change(A, B)]
    cluster.drop("young")
    assert cluster.taken() == [Change(B, A)]


def test_a_service_that_no_longer_asks_has_its_connections_left_alone() -> None:
    cluster = Cluster()
    cluster.put("web", "10.0.0.1", protocol="TCP", annotation="delete-unanswered")
    cluster.taken()
    cluster.put("web", "10.0.0.1", protocol="TCP")
    assert cluster.taken() == []
    cluster.put("web", "10.0.0.1", protocol="TCP", annotation="delete-unanswered")
    cluster.taken()
    cluster.drop("web")
    assert cluster.taken() == [Change(A, NONE)]
