"""A worker without an agent: UDP flows, their backends, their bounds and their ends."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from proxy.userspace.control import WireNode
from rules.forwarding import Family, InputInterface, Kind, Protocol, Refusal, Route, parse_prefix
from tests.netns.userspace.rig import PATIENCE, SILENCE, VIP, VIP6, Start, UdpServer, frontend, route, until

UDP = Protocol.UDP

Serve = Callable[..., UdpServer]


@pytest.fixture
def serve(namespace: None) -> Iterator[Serve]:
    """Starts UDP backends, which end with the test."""
    with contextlib.ExitStack() as stack:

        def begin(address: str) -> UdpServer:
            server = UdpServer(address)
            stack.callback(server.close)
            return server

        yield begin


def client(source: str = "10.96.70.1", to: str = VIP, *, port: int = 80, timeout: float = PATIENCE) -> socket.socket:
    """A connected socket: it takes answers from the frontend's own address only, and hears of refusals."""
    opened = socket.socket(socket.AF_INET6 if ":" in to else socket.AF_INET, socket.SOCK_DGRAM)
    opened.bind((source, 0))
    opened.connect((to, port))
    opened.settimeout(timeout)
    return opened


def ask(sender: socket.socket, word: bytes = b"x") -> str:
    """Who answers a datagram."""
    sender.send(word)
    name, said = sender.recv(65536).split()
    assert said == word
    return name.decode()


def test_a_flow_keeps_its_backend_and_is_answered_from_the_frontend(start: Start, serve: Serve, loop: str) -> None:
    backends = [serve(f"10.96.1.{n}").backend for n in range(1, 5)]
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP, protocol=UDP): route(*backends)})
    seen: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:  # all stay open: a port that is used again would be the flow before
        for _ in range(40):
            one = stack.enter_context(client())
            names = {ask(one, b"%d" % turn) for turn in range(5)}
            assert len(names) == 1
            seen.update(names)
        assert len(seen) == 4
        figures = worker.stats()
    assert figures.udp_flows == figures.frontends[0].open == 40
    assert figures.frontends[0].bytes_in == 200


def test_ipv6_and_large_datagrams(start: Start, serve: Serve) -> None:
    worker = start()
    worker.apply({frontend(VIP6, protocol=UDP): route(serve("fd00:10:96::2").backend)}, family=Family.IPV6)
    with client("fd00:10:96::3", VIP6) as one:
        assert ask(one) == "fd00:10:96::2"
        assert ask(one, bytes(range(97, 120)) * 2000) == "fd00:10:96::2"


def test_a_removed_backend_loses_its_flows_at_once_and_others_keep_theirs(start: Start, serve: Serve) -> None:
    worker = start()
    first, second = serve("10.96.1.1"), serve("10.96.1.2")
    place = frontend(VIP, protocol=UDP)
    worker.apply({place: route(first.backend, second.backend)})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client()) for _ in range(30)]
        before = [ask(each) for each in clients]
        assert set(before) == {"10.96.1.1", "10.96.1.2"}
        worker.apply({place: route(second.backend)})
        assert worker.stats().udp_flows == before.count("10.96.1.2")
        assert {ask(each) for each in clients} == {"10.96.1.2"}
        worker.apply({place: route(first.backend, second.backend)})
        assert {ask(each) for each in clients} == {"10.96.1.2"}
        worker.apply(removed=[place])
        assert worker.stats().udp_flows == 0


@pytest.mark.parametrize("address", [VIP, VIP6])
def test_a_backends_refusal_reaches_the_client(start: Start, serve: Serve, address: str) -> None:
    worker = start()
    is_v6 = ":" in address
    backend = serve("fd00:10:96::2" if is_v6 else "10.96.1.1").backend._replace(port=9)
    family = Family.IPV6 if is_v6 else Family.IPV4
    worker.apply({frontend(address, protocol=UDP): route(backend)}, family=family)
    with client("fd00:10:96::3" if is_v6 else "10.96.70.1", address) as one:
        one.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            one.recv(10)
    figures = worker.carried()
    assert (figures.open, figures.failures) == (0, 1)


def test_without_endpoints_datagrams_are_refused_or_dropped_as_the_route_says(start: Start) -> None:
    worker = start()
    worker.apply(
        {
            frontend(VIP, 80, UDP): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT),
            frontend(VIP, 81, UDP): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.DROP),
        }
    )
    with client() as one, pytest.raises(ConnectionRefusedError):
        ask(one)
    with client(port=81, timeout=SILENCE) as one, pytest.raises(TimeoutError):
        ask(one)
    assert worker.stats().frontends == []


