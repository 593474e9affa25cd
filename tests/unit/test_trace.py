"""Traces: events from bytes, packets from events, and their words; what the kernel really tells is in tests/netns."""

from __future__ import annotations

import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.trace import packets
from proxy.trace.judged import Judge
from proxy.trace.packets import MOST_EARLY, MOST_OPEN, Assembly, Passed, Place, Traced
from proxy.trace.told import Told, Witness, lines, tell, to_data
from rules.explanation import Why
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, Kind, Protocol, Route, parse_address
from rules.netlink.attributes import DecodeError, attribute, attributes, be32, be64, message, nested, text
from rules.netlink.headers import Headers
from rules.netlink.transaction import attributes_of
from rules.nftables.expressions import ACCEPT, DROP, GOTO
from rules.nftables.trace import (
    ENTERING,
    LEAVING,
    OWNER,
    POLICY,
    RULE,
    SAMPLE,
    Event,
    Wanted,
    decode_event,
    decode_events,
    trace_table,
)
from tests.strategies import tables

OWN = "sluice-trace-1"
TRACE = 10 << 8 | 17
CLIENT, SERVICE, BACKEND, NODE = map(parse_address, ("10.244.1.13", "10.96.0.1", "10.244.2.11", "192.168.50.11"))
BEFORE = Headers(CLIENT, 40000, SERVICE, 80, Protocol.TCP)
AFTER = Headers(NODE, 50000, BACKEND, 8080, Protocol.TCP)
IPV4 = bytes((0x45, 0, 0, 60, 0, 0, 0, 0, 64, 6, 0, 0)) + CLIENT + SERVICE
TCP = struct.pack("!HH", 40000, 80) + bytes(16)
TABLE = ForwardingTable(
    family=Family.IPV4,
    routes={
        Frontend(SERVICE, Protocol.TCP, 80): Route(
            kind=Kind.CLUSTER_IP, backends=frozenset({Backend(BACKEND, 8080)}), label="default/web:http"
        )
    },
)


def payload(*parts: bytes, family: int = 2) -> bytes:
    return bytes((family, 0, 0, 0)) + b"".join(parts)


def rule_event(*more: bytes) -> bytes:
    verdict = nested(5, be32(1, GOTO), text(2, "services"))
    return payload(text(1, "sluice"), text(2, "nat-output"), be64(3, 7), be32(4, RULE), verdict, be32(6, 99), *more)


def event(
    chain: str, headers: Headers | None = None, *, table: str = "sluice", verdict: int = ACCEPT, **other
) -> Event:
    known = {"id": 1, "family": 2, "kind": RULE, "handle": 3, "target": "", "input": 0, "output": 0, **other}
    return Event(table=table, chain=chain, headers=headers, verdict=verdict, **known)


def put_together(*events: Event) -> tuple[list[Traced], list[Traced]]:
    assembly = Assembly(OWN)
    return [traced for each in events for traced in assembly.add(each)], assembly.rest()


def told(traced: Traced, table: ForwardingTable = TABLE, *, rejects: bool = False) -> Told:
    return tell(
        traced, table, frozenset({NODE}), Witness(lambda index: f"eth{index}", lambda _: "", Judge(lambda _: rejects))
    )


# --- bytes -----------------------------------------------------------------------------------------------------


def test_an_event_about_a_rule():
    found = decode_event(rule_event(attribute(8, IPV4), attribute(9, TCP), be32(10, 4), be32(12, 5)))
    assert found == Event(99, 2, "sluice", "nat-output", RULE, 7, GOTO, "services", BEFORE, 4, 5)


def test_an_event_about_a_policy():
    found = decode_event(payload(text(1, "t"), text(2, "c"), be32(4, POLICY), be32(6, 1), be32(16, DROP), family=1))
    assert found == Event(1, 1, "t", "c", POLICY, 0, DROP, "", None, 0, 0)


