"""What has passed each Service, added up from looks and from the ends of flows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.counters import OTHERS, Ledger, Row, Series, ServicePort, Traffic, by_service_port
from rules.forwarding import Backend, Family, Frontend, Kind, Protocol, Route, parse_address
from rules.netlink.attributes import be32, be64, nested, u8
from rules.netlink.conntrack import DESTINATION_NAT, Flow
from rules.netlink.counters import Counts

CLIENT = parse_address("10.1.0.9")
SERVICE = Frontend(parse_address("10.96.0.1"), Protocol.TCP, 80)
NODE_PORT = Frontend(b"", Protocol.TCP, 30080)
PODS = [Backend(parse_address(f"10.244.0.{number}"), 8080) for number in range(1, 4)]
ROUTES = {
    SERVICE: Route(kind=Kind.CLUSTER_IP, backends=frozenset(PODS[:2]), label="default/web:http"),
    NODE_PORT: Route(kind=Kind.NODE_PORT, backends=frozenset(PODS[:2]), label="default/web:http"),
}
CLOSED = 8


def flow(
    identity: int | None,
    counts: Counts | None = None,
    *,
    frontend: Frontend = SERVICE,
    backend: Backend = PODS[0],
    state: int = 3,
    status: int = DESTINATION_NAT,
) -> Flow:
    rest = b"" if identity is None else be32(12, identity)
    if counts is not None:
        rest += nested(9, be64(1, counts[0]), be64(2, counts[1])) + nested(10, be64(1, counts[2]), be64(2, counts[3]))
    rest += nested(4, nested(1, u8(1, state)))
    destination = frontend.address or parse_address("192.0.2.1")
    return Flow(
        CLIENT,
        destination,
        frontend.protocol,
        1019,
        frontend.port,
        *backend[:1],
        CLIENT,
        backend[1],
        1019,
        status,
        rest,
    )


def look(ledger: Ledger, *flows: Flow, ended: tuple[Flow, ...] = ()) -> None:
    ledger.begin()
    ledger.see(flows)
    ledger.end(ended)
    ledger.finish()


def sums(ledger: Ledger) -> dict[tuple[str, str], Traffic]:
    return {(row.frontend, row.backend): row.traffic for row in ledger.rows()}


def ledger(routes: dict[Frontend, Route] | None = None, **limits: int) -> Ledger:
    known = ROUTES if routes is None else routes
    return Ledger(Family.IPV4, lambda: known, **limits)


def test_a_flow_is_counted_once_however_often_it_is_looked_at():
    book = ledger()
    look(book, flow(1, Counts(1, 60, 1, 60)))
    look(book, flow(1, Counts(5, 500, 4, 9000)), flow(1, Counts(5, 500, 4, 9000)))
    place = ("10.96.0.1:80/TCP", "10.244.0.1:8080")
    assert sums(book) == {
        place: Traffic(connections=1, open=1, packets_in=5, bytes_in=500, packets_out=4, bytes_out=9000)
    }
    book.end([flow(1, Counts(6, 560, 5, 9060))])
    assert sums(book)[place] == Traffic(
        connections=1, open=0, packets_in=6, bytes_in=560, packets_out=5, bytes_out=9060
    )


def test_a_flow_that_no_look_saw_is_counted_at_its_end():
    book = ledger()
    book.end([flow(1, Counts(4, 216, 2, 1112)), flow(2, None, backend=PODS[1])])
    found = sums(book)
    assert found["10.96.0.1:80/TCP", "10.244.0.1:8080"].bytes_out == 1112
    assert found["10.96.0.1:80/TCP", "10.244.0.2:8080"] == Traffic(connections=1)


def test_a_flow_whose_end_nobody_told_keeps_what_it_had():
    book = ledger()
    look(book, flow(1, Counts(4, 216, 2, 1112)))
    look(book)
    assert sums(book)["10.96.0.1:80/TCP", "10.244.0.1:8080"].open == 1, "one look may have missed it"
    look(book)
    assert sums(book)["10.96.0.1:80/TCP", "10.244.0.1:8080"] == Traffic(
        connections=1, packets_in=4, bytes_in=216, packets_out=2, bytes_out=1112
    )
    # Another flow gets the same number.
    look(book, flow(1, Counts(1, 60, 0, 0)))
    assert sums(book)["10.96.0.1:80/TCP", "10.244.0.1:8080"].connections == 2


def test_a_number_that_is_used_again_between_two_looks_is_another_connection():
    book = ledger()
    look(book, flow(1, Counts(9, 900, 9, 900)))
    look(book, flow(1, Counts(1, 60, 1, 60)))
    found = sums(book)["10.96.0.1:80/TCP", "10.244.0.1:8080"]
    assert (found.connections, found.bytes_in) == (2, 960)


def test_two_flows_of_one_number_are_two():
    """The kernel's number is a hash of 32 bits."""
    book = ledger()
    same = Counts(1, 60, 1, 60)
    look(book, flow(1, same), flow(1, same)._replace(source_port=2000))
    assert sums(book)["10.96.0.1:80/TCP", "10.244.0.1:8080"].open == 2


