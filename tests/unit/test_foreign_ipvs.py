"""kube-proxy's ipvs mode, laid out by its clauses, decoded, and compared with what its objects come to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from proxy.config.settings import Settings
from proxy.render import render
from proxy.sources.manifest_loading import load
from rules.diff import compare
from rules.foreign import detect
from rules.foreign.comparison import as_held_by, capabilities_of, named
from rules.foreign.detect import readings
from rules.foreign.gathering import ForeignError, Reading
from rules.forwarding import (
    Backend,
    Endpoint,
    Family,
    ForwardingTable,
    InputInterface,
    InputInterfacePrefix,
    Kind,
    NodeFacts,
    Prefix,
    Refusal,
    Route,
    SourcePrefix,
    parse_address,
)
from tests.builders import at, backends, networks
from tests.kube_proxy_ipvs import Texts, lay_out
from tests.strategies import tables

OBJECTS = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2" / "objects.yaml"
NODE = {
    Family.IPV4: [parse_address(each) for each in ("192.168.50.11", "10.0.0.7")],
    Family.IPV6: [parse_address(each) for each in ("fd00:50::11", "fe80::11")],
}
FAMILIES = st.sampled_from(list(Family))


def wanted(**more: object) -> dict[Family, ForwardingTable]:
    """What the objects of the recordings come to in mode ipvs."""
    settings = Settings(
        mode="ipvs",
        hostname_override="node1",
        bind_address="192.168.50.11",
        cluster_cidrs=networks("10.244.0.0/16", "fd00:244::/32"),
        **more,  # type: ignore[arg-type]  # settings in words
    )
    rendered = render(load(str(OBJECTS)), settings, "node1")
    assert rendered.problems == ()
    return {table.family: table for table in rendered.tables}


def read(texts: Texts) -> Reading:
    (reading,) = readings(texts.all)
    return reading


def drift(reading: Reading, table: ForwardingTable, *, configured: bool) -> object:
    held = as_held_by(reading, table, configured=configured)
    found = compare(held, named(reading, table).table, capabilities_of("ipvs"))
    return [*found.frontends, *found.node, *found.hairpins, *found.damage]


# --- tables -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(Family))
@pytest.mark.parametrize("configured", [True, False])
def test_the_layout_decodes_to_the_table_that_its_objects_compute(family: Family, configured: bool) -> None:
    table = wanted()[family]
    assert len(table.routes) > 2
    reading = read(lay_out(table, NODE[family]))
    assert drift(reading, table, configured=configured) == []
    assert reading.notes == ()
    assert (reading.mode, reading.table.family) == ("ipvs", family)


def test_nothing_but_what_is_listed_is_set_aside() -> None:
    """What differs without allowances is what docs/other-proxies.md lists."""
    table = wanted()[Family.IPV4]
    reading = read(lay_out(table, NODE[Family.IPV4]))
    found = compare(table, reading.table, capabilities_of("ipvs"))
    labels = {(str(each.frontend), change.what) for each in found.frontends for change in each.changes}
    assert {what for _, what in labels} == {"service", "backend", "backend for outsiders", "without backend"}
    changed = {frontend for frontend, what in labels if what != "service"}
    kept = {str(frontend) for frontend, route in table.routes.items() if route.policy_local}
    alone = {str(frontend) for frontend, route in table.routes.items() if route.refusal is Refusal.DROP}
    assert changed == kept | alone
    assert {change.what for change in found.node} == {"node ports on"}
    assert not found.hairpins
    assert not found.damage


@st.composite
def servable(draw: st.DrawFn, family: Family) -> ForwardingTable:
    """Tables that one may want of mode ipvs."""
    table = draw(tables(family))
    everything = Prefix(bytes(family.address_bytes), 0)
    assume(not any(everything in route.source_ranges for route in table.routes.values()))
    node = msgspec.structs.replace(
        table.node,
        loopback_node_ports=False,
        reject_closed_ports=True,
        service_cidrs=(),
        health_check_ports=draw(st.frozensets(st.sampled_from([1, 32000, 65535]))),
        bound=True,
        node_port_addresses=table.node.node_port_addresses or None,
    )
    return msgspec.structs.replace(table, node=node)


@given(FAMILIES.flatmap(servable), st.booleans())
def test_any_wanted_table_is_found_without_a_difference(table: ForwardingTable, configured: bool) -> None:
    reading = read(lay_out(table, NODE[table.family]))
    assert drift(reading, table, configured=configured) == []


@given(FAMILIES.flatmap(servable), st.data())
def test_any_other_backend_is_a_difference(table: ForwardingTable, data: st.DataObject) -> None:
    texts = lay_out(table, NODE[table.family])
    lines = texts.ipvsadm.split("\n")
    places = [number for number, line in enumerate(lines) if line.startswith("-a ")]
    assume(places)
    del lines[data.draw(st.sampled_from(places))]
    edited = texts._replace(ipvsadm="\n".join([*lines, ""]))
    assert drift(read(edited), table, configured=True) != []


@given(FAMILIES.flatmap(servable))
def test_any_layout_is_printed_and_read_back_alike(table: ForwardingTable) -> None:
    """What a bundle keeps is what it was made of."""
    texts = lay_out(table, NODE[table.family])
    gathered = detect.Gathered()
    gathered.add("", "".join(texts[:2] + texts[3:]).encode())
    state = gathered.state()
    again = detect.Gathered()
    again.add("", detect.of_state(state))
    assert again.state() == state


def test_policies_are_what_ipvs_makes_of_them() -> None:
    both, here, there = backends("10.244.1.1", "10.244.2.1"), backends("10.244.1.1"), backends("10.244.2.1")
    asked = {
        at("10.96.0.1:80"): Route(kind=Kind.CLUSTER_IP, backends=both, affinity=600, label="a/b"),
        at("10.96.0.2:80"): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.DROP, label="a/alone"),
        at("10.96.0.3:80"): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.DROP, label="a/far"),
        at("*:30080"): Route(
            kind=Kind.NODE_PORT, backends=there, local_backends=frozenset(), refusal=Refusal.DROP, label="a/far"
        ),
        at("203.0.113.1:80"): Route(kind=Kind.LOAD_BALANCER, backends=both, local_backends=here, label="a/lb"),
        at("203.0.113.2:80"): Route(kind=Kind.EXTERNAL_IP, refusal=Refusal.REJECT, label="a/none"),
    }
    node = NodeFacts(detector=SourcePrefix(networks("10.244.0.0/16")[0]), bound=True)
    table = ForwardingTable(family=Family.IPV4, routes=asked, node=node)
    reading = read(lay_out(table, NODE[Family.IPV4], draining=backends("10.244.9.9")))
    assert not reading.table.damage
    routes = {str(frontend): route for frontend, route in reading.table.routes.items()}
    assert routes["10.96.0.1:80/TCP"] == Route(kind=Kind.CLUSTER_IP, backends=both, affinity=600), "10.244.9.9 drains"
    # IPVS-20: no endpoint here, and nothing drops; the list of the cluster is there where another frontend needs it.
    assert routes["10.96.0.2:80/TCP"] == Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT)
    assert routes["10.96.0.3:80/TCP"] == Route(kind=Kind.CLUSTER_IP, backends=there)
    assert routes["*:30080/TCP"] == Route(kind=Kind.NODE_PORT, backends=there, local_backends=there)
    # IPVS-21: local pods are given the local endpoints too.
    assert routes["203.0.113.1:80/TCP"] == Route(kind=Kind.LOAD_BALANCER, backends=here, local_backends=here)
    assert routes["203.0.113.2:80/TCP"].refusal is Refusal.REJECT
    assert drift(reading, table, configured=True) == []


def test_facts_are_read_from_rules_and_servers() -> None:
    cluster_ip = {at("10.96.0.1:80"): Route(kind=Kind.CLUSTER_IP, backends=backends("10.244.1.1"))}
    for detector in (
        None,
        InputInterface("cni0"),
        InputInterfacePrefix("cali"),
        SourcePrefix(networks("10.9.0.0/16")[0]),
    ):
        node = NodeFacts(mark=1 << 20, detector=detector, health_check_ports=frozenset({31000}), bound=True)
        reading = read(lay_out(ForwardingTable(family=Family.IPV4, node=node, routes=cluster_ip), NODE[Family.IPV4]))
        found = reading.table.node
        assert (found.mark, found.detector, found.masquerade_all) == (1 << 20, detector, False)
        assert found.health_check_ports == {31000}
        assert reading.untold == {"node_port_addresses"}, "there is no node port"
    every = NodeFacts(masquerade_all=True, detector=InputInterface("cni0"), bound=True)
    reading = read(lay_out(ForwardingTable(family=Family.IPV4, node=every, routes=cluster_ip)))
    assert reading.table.node.masquerade_all
    assert reading.untold >= {"detector"}


def test_all_addresses_of_a_node_answer_node_ports_unless_some_are_chosen() -> None:
    routes = {at("*:30080"): Route(kind=Kind.NODE_PORT, backends=backends("10.244.1.1"))}
    every = ForwardingTable(family=Family.IPV4, routes=routes, node=NodeFacts(bound=True))
    one = msgspec.structs.replace(
        every, node=NodeFacts(bound=True, node_port_addresses=frozenset(NODE[Family.IPV4][:1]))
    )
    texts = lay_out(one, NODE[Family.IPV4])
    assert read(texts).table.node.node_port_addresses == frozenset(NODE[Family.IPV4][:1])
    assert drift(read(texts), one, configured=True) == []
    assert "node ports on" in str(drift(read(texts), every, configured=True))
    # Without the node's addresses nobody knows whether these are all.
    assert drift(read(texts._replace(addresses="")), every, configured=True) == []


def test_a_node_that_source_ranges_admit_is_admitted_at_each_address_alone() -> None:
    """TRF-18 has all the Service's addresses admitted; here each admits itself (IPVS-11)."""
    first, second = at("203.0.113.1:80"), at("203.0.113.9:80")
    ranges = networks("192.168.50.0/24", "203.0.113.1/32", "203.0.113.9/32")
    lb = Route(kind=Kind.LOAD_BALANCER, backends=backends("10.244.1.1"), source_ranges=ranges, label="a/lb")
    table = ForwardingTable(family=Family.IPV4, routes={first: lb, second: lb}, node=NodeFacts(bound=True))
    texts = lay_out(table, NODE[Family.IPV4])
    alone = re.sub(r"^add KUBE-LOAD-BALANCER-SOURCE-CIDR \S+,203\S+\n", "", texts.ipset, flags=re.MULTILINE)
    assert alone != texts.ipset
    reading = read(texts._replace(ipset=alone))
    assert reading.table.routes[first].source_ranges == networks("192.168.50.0/24", "203.0.113.1/32")
    assert drift(reading, table, configured=True) == []