def test_the_headers_of_ipv6():
    client, service = parse_address("fd00::1"), parse_address("fd00::2")
    network = bytes((0x60, 0, 0, 0, 0, 20, 17, 64)) + client + service
    assert decode_event(rule_event(attribute(8, network), attribute(9, TCP))).headers == Headers(
        client, 40000, service, 80, Protocol.UDP
    )


@pytest.mark.parametrize(
    ("network", "transport"),
    [
        (b"", TCP),
        (IPV4[:19], TCP),
        (IPV4, TCP[:3]),
        (b"\x55" + IPV4[1:], TCP),
        (IPV4.replace(b"\x40\6", b"\x40\1"), TCP),
    ],
)
def test_a_packet_without_ports_has_no_headers(network, transport):
    assert decode_event(rule_event(attribute(8, network), attribute(9, transport))).headers is None


@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(st.tuples(st.integers(0, 20), st.binary(max_size=45))).map(
            lambda parts: payload(*(attribute(kind, value) for kind, value in parts))
        ),
        st.binary(max_size=60).map(lambda tail: rule_event()[: 80 - len(tail)] + tail),
    )
)
def test_arbitrary_bytes_are_events_or_raise_decode_error_alone(data):
    with contextlib.suppress(DecodeError):
        assert isinstance(decode_event(data), Event)
    assert all(isinstance(each, Event) for each in decode_events(data))
    assert all(isinstance(each, Event) for each in decode_events(message(TRACE, 0, data)))


def test_messages_of_other_kinds_are_passed_over():
    datagram = message(TRACE - 1, 0, rule_event()) + message(TRACE, 0, rule_event())
    assert [each.id for each in decode_events(datagram)] == [99]


def test_the_table_belongs_to_its_socket():
    first = trace_table(Family.IPV4, OWN, Wanted(frozenset()), 5)[0]
    assert attributes(attributes_of(first[16:]))[2] == OWNER.to_bytes(4)


# --- packets ---------------------------------------------------------------------------------------------------


def test_a_packet_that_is_translated_and_leaves():
    [traced], rest = put_together(
        event(SAMPLE, BEFORE, table=OWN, verdict=-1, input=3),
        event("new-prerouting", BEFORE, table=OWN, kind=POLICY),
        event("nat-prerouting", BEFORE, verdict=-3, target="services"),
        event("services", verdict=-4, target="internal"),
        event(LEAVING, AFTER, table=OWN, kind=POLICY, output=2),
    )
    expected = Traced(
        before=BEFORE,
        after=AFTER,
        input=3,
        output=2,
        chains=("nat-prerouting", "services", "internal"),
        arrived=True,
    )
    assert (traced, rest) == (expected, [])
    assert (traced.translated, traced.masqueraded) == (True, True)


def test_a_packet_that_is_dropped_by_a_rule_and_one_by_a_policy():
    start = event(SAMPLE, BEFORE, table=OWN, verdict=-1)
    [by_rule], _ = put_together(start, event("source-ranges", verdict=DROP))
    [by_policy], _ = put_together(start, event("FORWARD", BEFORE, table="filter", verdict=DROP, kind=POLICY))
    assert by_rule.dropped == Place(2, "sluice", "source-ranges", 3)
    assert by_policy.dropped == Place(2, "filter", "FORWARD", 0)


def test_a_packet_to_the_node_itself_is_followed_over_the_loopback_interface():
    finished, rest = put_together(
        event(SAMPLE, BEFORE, table=OWN, verdict=-1),
        event(LEAVING, AFTER, table=OWN, kind=POLICY, output=1),
        event("raw", BEFORE, table="other", id=5),
        event("raw", AFTER, table="other", id=2, input=1),
        event("refuse-node-ports", verdict=DROP, id=2),
    )
    assert [traced.dropped.chain for traced in finished] == ["refuse-node-ports"]
    assert rest == []


def test_numbers_come_again_and_packets_without_an_end_are_kept():
    start = event(SAMPLE, BEFORE, table=OWN, verdict=-1)
    again = event(SAMPLE, AFTER, table=OWN, verdict=-1)
    [lost], [kept] = put_together(start, again)
    assert (lost.before, kept.before) == (BEFORE, AFTER)


