"""Who gets which backend of a worker, and who gets none."""

from __future__ import annotations

import contextlib
import socket
from collections import Counter

import pytest

from proxy.userspace.control import WireNode
from rules.forwarding import (
    Backend,
    Family,
    InputInterface,
    Kind,
    Prefix,
    Refusal,
    Route,
    SourcePrefix,
    parse_address,
    parse_prefix,
)
from tests.netns.userspace.rig import (
    VIP,
    VIP6,
    Held,
    Serve,
    Start,
    ask,
    connect,
    frontend,
    is_silent,
    read_all,
    route,
    until,
)


def test_source_ranges_keep_others_out_before_the_handshake(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    ranges = (parse_prefix("10.96.20.0/24"), parse_prefix("10.96.30.7/32"))
    worker.apply({frontend(VIP): route(backend, kind=Kind.LOAD_BALANCER, source_ranges=ranges)})
    assert ask(VIP, source="10.96.20.9") == ask(VIP, source="10.96.30.7") == "10.96.1.1"
    assert is_silent(VIP, source="10.96.30.8")
    worker.apply({frontend(VIP): route(backend, kind=Kind.LOAD_BALANCER)})
    assert ask(VIP, source="10.96.30.8") == "10.96.1.1"
    assert worker.carried().total == 3


def test_source_ranges_of_ipv6(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("fd00:10:96::2").backend
    ranges = (parse_prefix("fd00:10:96::20:0/112"),)
    worker.apply({frontend(VIP6): route(backend, kind=Kind.LOAD_BALANCER, source_ranges=ranges)}, family=Family.IPV6)
    assert ask(VIP6, source="fd00:10:96::20:1") == "fd00:10:96::2"
    assert is_silent(VIP6, source="fd00:10:96::21:1")


def test_ranges_too_many_for_a_filter_are_looked_at_after_the_handshake(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    ranges = (
        parse_prefix("10.96.20.0/24"),
        *(Prefix(bytes([172, 16 + n // 256, n % 256, 0]), 25) for n in range(1500)),
    )
    worker.apply({frontend(VIP): route(backend, kind=Kind.LOAD_BALANCER, source_ranges=ranges)})
    assert ask(VIP, source="10.96.20.9") == "10.96.1.1"
    with pytest.raises(ConnectionResetError):
        ask(VIP, source="10.96.30.8")


def _local(*local: Backend, everywhere: Backend) -> Route:
    return Route(
        kind=Kind.LOAD_BALANCER,
        backends=frozenset({everywhere, *local}),
        local_backends=frozenset(local),
        refusal=None if local else Refusal.DROP,
        label="default/local:port",
    )


NODE = WireNode(
    local_addresses=frozenset({parse_address("10.96.50.1")}), detector=SourcePrefix(parse_prefix("10.96.60.0/24"))
)


def test_policy_local_gives_outsiders_local_backends_and_pods_and_the_node_all(start: Start, serve: Serve) -> None:
    here, there = serve("10.96.1.1"), serve("10.96.1.2")
    start().apply({frontend(VIP): _local(here.backend, everywhere=there.backend)}, node=NODE)
    assert {ask(VIP, source="10.96.70.1") for _ in range(20)} == {"10.96.1.1"}
    for inside in ("10.96.60.1", "10.96.50.1", "127.0.0.1", VIP):
        assert len({ask(VIP, source=inside) for _ in range(40)}) == 2


def test_policy_local_without_local_endpoints_drops_outsiders_only(start: Start, serve: Serve) -> None:
    there = serve("10.96.1.2")
    worker = start()
    worker.apply({frontend(VIP): _local(everywhere=there.backend)}, node=NODE)
    assert is_silent(VIP, source="10.96.70.1")
    for inside in ("10.96.60.1", "10.96.50.1", "127.0.0.1", VIP):
        assert ask(VIP, source=inside) == "10.96.1.2"
    worker.apply(node=WireNode(local_addresses=frozenset({parse_address("10.96.70.1")})))
    assert ask(VIP, source="10.96.70.1") == "10.96.1.2"
    assert is_silent(VIP, source="10.96.60.1")


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("has_local", [False, True])
def test_local_pods_are_told_by_their_interface_too(
    start: Start, serve: Serve, has_local: bool, family: Family
) -> None:
    is_v4 = family is Family.IPV4
    vip, source, near, far = (
        (VIP, "10.96.70.1", "10.96.1.1", "10.96.1.2")
        if is_v4
        else (VIP6, "fd00:10:96::70:1", "fd00:10:96::1:1", "fd00:10:96::1:2")
    )
    here, there = serve(near), serve(far)
    worker = start()
    local = [here.backend] if has_local else []
    table = {frontend(vip): _local(*local, everywhere=there.backend)}
    worker.apply(table, family=family, node=WireNode(detector=InputInterface("lo")))
    assert far in {ask(vip, source=source) for _ in range(40)}
    worker.apply(family=family, node=WireNode(detector=InputInterface("eth9")))
    if has_local:
        assert {ask(vip, source=source) for _ in range(20)} == {near}
    else:
        assert is_silent(vip, source=source)


def test_without_endpoints_a_connection_is_refused_or_dropped_as_the_route_says(start: Start) -> None:
    start().apply(
        {
            frontend(VIP): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT),
            frontend(VIP, 81): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.DROP),
        }
    )
    with pytest.raises(ConnectionRefusedError):
        connect(VIP)
    assert is_silent(VIP, 81, source="10.96.70.1")


def test_node_ports_follow_the_nodes_addresses(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    nodes = [parse_address("10.96.50.1"), parse_address("10.96.50.2")]
    port = frontend("", 30080)
    worker.apply({port: route(backend, kind=Kind.NODE_PORT)}, node=WireNode(node_port_addresses=frozenset(nodes)))
    assert ask("10.96.50.1", 30080) == ask("10.96.50.2", 30080) == "10.96.1.1"
    with connect("10.96.50.2", 30080) as client:
        client.recv(100)
        worker.apply(node=WireNode(node_port_addresses=frozenset(nodes[:1])))
        with pytest.raises(ConnectionRefusedError):
            connect("10.96.50.2", 30080)
        assert ask("10.96.50.1", 30080) == "10.96.1.1"
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    worker.apply(removed=[port])
    with pytest.raises(ConnectionRefusedError):
        connect("10.96.50.1", 30080)


def test_a_port_that_somebody_has_is_told_and_taken_when_it_is_free(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    with socket.create_server((VIP, 80), backlog=1):
        trouble = worker.apply({frontend(VIP): route(backend), frontend(VIP, 81): route(backend)})
        assert list(trouble) == [frontend(VIP)]
        assert "10.96.0.1:80/TCP: Address already in use" in trouble[frontend(VIP)]
        assert ask(VIP, 81) == "10.96.1.1"

    def is_served() -> bool:
        try:
            return ask(VIP) == "10.96.1.1"
        except ConnectionRefusedError:
            return False

    until(is_served)
    assert worker.apply({}) == {}


def test_backends_are_told_their_client_by_the_proxy_protocol(start: Start, held: tuple[Held, Backend]) -> None:
    holder, backend = held
    start().apply({frontend(VIP): route(backend, proxy_protocol=True)})
    with connect(VIP, source="10.96.70.1") as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        got = read_all(holder.newest())
        port = client.getsockname()[1]
    addresses = bytes([10, 96, 70, 1, 10, 96, 0, 1])
    expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + addresses + port.to_bytes(2) + (80).to_bytes(2)
    assert got == expected + b"hello"


def test_round_robin_takes_turns_and_least_connections_the_idlest(start: Start, serve: Serve) -> None:
    backends = [serve(f"10.96.1.{n}").backend for n in range(1, 4)]
    start().apply(
        {
            frontend(VIP): route(*backends, scheduler="round-robin"),
            frontend(VIP, 81): route(*backends, scheduler="least-connections"),
        }
    )
    names = [ask(VIP) for _ in range(9)]
    assert names == names[:3] * 3
    assert len(set(names)) == 3
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(connect(VIP, 81)) for _ in range(6)]
        held_by = [client.recv(100).decode() for client in clients]
        assert set(Counter(held_by).values()) == {2}
        clients[2].close()
        until(lambda: ask(VIP, 81) == held_by[2])