# --- files ---------------------------------------------------------------------------------------------------------


def sample(family: Family = Family.IPV4) -> Texts:
    return lay_out(wanted()[family], NODE[family])


def test_files_may_come_in_any_order_and_in_one(tmp_path: Path) -> None:
    four, six = sample(), sample(Family.IPV6)
    apart = [*readings(four.all), *readings(six.all)]
    pieces = [
        four.ipvsadm + six.ipvsadm,
        four.iptables,
        four.ipset + six.ipset,
        six.iptables,
        # One listing has the interfaces of both families.
        four.addresses,
    ]
    for order in (pieces, pieces[::-1]):
        gathered = detect.Gathered()
        for number, piece in enumerate(order):
            gathered.add(str(number), piece.encode())
        found = [each.reading for each in gathered.readings()]
        assert found[0] == apart[0]
        assert found[1].table.routes == apart[1].table.routes
    (reading, _) = readings("".join(pieces).encode())
    assert reading == apart[0]


@pytest.mark.parametrize(
    ("kept", "told"),
    [
        ((2,), "give what `ipvsadm -Sn` prints (the virtual servers with their backends) and what `ipset save`"),
        ((0,), "give what `ipset save` prints (which frontends there are) too"),
        ((0, 2), "give what `ipset save` prints (which frontends there are) too"),
        ((1,), "give what `ipvsadm -Sn` prints (the virtual servers with their backends) too"),
        ((3,), "kube-proxy has no rules in it"),
    ],
)
def test_what_is_missing_is_one_line(kept: tuple[int, ...], told: str) -> None:
    texts = sample()
    with pytest.raises(ForeignError, match=re.escape(told)) as raised:
        readings("".join(texts[place] for place in kept).encode())
    assert "\n" not in str(raised.value)