def test_traces_of_others_are_nobodys_packets():
    assert put_together(event("nat-output", BEFORE), event(LEAVING, BEFORE, table="sluice-trace-2")) == ([], [])


_NAMES = st.sampled_from([SAMPLE, LEAVING, ENTERING, "services", "refuse-frontends", "x"])
_HEADERS = st.sampled_from([None, BEFORE, AFTER])


@given(
    st.lists(
        st.builds(
            Event,
            id=st.integers(0, 3),
            family=st.sampled_from([0, 1, 2, 10]),
            table=st.sampled_from([OWN, "sluice", "other"]),
            chain=_NAMES,
            kind=st.integers(0, 4),
            handle=st.integers(0, 9),
            verdict=st.integers(-6, 6),
            target=st.sampled_from(["", "services"]),
            headers=_HEADERS,
            input=st.integers(0, 3),
            output=st.integers(0, 3),
        )
    ),
    tables(Family.IPV4),
    st.booleans(),
)
def test_whatever_comes_no_packet_is_told_twice_and_all_have_words(events, table, rejects):
    finished, rest = put_together(*events)
    assert len(finished) + len(rest) <= sum(each.chain == SAMPLE and each.table == OWN for each in events)
    for traced in [*finished, *rest]:
        one = told(traced, table, rejects=rejects)
        assert list(lines(one))
        assert to_data(one)["outcome"]["is"] in {"reaches", "rejected", "dropped", "untouched", "unseen"}


def test_packets_without_an_end_do_not_pile_up():
    starts = [event(SAMPLE, BEFORE, table=OWN, verdict=-1, id=number) for number in range(MOST_OPEN + 50)]
    assert len(put_together(*starts)[1]) == MOST_OPEN


# --- words -----------------------------------------------------------------------------------------------------


def test_a_packet_that_reaches_a_backend():
    one = told(Traced(before=BEFORE, after=AFTER._replace(source=CLIENT, source_port=40000), output=2, arrived=True))
    assert one.expected
    assert to_data(one)["outcome"]["backend"] == "10.244.2.11:8080"
    assert list(lines(one))[-1] == "  The connection goes to 10.244.2.11:8080, its source kept."


@pytest.mark.parametrize(
    "traced",
    [
        Traced(before=BEFORE, after=AFTER, arrived=True),  # masqueraded
        Traced(before=BEFORE, after=BEFORE._replace(destination=NODE), arrived=True),  # another backend
        Traced(before=BEFORE, after=BEFORE, arrived=True),
        Traced(before=BEFORE, after=BEFORE, dropped=Place(2, "sluice", "refuse-frontends", 4)),
    ],
)
def test_what_the_table_does_not_say_is_marked(traced):
    one = told(traced)
    assert not one.expected
    assert "the rules as they were when the trace began say" in list(lines(one))[-1].lower()


@pytest.mark.parametrize(("client", "expected"), [(CLIENT, False), (NODE, True)])
def test_a_source_that_is_kept_where_the_table_says_masquerade_is_marked_but_for_the_nodes_own(client, expected):
    """The node's own may have been replaced by itself, which nobody sees."""
    facts = msgspec.structs.replace(TABLE.node, masquerade_all=True)
    before = BEFORE._replace(source=client)
    after = before._replace(destination=BACKEND, port=8080)
    one = told(Traced(before=before, after=after, arrived=True), msgspec.structs.replace(TABLE, node=facts))
    assert one.expected is expected
    assert list(lines(one))[-1].startswith("  !") is not expected