def test_a_closed_connection_is_no_longer_open():
    book = ledger()
    look(book, flow(1, Counts(4, 216, 2, 1112)))
    look(book, flow(1, Counts(6, 300, 3, 1200), state=CLOSED))
    found = sums(book)["10.96.0.1:80/TCP", "10.244.0.1:8080"]
    assert (found.open, found.connections, found.bytes_in) == (0, 1, 300)
    book.end([flow(1, Counts(6, 300, 3, 1200), state=CLOSED)])
    assert sums(book)["10.96.0.1:80/TCP", "10.244.0.1:8080"].open == 0


def test_node_ports_answer_at_any_address_and_strangers_are_left_out():
    book = ledger()
    untouched = flow(3, Counts(1, 1, 1, 1), frontend=NODE_PORT, status=0)._replace(
        reply_source=parse_address("192.0.2.1"), reply_source_port=30080
    )
    look(
        book,
        flow(1, Counts(1, 60, 0, 0), frontend=NODE_PORT),
        flow(2, Counts(1, 60, 0, 0), frontend=SERVICE._replace(port=81)),
        untouched,
        flow(None, Counts(1, 1, 1, 1)),
    )
    assert list(sums(book)) == [("*:30080/TCP", "10.244.0.1:8080")]


def test_flows_from_before_the_kernel_counted_are_told():
    book = ledger()
    look(book, flow(1), flow(1), flow(2), flow(3, Counts(1, 60, 0, 0)))
    assert book.uncounted == 2
    assert sum(each.connections for each in sums(book).values()) == 3
    look(book, flow(3, Counts(1, 60, 0, 0)))
    assert book.uncounted == 0


def test_backends_that_are_gone_are_summed_up_and_frontends_that_are_gone_forgotten():
    routes = dict(ROUTES)
    book = ledger(routes)
    look(book, flow(1, Counts(1, 60, 0, 0)), flow(2, Counts(2, 80, 0, 0), backend=PODS[2]))
    assert len(sums(book)) == 2, "its flow is open still"
    look(book, flow(1, Counts(1, 60, 0, 0)), ended=(flow(2, Counts(3, 100, 0, 0), backend=PODS[2]),))
    assert sums(book)["10.96.0.1:80/TCP", ""] == Traffic(connections=1, packets_in=3, bytes_in=100)
    del routes[SERVICE]
    look(book, flow(1, Counts(1, 60, 0, 0)))
    assert [row.service for row in book.rows()] == ["default/web:http"], "its flow is open still"
    look(book, ended=(flow(1, Counts(2, 90, 0, 0)),))
    assert sums(book) == {}
    assert list(book.rows()) == []