def test_source_ranges_and_interfaces_decide_as_for_tcp(start: Start, serve: Serve) -> None:
    here, there = serve("10.96.1.1").backend, serve("10.96.1.2").backend
    worker = start()
    ranges = (parse_prefix("10.96.20.0/24"),)
    local = Route(kind=Kind.LOAD_BALANCER, backends=frozenset({here, there}), local_backends=frozenset({here}))
    worker.apply(
        {
            frontend(VIP, 80, UDP): route(here, kind=Kind.LOAD_BALANCER, source_ranges=ranges),
            frontend(VIP, 81, UDP): local,
        },
        node=WireNode(detector=InputInterface("lo")),
    )
    with client("10.96.20.1") as one:
        assert ask(one) == "10.96.1.1"
    with client("10.96.21.1", timeout=SILENCE) as one, pytest.raises(TimeoutError):
        ask(one)

    with contextlib.ExitStack() as stack:  # all stay open: a port that is used again would be the flow before

        def answering() -> set[str]:
            return {ask(stack.enter_context(client(port=81))) for _ in range(30)}

        assert answering() == {"10.96.1.1", "10.96.1.2"}
        worker.apply(node=WireNode(detector=InputInterface("eth9")))
        assert answering() == {"10.96.1.1"}


def test_flows_are_bounded_and_the_one_idle_longest_goes(start: Start, serve: Serve) -> None:
    worker = start(0, "--max-udp-flows", "50")
    worker.apply({frontend(VIP, protocol=UDP): route(serve("10.96.1.1").backend)})
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(client()) for _ in range(200)]
        for each in clients:
            assert ask(each) == "10.96.1.1"
        figures = worker.stats()
        assert (figures.udp_flows, figures.evicted) == (50, 150)
        # The first ones are strangers again, and served.
        for each in clients[:10]:
            assert ask(each) == "10.96.1.1"


def test_a_flood_of_clients_starves_neither_control_nor_the_others(start: Start, serve: Serve, loop: str) -> None:
    worker = start(0, "--max-udp-flows", "500", "--loop", loop)
    backend = serve("10.96.1.1").backend
    worker.apply({frontend(VIP, protocol=UDP): route(backend)})
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            with client() as one:
                for _ in range(3):
                    one.send(b"y")

    flooding = [threading.Thread(target=flood) for _ in range(2)]
    for each in flooding:
        each.start()
    try:
        until(lambda: worker.stats().evicted > 2000)
        worker.apply({frontend(VIP, 81, UDP): route(backend)})
        with client(port=81, timeout=1.0) as one:

            def is_answered() -> bool:
                try:
                    return ask(one) == "10.96.1.1"
                except TimeoutError:  # a datagram may be lost in a flood
                    return False

            until(is_answered)
        assert worker.stats().udp_flows <= 500
    finally:
        over.set()
        for each in flooding:
            each.join(PATIENCE)


def test_a_burst_that_comes_while_a_worker_is_busy_waits_for_it(start: Start, serve: Serve, loop: str) -> None:
    worker = start(0, "--loop", loop)
    worker.apply({frontend(VIP, protocol=UDP): route(serve("10.96.1.1").backend)})
    worker.process.send_signal(signal.SIGSTOP)
    try:
        with client() as one:
            for _ in range(3000):
                one.send(bytes(100))
    finally:
        worker.process.send_signal(signal.SIGCONT)
    until(lambda: worker.carried().bytes_in == 300_000)


def test_idle_flows_end_and_streams_may_be_idle_longer(start: Start, serve: Serve) -> None:
    worker = start(0, "--udp-idle", "0.5", "--udp-stream-idle", "60")
    worker.apply({frontend(VIP, protocol=UDP): route(serve("10.96.1.1").backend)})
    with client() as one, client() as other:
        ask(one)
        # Answered for more than two seconds, it is a stream.
        begin = time.monotonic()
        while time.monotonic() < begin + 2.3:
            ask(other)
            threading.Event().wait(0.3)
        until(lambda: worker.stats().udp_flows == 1)
        ask(other)
        assert worker.carried().total == 2


def test_affinity_holds_across_the_frontends_of_a_service_port(start: Start, serve: Serve) -> None:
    backends = [serve(f"10.96.1.{n}").backend for n in range(1, 5)]
    worker = start()
    worker.apply(
        {
            frontend(VIP, 80, UDP): route(*backends, affinity=600),
            frontend("10.96.0.2", 80, UDP): route(*backends, affinity=600, kind=Kind.EXTERNAL_IP),
        }
    )
    for number in range(10):
        names = set()
        for address in (VIP, "10.96.0.2"):
            for _ in range(5):
                with client(f"10.96.80.{number}", address) as one:
                    names.add(ask(one))
        assert len(names) == 1
