"""What rules of others do with packets to Services: chains, conditions of three answers, the kernel's forms of them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.explain import legacy, passing_nftables
from proxy.explain.crossing import Journey, bases_of, met
from proxy.explain.obstacles import MOST_WAYS, backends_of, obstacles
from proxy.explain.passing import Condition, ForeignRule, Passing, dropped_by, holds, may_drop
from proxy.explain.surroundings import ForeignChain, Surroundings
from proxy.explain.xtables import match_of
from rules.forwarding import Backend, Family, Kind, Protocol, Route, parse_address
from rules.nftables.expressions import (
    ACCEPT,
    CT_STATE,
    DROP,
    EQUAL,
    JUMP,
    META_IIFNAME,
    META_L4PROTO,
    NETWORK_HEADER,
    NOT_EQUAL,
    TRANSPORT_HEADER,
    Bitwise,
    Cmp,
    Ct,
    Decide,
    Expression,
    Lookup,
    Meta,
    Payload,
    Unknown,
    Verdict,
)
from rules.nftables.objects import ListedRule, RuleSpec

PACKET = Passing(parse_address("10.244.1.11"), Protocol.TCP, 80)
TO = Condition("destination", ("10.244.1.0/24",))
MARK = Condition("other", ("mark",))
ELSEWHERE = Condition("destination", ("10.9.0.0/16",))


def rule(action: str, *conditions: Condition, target: str = "", number: int = 1) -> ForeignRule:
    return ForeignRule(number, action, conditions, target)  # type: ignore[arg-type]


def hits(chains: dict[str, list[ForeignRule]], *, policy_drops: bool = False) -> list[tuple[str, bool]]:
    found = dropped_by("f", chains, PACKET, policy_drops=policy_drops)
    return [("policy" if each.rule is None else f"{each.chain} {each.rule.number}", each.sure) for each in found]


@pytest.mark.parametrize(
    ("chains", "policy_drops", "expected"),
    [
        ({}, True, [("policy", True)]),
        ({"f": [rule("accept", TO)]}, True, []),
        ({"f": [rule("accept", MARK)]}, True, [("policy", False)]),
        ({"f": [rule("accept", ELSEWHERE), rule("drop", TO)]}, False, [("f 1", True)]),
        ({"f": [rule("drop", MARK), rule("drop", TO, number=2)]}, False, [("f 1", False), ("f 2", False)]),
        ({"f": [rule("jump", target="g")], "g": [rule("drop", TO)]}, False, [("g 1", True)]),
        ({"f": [rule("jump", MARK, target="g")], "g": [rule("drop", TO)]}, False, [("g 1", False)]),
        ({"f": [rule("jump", target="g"), rule("drop")], "g": [rule("return")]}, False, [("f 1", True)]),
        ({"f": [rule("goto", target="g"), rule("drop")], "g": []}, False, []),
        ({"f": [rule("goto", MARK, target="g"), rule("drop")], "g": []}, False, [("f 1", False)]),
        ({"f": [rule("return", MARK), rule("drop")]}, False, [("f 1", False)]),
        ({"f": [rule("return"), rule("drop")]}, True, [("policy", True)]),
        ({"f": [rule("perhaps"), rule("drop")]}, False, [("f 1", False)]),
        ({"f": [rule("jump", target="SLUICE-FORWARD"), rule("drop")]}, True, [("f 1", False)]),
        ({"f": [rule("drop"), rule("jump", target="SLUICE-FORWARD")]}, True, [("f 1", True)]),
        ({"f": [rule("jump", target="KUBE-FORWARD"), rule("drop")]}, False, [("f 1", False)]),
        ({"f": [rule("jump", target="KUBE-SERVICES"), rule("drop")]}, False, [("f 1", True)]),
        ({"f": [rule("jump", target="f")]}, False, []),
    ],
)
def test_what_drops_a_packet(chains, policy_drops, expected):
    assert hits(chains, policy_drops=policy_drops) == expected


@pytest.mark.parametrize("chain", ["SLUICE-FORWARD", "KUBE-FORWARD"])
def test_a_proxy_accepts_first_packets_that_it_masquerades_and_no_others(chain):
    """IPT-15: so with a policy of DROP a pod does not reach a ClusterIP."""
    chains = {"f": [rule("jump", target=chain)]}
    for masqueraded, expected in ((True, []), (False, [True]), (None, [False])):
        packet = PACKET._replace(masqueraded=masqueraded)
        assert [each.sure for each in dropped_by("f", chains, packet, policy_drops=True)] == expected


ACTIONS = st.sampled_from(["accept", "drop", "reject", "return", "next", "perhaps", "jump", "goto"])
RULES = st.builds(
    ForeignRule,
    st.integers(1, 9),
    ACTIONS,
    st.lists(st.sampled_from([TO, MARK, ELSEWHERE]), max_size=2).map(tuple),
    st.sampled_from(["g", "h", "f", "nowhere"]),
)


@given(st.dictionaries(st.sampled_from(["f", "g", "h"]), st.lists(RULES, max_size=4)), st.booleans(), st.booleans())
def test_what_is_sure_stays_so_whatever_a_packet_shows(chains, policy_drops, shown):
    """The mark made known, as set or not: what surely dropped still does, and what drops now was among what might."""
    known = Condition("protocol", ("tcp",), not shown)
    told = {
        name: [
            ForeignRule(
                each.number, each.action, tuple(known if one is MARK else one for one in each.conditions), each.target
            )
            for each in rules
            if each.action != "perhaps"
        ]
        for name, rules in chains.items()
    }
    before = dropped_by("f", chains, PACKET, policy_drops=policy_drops)
    after = dropped_by("f", told, PACKET, policy_drops=policy_drops)
    if any(each.sure for each in before):
        assert after
    if after and all(each.sure for each in after):
        assert before


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (TO, True),
        (Condition("destination", ("10.244.1.0/24",), True), False),  # inverse
        (Condition("source", ("10.0.0.0/8",)), None),
        (Condition("in", ("eth0",)), None),
        (Condition("out", ("veth*",)), None),
        (Condition("port", ("70-79", "80")), True),
        (Condition("port", ("81-90",)), False),
        (Condition("protocol", ("udp",)), False),
        (Condition("state", ("established", "related")), False),
        (Condition("state", ("new",)), True),
        (Condition("translated"), True),
        (Condition("family", ("IPv6",)), False),
        (MARK, None),
    ],
)
def test_conditions(condition, expected):
    assert holds(condition, PACKET) is expected


def test_interfaces_and_clients_that_are_known_are_judged():
    known = PACKET._replace(source=parse_address("10.1.1.1"), incoming="eth0", outgoing="veth7")
    assert holds(Condition("source", ("10.0.0.0/8",)), known) is True
    assert holds(Condition("in", ("eth0",), True), known) is False  # inverse
    assert holds(Condition("out", ("veth*",)), known) is True


# --- nftables --------------------------------------------------------------------------------------------------------


SETS = {
    "pods": ((bytes((10, 1, 2, 0)), bytes((10, 1, 3, 255))), (bytes((10, 9, 9, 9)), bytes((10, 9, 9, 9)))),
    "ports": ((b"\0\x50\0\0", b"\0\x50\0\0"), (b"\0\x60\0\0", b"\0\x63\0\0")),
    "protocols": ((b"\x06\0\0\0", b"\x06\0\0\0"), (b"\x11\0\0\0", b"\x11\0\0\0")),
    "states": ((struct.pack("=I", 2),) * 2, (struct.pack("=I", 4),) * 2),
}


def decoded(*expressions: Expression) -> ForeignRule:
    return passing_nftables.decode(ListedRule("f", 7, RuleSpec(expressions)), SETS)


NEW = struct.pack("=I", 8)


@pytest.mark.parametrize(
    ("expressions", "words"),
    [
        ((Payload(1, NETWORK_HEADER, 16, 4), Cmp(1, EQUAL, bytes((10, 1, 2, 3)))), "destination 10.1.2.3/32"),
        ((Payload(1, NETWORK_HEADER, 16, 3), Cmp(1, EQUAL, bytes((10, 1, 2)))), "destination 10.1.2.0/24"),
        (
            (Payload(1, NETWORK_HEADER, 12, 8), Cmp(1, EQUAL, bytes((10, 0, 0, 1, 10, 1, 2, 3)))),
            "source 10.0.0.1/32, destination 10.1.2.3/32",
        ),
        ((Payload(1, NETWORK_HEADER, 12, 8), Cmp(1, NOT_EQUAL, bytes(8))), "other bytes of the packet"),
        (
            (
                Payload(1, NETWORK_HEADER, 12, 4),
                Bitwise(1, 1, 4, bytes((255, 128, 0, 0)), bytes(4)),
                Cmp(1, NOT_EQUAL, bytes((10, 128, 0, 0))),
            ),
            "not source 10.128.0.0/9",
        ),
        ((Payload(1, NETWORK_HEADER, 24, 16), Cmp(1, EQUAL, b"\xfd" + bytes(15))), "destination fd00::/128"),
        ((Payload(1, TRANSPORT_HEADER, 2, 2), Cmp(1, EQUAL, b"\0\x50")), "port 80"),
        ((Payload(1, TRANSPORT_HEADER, 2, 2), Cmp(1, 5, b"\0\x50"), Cmp(1, 3, b"\0\x60")), "port 80-65535, port 0-96"),
        ((Payload(1, TRANSPORT_HEADER, 2, 2), Cmp(1, 2, b"\0\x50")), "other more or less of bytes of the packet"),
        ((Meta(1, META_IIFNAME), Cmp(1, NOT_EQUAL, b"eth0\0")), "not in eth0"),
        ((Meta(1, 7), Cmp(1, EQUAL, b"veth")), "out veth*"),
        ((Meta(1, META_L4PROTO), Cmp(1, EQUAL, b"\x11")), "protocol udp"),
        ((Meta(1, 1), Cmp(1, EQUAL, b"\x08\0")), "family IPv4"),
        ((Meta(1, 1), Cmp(1, NOT_EQUAL, b"\x86\xdd")), "not family IPv6"),
        ((Meta(1, 1), Cmp(1, EQUAL, b"\x08\6")), "family none"),
        ((Meta(1, 3), Cmp(1, EQUAL, NEW)), "other mark"),
        ((Ct(1, CT_STATE), Bitwise(1, 1, 4, NEW, bytes(4)), Cmp(1, NOT_EQUAL, bytes(4))), "state new"),
        ((Ct(1, 2), Bitwise(1, 1, 4, struct.pack("=I", 32), bytes(4)), Cmp(1, NOT_EQUAL, bytes(4))), "translated"),
        ((Payload(1, NETWORK_HEADER, 16, 4), Lookup("blocked", 1)), "other set blocked"),
        ((Payload(1, NETWORK_HEADER, 16, 4), Lookup("pods", 1)), "destination 10.1.2.0/23 or 10.9.9.9/32"),
        ((Payload(1, NETWORK_HEADER, 12, 4), Lookup("pods", 1, 1)), "not source 10.1.2.0/23 or 10.9.9.9/32"),
        ((Payload(1, TRANSPORT_HEADER, 2, 2), Lookup("ports", 1)), "port 80 or 96-99"),
        ((Meta(1, META_L4PROTO), Lookup("protocols", 1)), "protocol tcp or udp"),
        ((Ct(1, CT_STATE), Lookup("states", 1)), "state established or related"),
        ((Meta(1, 3), Lookup("ports", 1)), "other set ports"),
        ((Payload(1, NETWORK_HEADER, 12, 8), Lookup("pods", 1)), "other set pods"),
        ((Unknown("limit", b""),), "other limit"),
        ((Unknown("counter", b""),), "whatever comes"),
    ],
)
def test_rules_of_nftables(expressions, words):
    found = decoded(*expressions, Decide(Verdict(DROP)))
    assert (found.number, found.action, found.words) == (7, "drop", words)


def test_verdicts_of_nftables():
    assert decoded(Decide(Verdict(ACCEPT))).action == "accept"
    assert (decoded(Decide(Verdict(JUMP, "g"))).action, decoded(Decide(Verdict(JUMP, "g"))).target) == ("jump", "g")
    assert decoded(Unknown("counter", b"")).action == "next"
    assert decoded(Unknown("queue", b"")).action == "perhaps"


@given(st.text(max_size=9), st.binary(max_size=80))
def test_no_expression_of_a_stranger_raises(name, raw):
    for each in (name, "range", "match", "target", "lookup", "meta", "reject"):
        decoded(Unknown(each, raw), Decide(Verdict(DROP)))


@given(st.integers(0, 4), st.integers(0, 40), st.integers(0, 40), st.binary(max_size=20), st.binary(max_size=20))
def test_no_payload_of_a_stranger_raises(base, offset, length, mask, value):
    decoded(Payload(1, base, offset, length), Bitwise(1, 1, length, mask, bytes(length)), Cmp(1, EQUAL, value))
    decoded(Payload(1, base, offset, length), Cmp(1, NOT_EQUAL, value))


# --- iptables --------------------------------------------------------------------------------------------------------


@given(st.sampled_from(["conntrack", "state", "tcp", "udp", "multiport", "comment", "set"]), st.binary(max_size=200))
def test_no_match_of_a_stranger_raises(name, data):
    for revision in (0, 1, 3):
        match_of(name, revision, data)


@pytest.mark.parametrize(
    ("name", "revision", "data", "words"),
    [
        ("comment", 0, b"x", ""),
        ("tcp", 0, struct.pack("=4H4B", 0, 65535, 80, 80, 0, 0, 0, 0), "port 80"),
        ("tcp", 0, struct.pack("=4H4B", 0, 65535, 80, 90, 0, 0, 0, 2), "not port 80-90"),
        ("tcp", 0, struct.pack("=4H4B", 0, 65535, 0, 65535, 0, 0x17, 2, 0), ""),
        ("tcp", 0, struct.pack("=4H4B", 0, 65535, 0, 65535, 0, 0x17, 2, 4), "state established"),
        ("udp", 0, struct.pack("=4HB", 7, 7, 0, 65535, 0), "source port 7"),
        ("multiport", 1, struct.pack("=2B15H15BB", 1, 2, 80, 443, *[0] * 13, *[0] * 15, 0), "port 80 or 443"),
        ("multiport", 1, struct.pack("=2B15H15BB", 1, 2, 80, 90, *[0] * 13, 1, *[0] * 14, 1), "not port 80-90"),
        ("multiport", 1, struct.pack("=2B15H15BB", 0, 1, 80, *[0] * 14, *[0] * 15, 0), "other multiport"),
        ("conntrack", 3, bytes(146) + struct.pack("=3H", 1, 0, 6) + bytes(12), "state established or related"),
        ("conntrack", 3, bytes(146) + struct.pack("=3H", 1, 1, 8) + bytes(12), "not state new"),
        ("conntrack", 3, bytes(146) + struct.pack("=3H", 1, 0, 0x80) + bytes(12), "translated"),
        ("conntrack", 3, bytes(146) + struct.pack("=3H", 3, 0, 8) + bytes(12), "other conntrack"),
        ("set", 1, b"", "other set"),
    ],
)
def test_matches_of_iptables(name, revision, data, words):
    assert ", ".join(map(str, match_of(name, revision, data))) == words


@given(st.sampled_from(Family), st.binary(min_size=84, max_size=84), st.binary(max_size=600))
def test_no_table_of_legacy_iptables_raises_anything_else(family, info, entries):
    try:
        legacy.decode(family, info, entries)
    except OSError as error:
        assert "legacy iptables" in str(error)  # noqa: PT017  # or nothing is raised


# --- obstacles -------------------------------------------------------------------------------------------------------


def test_chains_of_other_proxies_and_of_the_other_family_are_nobodys_obstacles():
    def base(family: str, table: str) -> ForeignChain:
        return ForeignChain(family, table, "f", forwards=True, drops=True, rules=())

    node = Surroundings(chains=(base("ip", "kube-proxy"), base("ip6", "mine"), base("inet", "mine")))
    [(place, bases)] = bases_of(node, Family.IPV4).items()
    assert place == ("forward", "translated")
    assert [str(each.base) for each in obstacles(bases, [PACKET]).obstacles] == ["inet mine f"]


FRONTEND = Passing(parse_address("10.96.0.1"), Protocol.TCP, 443, stage="tracked")


@pytest.mark.parametrize("by_node", [False, True])
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize(
    ("carried", "chain", "priority", "comes", "sees"),
    [
        # To chains of prerouting comes what the node does not send, to those of output what it does.
        ("translated", "prerouting", -300, "in, or to itself", "frontend untracked"),
        ("translated", "prerouting", -150, "in, or to itself", "frontend tracked"),
        ("translated", "prerouting", 0, "in, or to itself", "backend translated"),
        ("translated", "forward", 0, "in to others", "backend translated"),
        ("translated", "input", 0, "to the node", "backend translated"),
        ("translated", "output", -300, "out", "frontend untracked"),
        ("translated", "output", 0, "out", "backend translated"),
        # IPVS takes it in input, a worker behind that: all see the frontend.
        ("bound", "prerouting", 0, "in, or to itself", "frontend tracked"),
        ("bound", "forward", 0, "never", ""),
        ("bound", "input", 0, "in, or to itself", "frontend tracked"),
        ("bound", "output", -150, "out, or sent on", "frontend tracked"),
        ("bound", "output", 0, "out, or sent on", "backend tracked"),
        ("relayed", "prerouting", -300, "always", "frontend untracked"),
        ("relayed", "forward", 0, "never", ""),
        ("relayed", "input", 0, "always", "frontend tracked"),
        ("relayed", "output", 0, "out", "frontend tracked"),
        # Before and behind all that stand the chains of devices.
        ("translated", "ingress", 0, "in", "frontend untracked"),
        ("bound", "ingress", 0, "in", "frontend untracked"),
        ("relayed", "ingress", 0, "in", "frontend untracked"),
        ("translated", "egress", 0, "to others", "backend translated"),
        ("bound", "egress", 0, "to others", "backend tracked"),
        ("relayed", "egress", 0, "never", ""),
        ("plain", "egress", 0, "to others", "backend tracked"),
        ("plain", "output", 0, "out", "frontend tracked"),
        ("plain", "input", 0, "to the node", "frontend tracked"),
    ],
)
def test_which_chains_see_a_packet_and_what_they_see_of_it(*, carried, chain, priority, comes, sees, by_node, stays):
    base = ForeignChain("ip", "filter", "c", forwards=chain == "forward", drops=False, rules=())
    if chain != "forward":
        base = base._replace(hook=chain, priority=priority)
    [(hook, stage)] = bases_of(Surroundings(chains=(base,)), Family.IPV4)
    assert hook == chain
    found = [seen for _, seen in met(hook, stage, [Journey(FRONTEND, PACKET, carried, by_node, stays)])]
    expected = {
        "in": not by_node, "out": by_node, "in to others": not (by_node or stays), "to the node": stays,
        "in, or to itself": stays or not by_node,
        "out, or sent on": by_node or not stays,
        "to others": not stays, "always": True, "never": False,
    }[comes]  # fmt: skip
    assert bool(found) is expected
    for each in found:
        what = {FRONTEND.destination: "frontend", PACKET.destination: "backend"}[each.destination]
        by_loopback = by_node and hook in ("prerouting", "input")
        if by_loopback and carried in ("translated", "bound"):
            sees = "backend translated" if carried == "translated" else "backend tracked"
        elif carried == "bound" and hook == "output" and not by_node:
            sees = "backend tracked"
        assert f"{what} {each.stage}" == sees
        assert each.incoming == ("lo" if by_loopback else "")


def test_answers_come_from_a_port_and_belong_to_a_connection():
    answer = PACKET._replace(answers=True)
    known = {
        ("port", "80"): (True, None),
        ("source port", "80"): (None, True),
        ("source port", "81"): (None, False),
        ("state", "new"): (True, False),
        ("state", "established"): (False, True),
        ("translated", ""): (True, True),
    }
    for (what, value), expected in known.items():
        condition = Condition(what, (value,))  # type: ignore[arg-type]
        assert (holds(condition, PACKET), holds(condition, answer)) == expected, what
    chains = {"f": [rule("jump", target="KUBE-FORWARD"), rule("drop")]}
    assert not dropped_by("f", chains, answer, policy_drops=True)


def test_before_destination_nat_nothing_is_translated_and_before_connection_tracking_no_state_is_known():
    untracked = FRONTEND._replace(stage="untracked")
    assert (holds(Condition("translated"), FRONTEND), holds(Condition("state", ("new",)), FRONTEND)) == (False, True)
    assert holds(Condition("state", ("new",)), untracked) is None


def test_chains_of_kube_router_are_a_network_policys_and_not_kube_proxys():
    """k3s has them: by their names they could be a proxy's."""
    chains = {
        "f": [rule("jump", target="KUBE-ROUTER-FORWARD")],
        "KUBE-ROUTER-FORWARD": [rule("jump", TO, target="KUBE-POD-FW-ABC")],
        "KUBE-POD-FW-ABC": [rule("reject")],
    }
    assert hits(chains) == [("KUBE-POD-FW-ABC 1", True)]
    assert may_drop("f", chains)


def test_ways_are_asked_of_every_backend_or_of_one_in_each_network():
    def routes(count: int) -> list[Route]:
        addresses = (bytes((10, n >> 16, n >> 8 & 255, n & 255)) for n in range(count))
        return [Route(kind=Kind.CLUSTER_IP, backends=frozenset({Backend(each, 80)}), label="") for each in addresses]

    assert len(backends_of(routes(MOST_WAYS))) == MOST_WAYS
    assert len(backends_of(routes(MOST_WAYS + 1))) == MOST_WAYS // 256 + 1