@pytest.mark.parametrize(
    ("chain", "rejects", "outcome"),
    [
        ("source-ranges", False, ("dropped", Why.SOURCE_RANGES)),
        ("refuse-frontends", True, ("rejected", Why.NO_ENDPOINTS)),
        ("refuse-node-ports", True, ("rejected", Why.NO_ENDPOINTS)),
        ("refuse-frontends", False, ("dropped", Why.NO_LOCAL_ENDPOINTS)),
        ("refuse-cluster-ips", True, ("rejected", Why.CLOSED_PORT)),
        ("refuse-cluster-ips", False, ("dropped", Why.UNALLOCATED)),
        ("guard-loopback", False, ("dropped", Why.LOOPBACK)),
    ],
)
def test_our_rules_that_refuse_by_their_chains(chain, rejects, outcome):
    data = to_data(told(Traced(before=BEFORE, after=BEFORE, dropped=Place(2, "sluice", chain, 4)), rejects=rejects))
    assert (data["outcome"]["is"], Why(data["outcome"]["why"])) == outcome
    assert data["outcome"]["by"] == f"rule 4 of chain {chain} of table ip sluice"


@pytest.mark.parametrize(
    ("chain", "rejects", "outcome"),
    [
        ("SLUICE-REJECT-NODE-PORT", False, ("rejected", Why.NO_ENDPOINTS)),
        ("SLUICE-DROP-LOAD-BALANCER", True, ("dropped", Why.NO_LOCAL_ENDPOINTS)),
        ("SLUICE-R", False, ("dropped", Why.SOURCE_RANGES)),
        ("SLUICE-P-0A600-18", False, ("dropped", Why.SOURCE_RANGES)),
        ("SLUICE-FW-ABCDEFGHIJKLM", False, ("dropped", Why.SOURCE_RANGES)),
        ("SLUICE-C-0A600-18", True, ("rejected", Why.CLOSED_PORT)),
        ("SLUICE-REFUSE-CLUSTER-IPS", False, ("dropped", Why.UNALLOCATED)),
        ("SLUICE-GUARD", False, ("dropped", Why.LOOPBACK)),
    ],
)
@pytest.mark.parametrize("legacy", [True, False])
def test_rules_of_iptables_that_refuse_by_their_chains(chain, rejects, outcome, legacy):
    place = Place(2, "filter", chain, 4, ("REJECT" if rejects else "DROP") if legacy else "")
    data = to_data(told(Traced(before=BEFORE, after=BEFORE, dropped=place), rejects=rejects))
    assert (data["outcome"]["is"], Why(data["outcome"]["why"])) == outcome


def test_a_rule_of_ours_that_refuses_nothing_is_not_laid_at_the_door_of_others():
    one = told(Traced(before=BEFORE, after=BEFORE, dropped=Place(2, "filter", "SLUICE-FORWARD", 1)))
    assert list(lines(one))[-2] == "  The connection is dropped by rule 1 of chain SLUICE-FORWARD of table ip filter."


# --- legacy iptables -------------------------------------------------------------------------------------------


def passed(chain: str, headers: Headers = BEFORE, *, end: str = "") -> Passed:
    return Passed(headers, Place(2, "filter", chain, 1, end), bool(end))


def test_lines_of_legacy_iptables_belong_to_the_packet_of_their_source():
    assembly = Assembly(OWN)
    assert assembly.passed(passed("SLUICE-S")) == []  # read before the packet's first event
    assert assembly.passed(passed("SLUICE-X", BEFORE._replace(source_port=7))) == []
    assembly.add(event(SAMPLE, BEFORE, table=OWN, verdict=-1))
    assert assembly.passed(passed("FORWARD", BEFORE._replace(destination=BACKEND))) == []
    [traced] = assembly.passed(passed("SLUICE-DROP-CLUSTER-IP", BEFORE._replace(destination=BACKEND), end="DROP"))
    assert traced.chains == ("SLUICE-S", "SLUICE-DROP-CLUSTER-IP")
    assert (traced.dropped.legacy, traced.after.destination) == (True, BACKEND)
    assert assembly.rest() == []


def test_a_source_that_another_packet_is_masqueraded_to_is_told_apart():
    assembly = Assembly(OWN)
    masqueraded = AFTER._replace(source=NODE, source_port=40000)
    own = Headers(NODE, 40000, SERVICE, 80, Protocol.TCP)
    assembly.add(event(SAMPLE, BEFORE, table=OWN, verdict=-1, id=1))
    assembly.add(event("raw", masqueraded, table="other", id=1))
    assembly.passed(passed("SLUICE-S", own))
    assembly.add(event(SAMPLE, own, table=OWN, verdict=-1, id=2))
    assert [each.chains for each in assembly.rest()] == [(), ("SLUICE-S",)]


