"""Workers among themselves, with their successors, and with those who tell them what to serve."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from proxy.userspace.control import (
    Apply,
    Connection,
    ControlError,
    Done,
    Drain,
    Failed,
    Hello,
    Stop,
    TableAnswer,
    WireNode,
    control_name,
    frame,
)
from proxy.userspace.control import Table as AskTable
from proxy.userspace.supervisor import Workers, anything_left, running
from rules.forwarding import Backend, Endpoint, Family, Frontend, Kind, Protocol, parse_address
from tests.netns.userspace.rig import PATIENCE, VIP, Held, Serve, Start, ask, connect, frontend, read_all, route, until


def test_workers_share_the_connections_and_a_dead_one_is_not_missed(start: Start, serve: Serve) -> None:
    backend = serve("10.96.1.1").backend
    one, two = (start(n, "--workers", "2") for n in range(2))
    for worker in (one, two):
        worker.apply({frontend(VIP): route(backend)})
    for _ in range(60):
        assert ask(VIP) == "10.96.1.1"
    totals = [worker.carried().total for worker in (one, two)]
    assert sum(totals) == 60
    assert min(totals) > 5
    one.process.kill()
    one.process.wait(PATIENCE)
    for _ in range(20):
        assert ask(VIP) == "10.96.1.1"


def test_a_client_with_affinity_keeps_its_backend_whichever_worker_it_meets(start: Start, serve: Serve) -> None:
    backends = [serve(f"10.96.1.{n}").backend for n in range(1, 6)]
    workers = [start(n, "--workers", "2") for n in range(2)]
    clients = [f"10.96.80.{n}" for n in range(1, 20)]
    for worker in workers:
        worker.apply({frontend(VIP): route(*backends[:4], affinity=600)})
    first = {client: ask(VIP, source=client) for client in clients}
    assert len(set(first.values())) > 1
    for worker in workers:
        worker.apply({frontend(VIP): route(*backends, affinity=600)})
    assert {client: ask(VIP, source=client) for client in clients} == first
    # The kernel gave each client to one worker.
    per_worker = [worker.carried().total for worker in workers]
    assert sum(per_worker) == 2 * len(clients)
    assert all(count and count % 2 == 0 for count in per_worker)
    # One worker is as good as the other for a client that comes anew.
    workers[0].process.kill()
    workers[0].process.wait(PATIENCE)
    for worker in workers[1:]:
        worker.apply({frontend(VIP): route(*backends[:4], affinity=600)})
    kept = {client: ask(VIP, source=client) for client in clients}
    assert kept == first


def test_a_worker_that_drains_keeps_its_flows_and_loses_no_client(start: Start, serve: Serve) -> None:
    backend = serve("10.96.1.1").backend
    old = start(0)
    old.apply({frontend(VIP): route(backend)})
    refused: list[OSError] = []
    over = threading.Event()

    def keep_asking() -> None:
        while not over.is_set():
            try:
                assert ask(VIP) == "10.96.1.1"
            except OSError as error:
                refused.append(error)

    with connect(VIP) as client:
        assert client.recv(100) == b"10.96.1.1"
        clients = [threading.Thread(target=keep_asking) for _ in range(4)]
        for each in clients:
            each.start()
        new = start(1)
        new.apply({frontend(VIP): route(backend)})
        until(lambda: new.carried().total > 10)
        assert old.connection.ask(Drain(10 * PATIENCE)) == Done()
        with pytest.raises(ControlError):
            Connection(0)
        assert old.stats().draining
        before = new.carried().total
        until(lambda: new.carried().total > before + 20)
        over.set()
        for each in clients:
            each.join(PATIENCE)
        assert not refused
        assert old.process.poll() is None
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
    assert old.wait() == 0


def test_a_worker_that_drains_serves_all_who_wait_to_be_accepted(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    worker.apply({frontend(VIP): route(backend)})
    with socket.socket(socket.AF_UNIX) as agent, contextlib.ExitStack() as stack:
        agent.connect(control_name(0))
        worker.process.send_signal(signal.SIGSTOP)
        clients = [stack.enter_context(connect(VIP)) for _ in range(300)]
        agent.sendall(frame(Drain(10 * PATIENCE)))
        worker.process.send_signal(signal.SIGCONT)
        for client in clients:
            client.shutdown(socket.SHUT_WR)
            assert read_all(client) == b"10.96.1.1"
    assert worker.wait() == 0


def test_a_worker_that_drains_ends_at_its_deadline(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    worker.apply({frontend(VIP): route(backend)})
    with connect(VIP) as client:
        client.recv(100)
        worker.connection.ask(Drain(0.5))
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert worker.wait() == 0


# --- control ---------------------------------------------------------------------------------------------------------


def test_a_worker_tells_what_it_was_told_and_outlives_the_teller(start: Start, serve: Serve) -> None:
    worker, backend = start(), serve("10.96.1.1").backend
    node = WireNode(local_addresses=frozenset({parse_address("10.96.50.1")}))
    routes = {frontend(VIP): route(backend), frontend("", 30080): route(backend, kind=Kind.NODE_PORT)}
    worker.apply(routes, node=node)
    worker.connection.close()
    assert ask(VIP) == "10.96.1.1"
    worker.connection = Connection(0)
    assert worker.connection.welcome.serials == {Family.IPV4: ""}
    assert worker.connection.welcome.pid == worker.process.pid
    answer = worker.connection.ask(AskTable(Family.IPV4))
    assert isinstance(answer, TableAnswer)
    assert dict(answer.routes) == routes
    assert answer.node == node
    worker.apply({frontend(VIP, 81): route(backend)}, reset=True)
    with pytest.raises(ConnectionRefusedError):
        connect(VIP)
    assert ask(VIP, 81) == "10.96.1.1"


def test_a_worker_has_its_own_session_and_lets_no_second_one_have_its_name(start: Start) -> None:
    worker = start()
    assert os.getsid(worker.process.pid) == worker.process.pid
    command = [sys.executable, "-m", "proxy.userspace.worker", "--index", "0"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert second.returncode == 1
    assert "there is one already" in second.stderr


def test_nonsense_is_answered_and_harms_nobody(start: Start) -> None:
    worker = start()
    assert isinstance(worker.connection.ask(Hello(version=99)), Failed)
    absurd = Apply(family=Family.IPV4, removed=[Frontend(b"abc", Protocol.TCP, 80)])
    assert worker.connection.ask(absurd) == Failed("not understood: a frontend is no IPv4 address and a port")
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(PATIENCE)
        stranger.connect("\0sluice-worker/0")
        stranger.sendall(b"\0\0\0\3abc")
        assert b"not understood" in stranger.recv(1000)
        stranger.sendall(b"\xff\xff\xff\xff")
        assert stranger.recv(1) == b""
    assert worker.stats().tcp_connections == 0


def test_a_worker_stops_when_told(start: Start, held: tuple[Held, Backend]) -> None:
    _, backend = held
    worker = start()
    worker.apply({frontend(VIP): route(backend)})
    with connect(VIP) as client:
        until(lambda: worker.stats().tcp_connections == 1)
        assert worker.connection.ask(Stop()) == Done()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    assert worker.wait() == 0


def test_control_has_its_turn_while_bytes_rush_through(start: Start, serve: Serve, loop: str) -> None:
    worker, backend = start(0, "--loop", loop), serve("10.96.1.1", read_all).backend
    worker.apply({frontend(VIP): route(backend)})
    over = threading.Event()

    def rush() -> None:
        with connect(VIP) as client:
            while not over.is_set():
                client.sendall(bytes(1 << 18))

    rushing = [threading.Thread(target=rush) for _ in range(4)]
    for each in rushing:
        each.start()
    try:
        until(lambda: worker.carried().bytes_in > 1 << 24)
        for number in range(20):
            worker.apply({frontend(VIP, 1000 + number): route(backend)})
    finally:
        over.set()
        for each in rushing:
            each.join(PATIENCE)


def test_hairpins_and_serial_are_kept(start: Start) -> None:
    worker = start()
    endpoints = [Endpoint(parse_address(f"10.96.1.{n}"), frontend(VIP).protocol, 80) for n in (1, 2)]
    worker.connection.ask(Apply(family=Family.IPV4, serial="s1", hairpins_added=endpoints))
    worker.connection.ask(Apply(family=Family.IPV4, serial="s2", hairpins_removed=endpoints[:1]))
    answer = worker.connection.ask(AskTable(Family.IPV4))
    assert isinstance(answer, TableAnswer)
    assert (answer.serial, answer.hairpins) == ("s2", endpoints[1:])


def test_other_programs_sockets_may_have_any_name(start: Start) -> None:
    # What listens under an abstract name needs no right to, and is seen by all who are in the network namespace.
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.bind(b"\0\xff\xfe\n ")
        assert running() == []
        assert not anything_left()
        start(3)
        assert running() == [3]


SQUAT = """
import os, socket, sys
os.setuid(65534)
squatter = socket.socket(socket.AF_UNIX)
squatter.bind(chr(0) + sys.argv[1])
squatter.listen()
print("there", flush=True)
sys.stdin.read()
"""


def test_another_users_process_under_a_workers_name_is_left_alone(start: Start) -> None:
    command = [sys.executable, "-c", SQUAT, control_name(0)[1:]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as squatter:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == b"there\n"
        worker = start(1)
        workers = Workers(1)
        try:
            assert workers.ensure().adopted == (1,)
            workers.stop()
        finally:
            workers.close()
        assert worker.wait() == 0
        assert squatter.poll() is None
        squatter.communicate()