def test_without_rules_who_is_masqueraded_is_taken_for_granted_and_said() -> None:
    texts = sample()
    (reading,) = readings((texts.ipvsadm + texts.ipset).encode())
    (note,) = reading.notes
    assert "`iptables-save` prints is not given" in note
    assert reading.untold >= {"mark", "masquerade_all", "detector"}
    assert reading.table.routes == read(texts).table.routes
    assert not reading.table.damage


def test_sets_that_another_mode_left_behind_are_nobodys() -> None:
    rules = (OBJECTS.parent / "iptables.iptables-save").read_text()
    texts = sample()
    (reading,) = readings((rules + texts.ipset + texts.ipvsadm).encode())
    assert reading.mode == "iptables"


def test_a_listing_of_ipvsadm_does_too() -> None:
    """`ipvsadm -Ln`, which people have at hand."""
    texts = sample()
    lines = ["IP Virtual Server version 1.2.1 (size=4096)", "Prot LocalAddress:Port Scheduler Flags",
             "  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn"]  # fmt: skip
    for line in texts.ipvsadm.splitlines():
        words = line.split()
        protocol = {"-t": "TCP", "-u": "UDP", "--sctp-service": "SCTP"}[words[1]]
        if words[0] == "-A":
            sticky = f" persistent {words[6]}" if "-p" in words else ""
            lines.append(f"{protocol}  {words[2]} {words[4]}{sticky}")
        else:
            lines.append(f"  -> {words[4]:<28} Masq    {words[7]}      0          0")
    assert read(texts._replace(ipvsadm="\n".join([*lines, ""]))) == read(texts)