def test_memory_is_bounded():
    book = ledger(most_flows=2, most_pairs=1)
    look(book, *(flow(number, Counts(1, 60, 0, 0), backend=PODS[number % 2]) for number in range(5)))
    assert sum(each.connections for each in sums(book).values()) == 2
    assert set(sums(book)) == {("10.96.0.1:80/TCP", "10.244.0.1:8080"), ("10.96.0.1:80/TCP", "")}
    book.end([flow(number, Counts(2, 100, 0, 0), backend=PODS[number % 2]) for number in range(5)])
    total = sum(sums(book).values(), Traffic())
    assert (total.connections, total.open, total.bytes_in) == (5, 0, 500)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 50), st.booleans(), st.booleans()), max_size=40))
def test_sums_never_fall_and_are_exact_as_long_as_all_ends_are_told(steps):
    book = ledger()
    now: dict[int, int] = {}
    counted: dict[int, int] = {}
    expected = connections = 0
    before = Traffic()
    numbers = 0
    for slot, more, ends, looks in steps:
        identity = now.get(slot, 0) and slot + 10 * now[slot]
        if not identity:
            numbers += 1
            now[slot] = numbers
            identity = slot + 10 * numbers
            connections += 1
            counted[identity] = 0
        counted[identity] += more
        expected += more
        if ends:
            book.end([flow(identity, Counts(counted[identity], 0, 0, 0))])
            del now[slot]
        if looks:
            look(book, *(flow(s + 10 * n, Counts(counted[s + 10 * n], 0, 0, 0)) for s, n in now.items()))
        total = sum(sums(book).values(), Traffic())
        assert total.packets_in >= before.packets_in
        assert total.connections >= before.connections
        before = total
    book.end([flow(s + 10 * n, Counts(counted[s + 10 * n], 0, 0, 0)) for s, n in now.items()])
    total = sum(sums(book).values(), Traffic())
    assert (total.packets_in, total.connections, total.open) == (expected, connections, 0)


def row(service: str, count: int, frontend: str = "x") -> Row:
    return Row(family="IPv4", service=service, protocol="TCP", frontend=frontend, traffic=Traffic(connections=count))


def test_frontends_of_a_service_port_are_one():
    found = by_service_port([row("a/b:c", 1), row("a/b:c", 2, "y"), row("a/b:d", 4)])
    assert {port.service: traffic.connections for port, traffic in found.items()} == {"a/b:c": 3, "a/b:d": 4}


def named(found: dict[ServicePort, Traffic]) -> dict[str, int]:
    return {port.service: traffic.connections for port, traffic in found.items()}


def test_service_ports_beyond_the_limit_are_one_series():
    series = Series(2)
    assert named(series.take(by_service_port([row("a", 1), row("b", 2)]))) == {"a": 1, "b": 2}
    both = [row("a", 1), row("b", 2)]
    assert named(series.take(by_service_port([*both, row("c", 5), row("d", 7)]))) == {"a": 1, "b": 2, OTHERS: 12}
    # One of the others goes: what it had stays in the sum.
    assert named(series.take(by_service_port([*both, row("d", 8)]))) == {"a": 1, "b": 2, OTHERS: 13}
    # One that is named goes, and another takes its place.
    assert named(series.take(by_service_port([row("b", 2), row("d", 9)]))) == {"b": 2, "d": 9, OTHERS: 13}


@given(
    st.integers(1, 3),
    st.lists(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=6), max_size=12),
)
def test_any_series_never_falls_while_it_is_there(most, scrapes):
    series = Series(most)
    totals: dict[str, int] = {}
    before: dict[str, int] = {}
    for scrape in scrapes:
        present = {}
        for name, more in scrape:
            totals[name] = totals.get(name, 0) + more
            present[name] = totals[name]
        totals = present  # whoever is not there has begun anew when it is again
        found = named(series.take(by_service_port([row(name, count) for name, count in present.items()])))
        assert len(found) <= most + 1
        for name, count in found.items():
            assert name == OTHERS or count == present[name]
            assert name not in before or count >= before[name]
        before = found