@given(st.lists(st.tuples(st.booleans(), _NAMES, _HEADERS.filter(bool), st.sampled_from(["", "DROP", "REJECT"]))))
def test_whatever_lines_come_no_packet_is_told_twice(steps):
    assembly, told_ = Assembly(OWN), 0
    for is_line, chain, headers, end in steps:
        if is_line:
            told_ += len(assembly.passed(passed(chain, headers, end=end)))
        else:
            told_ += len(assembly.add(event(chain, headers, table=OWN)))
    starts = sum(not is_line and chain == SAMPLE for is_line, chain, _, _ in steps)
    assert told_ + len(assembly.rest()) <= starts


@pytest.mark.parametrize(
    ("steps", "note"),
    [
        ([("sticky-read", "to-slot")], "the client is remembered, and gets the backend that it had (affinity)"),
        (
            [("sticky-read", "to-slot"), ("pick-2", "to-slot")],
            "the client is remembered, and the backend that it had is gone: it gets another (affinity)",
        ),
        ([("pick-2", "to-slot")], None),
    ],
)
def test_affinity_is_told_as_it_was_seen(steps, note):
    _, [traced] = put_together(
        event(SAMPLE, BEFORE, table=OWN, verdict=-1), *(event(chain, target=target) for chain, target in steps)
    )
    assert traced.notes == ((note,) if note else ())


def test_what_others_drop_and_what_is_not_seen_again():
    dropped = told(Traced(before=BEFORE, after=AFTER, dropped=Place(1, "filter", "forward", 0)))
    assert list(lines(dropped))[-2:] == [
        "  The connection is dropped, not by sluice but by the policy of chain forward of table inet filter.",
        "    nft -a list chain inet filter forward",
    ]
    legacy = told(Traced(before=BEFORE, after=AFTER, dropped=Place(10, "filter", "FORWARD", 2, "DROP")))
    assert list(lines(legacy))[-2:] == [
        "  The connection is dropped, not by sluice but by rule 2 of chain FORWARD of legacy table ip6 filter.",
        "    ip6tables-legacy -t filter -nvL FORWARD --line-numbers",
    ]
    unseen = told(Traced(before=BEFORE, after=AFTER))
    assert list(lines(unseen))[-1].startswith("  It was not seen leaving the node")
    assert (dropped.expected, unseen.expected) == (True, True)


def test_a_line_costs_the_same_however_many_packets_are_under_way(monkeypatch):
    compared: list[Passed] = []
    is_of = packets._is_of
    monkeypatch.setattr(packets, "_is_of", lambda *both: compared.append(both[0]) or is_of(*both))
    assembly, clients = Assembly(OWN), [BEFORE._replace(source_port=port) for port in range(1, 501)]
    assert not any(assembly.passed(passed(f"SLUICE-{turn}", each)) for turn in range(10) for each in clients)
    for number, each in enumerate(clients):
        assembly.add(event(SAMPLE, each, table=OWN, verdict=-1, id=number))
        assembly.add(event("services", id=number))
    for each in clients:
        assert assembly.passed(passed("SLUICE-LATE", each)) == []
    assert [len(each.chains) for each in assembly.rest()] == [12] * len(clients)
    assert len(compared) == 11 * len(clients)


def test_lines_of_packets_that_never_come_do_not_pile_up():
    assembly = Assembly(OWN)
    for number in range(MOST_EARLY + 1000):
        assembly.passed(passed("SLUICE-S", BEFORE._replace(source_port=number >> 1)))
    oldest, newest = BEFORE._replace(source_port=0), BEFORE._replace(source_port=MOST_EARLY >> 1)
    for number, each in enumerate((oldest, newest)):
        assembly.add(event(SAMPLE, each, table=OWN, verdict=-1, id=number))
    assert [each.chains for each in assembly.rest()] == [(), ("SLUICE-S",)]