# --- damage --------------------------------------------------------------------------------------------------------


class Edit(NamedTuple):
    """A change of the texts, and a part of the sentence that tells it."""

    text: str
    pattern: str
    replacement: str
    told: str


EDITS = [
    Edit("ipvsadm", r"^(-A -t 10.96.30.1:80 -s) rr", r"\1 wlc", "10.96.30.1:80/TCP picks by wlc, and others by rr"),
    Edit("ipvsadm", r"^-[Aa] -t 10.96.30.1:80 .*\n", "", "10.96.30.1:80/TCP has no virtual server"),
    Edit("ipvsadm", r"^(-a -t 10.96.30.1:80 .*) -w 1", r"\1 -w 7", "the weight 7"),
    Edit("ipvsadm", r"^(-a -t 10.96.30.1:80 .*) -m", r"\1 -g", "without translating"),
    Edit("ipvsadm", r"^(-A -t 10.96.30.1:80 .*\n)", r"\1-A -t 10.96.30.1:99 -s rr\n", "10.96.30.1:99/TCP is in no set"),
    Edit("ipvsadm", r"^-[Aa] -t 10.0.0.7:31080 .*\n", "", "*:31080/TCP has no virtual server at 10.0.0.7"),
    Edit("ipvsadm", r"^-a -t 10.0.0.7:31080 .*\n", "", "*:31080/TCP has other backends at 10.0.0.7 than elsewhere"),
    Edit("ipvsadm", r"^-A -t 10.96.30.1:80 ", "-A -t 10.96.30.1:http ", "save it by ipvsadm -Sn"),
    Edit("ipset", r"^add KUBE-CLUSTER-IP 10.96.30.1,tcp:80\n", "", "10.96.30.1:80/TCP is in no set"),
    Edit("ipset", r"^(add KUBE-LOAD-BALANCER) 203.0.113.30,.*\n", "", "has source ranges (KUBE-LOAD-BALANCER-FW)"),
    Edit("ipset", r"^add KUBE-LOAD-BALANCER-FW .*\n", "", "has source ranges, which nobody asks for"),
    Edit("ipset", r"^add KUBE-LOAD-BALANCER-SOURCE-.*\n", "", "admits nobody"),
    Edit("ipset", r"^(create KUBE-IPVS-IPS .*\n)", r"\1add KUBE-IPVS-IPS 10.96.99.9\n", "has 10.96.99.9, which no"),
    Edit("ipset", r"^add KUBE-IPVS-IPS 10.96.30.1\n", "", "lacks 10.96.30.1: its other ports are not refused"),
    Edit("ipset", r"^(add KUBE-LOOP-BACK \S+),\S+\n", r"\1,10.9.9.9\n", "is no hairpin"),
    Edit("ipset", r"^(add KUBE-CLUSTER-IP) 10.96.30.1,tcp:80\n", r"\1 10.96.30.1,tcp\n", "an element that is not unde"),
    Edit("ipset", r"^(create KUBE-EXTERNAL-IP) hash:ip,port ", r"\1 hash:ip ", "is of another type than kube-proxy"),
    Edit("ipset", r"^(create KUBE-NODE-PORT-LOCAL-TCP.*\n)", r"\1add KUBE-NODE-PORT-LOCAL-TCP 9\n", "9/TCP has policy"),
    Edit("addresses", r'"10.96.30.1"', '"10.96.99.9"', "kube-ipvs0 lacks 10.96.30.1: no packet to it comes in"),
    Edit("addresses", r'"10.96.30.1"', '"10.96.99.9"', "kube-ipvs0 has 10.96.99.9, which no frontend has"),
    Edit("iptables", r"^-A KUBE-MARK-MASQ.*\n", "", "KUBE-MARK-MASQ does not set a mark"),
    Edit("iptables", r"^-A KUBE-POSTROUTING.*LOOP-BACK.*\n", "", "does not masquerade hairpin connections"),
    Edit("iptables", r"^-A PREROUTING.*\n", "", "PREROUTING of table nat has no rule that leads to KUBE-SERVICES"),
    Edit("iptables", r"^-A OUTPUT.*ipvs access.*\n", "", "table filter has no rule that leads to KUBE-IPVS-OUT-FILTER"),
    Edit("iptables", r"^-A KUBE-SERVICES .*CLUSTER-IP .*MASQ\n", "", "it masquerades what comes to ClusterIPs"),
    Edit("iptables", r"^-A KUBE-LOAD-BALANCER -j .*\n", "", "masquerades what comes to load balancers' addresses"),
    Edit("iptables", r"^-A KUBE-LOAD-BALANCER .*RETURN\n", "", "keeps the source of what comes, under policy Local"),
    Edit(
        "iptables",
        r"^(-A KUBE-LOAD-BALANCER .*RETURN\n)(-A KUBE-LOAD-BALANCER -j .*\n)",
        r"\2\1",
        "KUBE-LOAD-BALANCER of table nat has its rules in another order",
    ),
    Edit("iptables", r"^-A KUBE-NODE-PORT .*TCP.*MASQ\n", "", "masquerades what comes to node ports of TCP"),
    Edit("iptables", r"^-A KUBE-SOURCE-RANGES-FIREWALL -j DROP\n", "", "drops what source ranges do not admit"),
    Edit("iptables", r"^-A KUBE-PROXY-FIREWALL .*\n", "", "asks for source ranges"),
    Edit("iptables", r"^-A KUBE-IPVS-FILTER .*REJECT.*\n", "", "refuses connections to other ports"),
    Edit("iptables", r"^(:|-A )KUBE-PROXY-FIREWALL .*\n", "", "table filter has no chain KUBE-PROXY-FIREWALL"),
    Edit("iptables", r"^(-A KUBE-SERVICES .*-NODE-PORT)$", r"\1\n-A KUBE-SERVICES -j LOG", "not understood: -j LOG"),
    Edit("iptables", r"^-A KUBE-FORWARD.*mark.*\n", "", "KUBE-FORWARD does not accept what is marked"),
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{edit.text} {edit.told[:40]}")
def test_damage_is_told(edit: Edit) -> None:
    texts = sample()
    text, count = re.subn(edit.pattern, edit.replacement, getattr(texts, edit.text), flags=re.MULTILINE)
    assert count, edit.pattern
    reading = read(texts._replace(**{edit.text: text}))
    told = "\n".join(sorted(reading.table.damage))
    assert edit.told in told, told
    assert len(reading.table.routes) >= 10, "the rest is still read"


def test_the_node_is_kept_from_what_its_source_ranges_do_not_admit_it_to() -> None:
    """IPVS-16."""
    ranges = networks("198.51.100.0/24")
    lb = Route(kind=Kind.LOAD_BALANCER, backends=backends("10.244.1.1"), source_ranges=ranges)
    routes = {at("203.0.113.1:80"): lb, at("203.0.113.1:443"): lb}
    texts = lay_out(ForwardingTable(family=Family.IPV4, routes=routes, node=NodeFacts(bound=True)), NODE[Family.IPV4])
    assert not read(texts).table.damage
    for pattern, replacement, told in (
        (
            r"-A KUBE-IPVS-OUT-FILTER .*--vport 80 .*\n",
            "",
            "203.0.113.1:80/TCP: connections of the node itself are not dr",
        ),
        (r"--vport 80 ", "--vport 81 ", "203.0.113.1:81/TCP are dropped, which is no load balancer's"),
        (r"--vport 80 ", "--vport x ", "KUBE-IPVS-OUT-FILTER has a rule that is not understood"),
    ):
        edited, count = re.subn(pattern, replacement, texts.iptables)
        assert count
        told_all = "\n".join(read(texts._replace(iptables=edited)).table.damage)
        assert told in told_all, told_all


def test_a_filter_table_that_somebody_flushed_is_no_older_version() -> None:
    texts = sample()
    bare = re.sub(r"(?s)\*filter\n.*?COMMIT", "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT", texts.iptables)
    reading = read(texts._replace(iptables=bare))
    told = "\n".join(reading.table.damage)
    assert "table filter has no chain KUBE-IPVS-FILTER" in told
    assert "table filter has no chain KUBE-PROXY-FIREWALL" in told
    assert "FORWARD of table filter has no rule that leads to KUBE-FORWARD" in told
    (note,) = reading.notes
    assert "(IPVS-17)" not in note


@pytest.mark.parametrize("family", list(Family))
def test_no_line_can_go_unnoticed(family: Family) -> None:
    """Whatever line is deleted: the table is another, or has damage."""
    texts = sample(family)
    whole = read(texts)
    assert not whole.table.damage
    idle = re.compile(r"#.*|:.*|\*.*|COMMIT|")
    checked = 0
    for name in ("ipvsadm", "ipset", "iptables"):
        lines = getattr(texts, name).split("\n")
        for number, line in enumerate(lines):
            if idle.fullmatch(line) or line.startswith("create"):
                continue
            shorter = "\n".join([*lines[:number], *lines[number + 1 :]])
            (reading,) = readings(b"".join(each.encode() for each in texts._replace(**{name: shorter})))
            assert reading.table != whole.table, line
            checked += 1
    assert checked > 40


def test_servers_of_somebody_else_are_left_aside() -> None:
    """By mark, or at addresses that are no Service's (IPVS-24: kube-proxy leaves those that excludeCIDRs name)."""
    texts = sample()
    more = "-A -t 198.51.100.7:443 -s wrr\n-a -t 198.51.100.7:443 -r 10.1.1.1:443 -g -w 100\n-A -f 7 -s lc\n"
    assert read(texts._replace(ipvsadm=texts.ipvsadm + more)) == read(texts)


def test_hairpins_of_endpoints_that_nobody_uses_are_no_difference() -> None:
    """B-214: all endpoints of the node are there, in whatever condition."""
    table = wanted()[Family.IPV4]
    more = Endpoint(parse_address("10.244.1.99"), next(iter(table.hairpins)).protocol, 8080)
    reading = read(lay_out(msgspec.structs.replace(table, hairpins=table.hairpins | {more}), NODE[Family.IPV4]))
    assert more in reading.table.hairpins
    assert drift(reading, table, configured=True) == []
    # One that a frontend uses, and that is on another node, is a difference.
    far = min({each for route in table.routes.values() for each in route.backends} - _hairpinned(table))
    wrong = {Endpoint(far.address, each.protocol, far.port) for each in table.hairpins}
    reading = read(lay_out(msgspec.structs.replace(table, hairpins=table.hairpins | wrong), NODE[Family.IPV4]))
    assert drift(reading, table, configured=True) != []


def _hairpinned(table: ForwardingTable) -> set[Backend]:
    return {Backend(each.address, each.port) for each in table.hairpins}


def test_another_scheduler_for_all_is_one_setting() -> None:
    reading = read(lay_out(wanted()[Family.IPV4], NODE[Family.IPV4], scheduler="wlc"))
    assert not reading.table.damage
    assert {route.scheduler for route in reading.table.routes.values() if route.backends} == {"wlc"}
    assert drift(reading, wanted()[Family.IPV4], configured=True) == []


# --- a real one -----------------------------------------------------------------------------------------------------

OLDER = Path(__file__).parents[1] / "recordings" / "kube-proxy-v1.20.2-ipvs"
OLDER_FILES = ("ipvsadm-save", "ipset-save", "iptables-save", "ip6tables-save", "addresses.json")
BEHIND = {
    # 1.20 knows neither internalTrafficPolicy nor zones nor endpoints that serve while they terminate, and has no
    # fallback of policy Local (IPVS-20).
    ("10.96.30.13:80/TCP", "backend"),
    ("10.96.30.13:80/TCP", "without backend"),
    ("10.96.30.9:80/TCP", "backend"),
    ("10.96.30.9:80/TCP", "without backend"),
    ("10.96.30.12:80/TCP", "backend"),
    *(
        (frontend, what)
        for frontend in ("203.0.113.31:443/TCP", "*:31083/TCP")
        for what in ("policy", "without backend", "backend", "backend for outsiders")
    ),
}
"""Frontends on which kube-proxy 1.20.2 differs from what its objects mean today."""


def older(*names: str) -> list[Reading]:
    gathered = detect.Gathered()
    for name in names or OLDER_FILES:
        gathered.add(name, (OLDER / name).read_bytes())
    return [each.reading for each in gathered.readings()]


@pytest.mark.parametrize("configured", [True, False])
def test_what_a_real_kube_proxy_wrote_differs_only_where_it_is_of_another_age(configured: bool) -> None:
    four, six = older()
    assert not four.table.damage
    assert not six.table.damage
    assert drift(six, wanted()[Family.IPV6], configured=configured) == []
    table = wanted()[Family.IPV4]
    found = compare(as_held_by(four, table, configured=configured), named(four, table).table, capabilities_of("ipvs"))
    assert {(str(each.frontend), change.what) for each in found.frontends for change in each.changes} == BEHIND
    assert not found.hairpins
    # It lets nobody in at health-check node ports.
    assert [change.what for change in found.node] == ["health-check ports let in"]


def test_what_an_older_version_does_otherwise_is_said_in_one_line() -> None:
    four, six = older()
    (note,) = four.notes
    assert six.notes == four.notes
    for told in ("an older version", "KUBE-MARK-DROP", "IPVS-17", "IPVS-16", "TRF-27"):
        assert told in note


def test_a_real_one_has_node_ports_at_all_addresses_and_source_ranges() -> None:
    four, _ = older()
    own = frozenset(
        parse_address(each)
        for each in ("192.168.50.11", "192.168.51.11", "192.168.99.11", "203.0.113.1", "203.0.113.2")
    )
    assert four.table.node.node_port_addresses == own, "and not at loopback, where none is answered (IPVS-29)"
    ranged = four.table.routes[at("203.0.113.30:80")]
    assert ranged.source_ranges == networks("192.168.50.0/24", "198.51.100.0/24", "203.0.113.30/32")
    assert four.table.node.detector == SourcePrefix(networks("10.244.0.0/16")[0])
    assert (four.table.node.mark, four.table.node.bound) == (1 << 14, True)


@pytest.mark.parametrize("name", ["iptables-save", "ipset-save", "ipvsadm-save"])
def test_no_line_of_a_real_one_can_go_unnoticed(name: str) -> None:
    whole = older()
    lines = (OLDER / name).read_text().split("\n")
    # Words for people; a second rule for what a first one accepts; servers at loopback, which nobody reaches; the
    # policy of frontends that have no backend.
    idle = re.compile(
        r"#.*|:.*|\*.*|COMMIT||create .*|-A KUBE-FORWARD .*conntrack.*|-[Aa] -t 127.*"
        r"|add \S+-LOCAL(?:-TCP)? .*(?:31083|443)"
    )
    checked = 0
    for number, line in enumerate(lines):
        if idle.fullmatch(line):
            continue
        gathered = detect.Gathered()
        for each in OLDER_FILES:
            text = (OLDER / each).read_text()
            gathered.add(each, ("\n".join([*lines[:number], *lines[number + 1 :]]) if each == name else text).encode())
        found = [each.reading for each in gathered.readings()]
        assert [each.table for each in found] != [each.table for each in whole], line
        checked += 1
    assert checked > 15


def test_a_real_server_of_no_virtual_one_is_one_sentence() -> None:
    line = "-a -t 10.96.77.7:80 -r 10.244.1.1:80 -m -w 1\n"
    texts = sample()
    reading = read(texts._replace(ipvsadm=line * 2 + texts.ipvsadm))
    (told,) = reading.table.damage
    assert "a line of ipvsadm is not understood: -a -t 10.96.77.7:80" in told
