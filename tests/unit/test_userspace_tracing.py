"""What workers tell of new connections: to whom, how many, and until when."""

from __future__ import annotations

import random

from proxy.trace.by_workers import traced_of
from proxy.userspace.admission import Sources
from proxy.userspace.choose import Memory
from proxy.userspace.control import (
    Done,
    Relayed,
    Trace,
    Traces,
    TracesAnswer,
    WireNode,
    decode_answer,
    decode_request,
    frame,
)
from proxy.userspace.stats import Counters
from proxy.userspace.table import Bind, Served
from proxy.userspace.tracing import Watcher, Watchers
from rules.forwarding import Backend, Family, Frontend, Kind, Protocol, Route, parse_address

SERVICE, CLIENT, NODE, FIRST, SECOND = map(
    parse_address, ("10.96.0.1", "10.244.1.13", "192.168.50.11", "10.244.1.11", "10.244.2.11")
)
FRONTEND = Frontend(SERVICE, Protocol.TCP, 80)
BIND = Bind(SERVICE, Protocol.TCP, 80)


def served(frontend: Frontend = FRONTEND) -> Served:
    return Served(
        Family.IPV4,
        frontend,
        Route(kind=Kind.CLUSTER_IP, backends=frozenset({Backend(FIRST, 80)}), label="default/web:http"),
        counters=Counters(),
        memory=Memory(),
        sources=Sources(WireNode(), {}),
        chance=random.Random(1),
    )


def saw(watchers: Watchers, *, client: bytes = CLIENT, bind: Bind = BIND, frontend: Frontend = FRONTEND) -> None:
    watchers.saw(
        served(frontend),
        bind,
        (client, 40000),
        backend=Backend(SECOND, 80),
        own=(NODE, 50000),
        tried=(Backend(FIRST, 80),),
        seconds=0.0012,
    )


def told(watcher: Watcher) -> list[Relayed]:
    answer = watcher.answer(Traces())
    assert isinstance(answer, TracesAnswer)
    return answer.connections


def test_a_watcher_gets_what_it_asks_for_once_and_no_more_than_it_asks_for():
    watchers = Watchers()
    watcher = Watcher(watchers)
    assert watcher.answer(Trace(family=Family.IPV4, most=2, frontends=frozenset({FRONTEND}))) == Done()
    saw(watchers, frontend=Frontend(SERVICE, Protocol.TCP, 81))
    for _ in range(5):
        saw(watchers)
    [first, second] = told(watcher)
    assert first == second
    assert (first.client, first.backend, first.own) == ((CLIENT, 40000), Backend(SECOND, 80), (NODE, 50000))
    assert told(watcher) == []


def test_addresses_ports_and_sources_choose_without_frontends():
    watchers = Watchers()
    by_port, by_source, of_another_family = (Watcher(watchers) for _ in range(3))
    by_port.answer(Trace(family=Family.IPV4, most=9, port=81))
    by_source.answer(Trace(family=Family.IPV4, most=9, address=SERVICE, source=CLIENT))
    of_another_family.answer(Trace(family=Family.IPV6, most=9))
    saw(watchers)
    saw(watchers, client=NODE)
    saw(watchers, bind=BIND._replace(port=81))
    assert [len(told(each)) for each in (by_port, by_source, of_another_family)] == [1, 2, 0]


def test_nobody_is_told_after_its_conversation():
    watchers = Watchers()
    watcher = Watcher(watchers)
    watcher.answer(Trace(family=Family.IPV4, most=9))
    watcher.answer(Trace(family=Family.IPV4, most=9))
    assert watchers.active == [watcher]
    watcher.end()
    watcher.end()
    assert watchers.active == []


def test_what_is_told_crosses_as_it_is():
    watchers = Watchers()
    watcher = Watcher(watchers)
    request = Trace(family=Family.IPV4, most=9, frontends=frozenset({FRONTEND}), source=CLIENT)
    assert decode_request(frame(request)[4:]) == request
    watcher.answer(request)
    saw(watchers)
    answer = watcher.answer(Traces())
    assert decode_answer(frame(answer)[4:]) == answer


def test_a_relayed_connection_as_a_packet():
    watchers = Watchers()
    watcher = Watcher(watchers)
    watcher.answer(Trace(family=Family.IPV4, most=9))
    saw(watchers)
    watchers.saw(served(), BIND, (CLIENT, 40001), tried=(Backend(FIRST, 80),), why="no backend could be reached")
    joined, failed = (traced_of(each, 1) for each in told(watcher))
    assert (joined.translated, joined.masqueraded, joined.arrived) == (True, True, True)
    assert joined.notes == (
        "10.244.1.11:80 could not be reached",
        "worker 1 connected to 10.244.2.11:80, which accepted after 1.2 ms",
    )
    assert (failed.arrived, failed.failed) == (False, "no backend could be reached")
    assert failed.notes == ("10.244.1.11:80 could not be reached",)
