"""The agent in userspace mode and its workers, which outlive it, die, grow old and are replaced."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from proxy.demo.world import World
from proxy.userspace import supervisor
from proxy.userspace.control import Apply, Connection, Drain, Stop, Table, TableAnswer, control_name
from rules.forwarding import Family
from tests.netns.agent import DEADLINE, Agent
from tests.netns.asking import answering, eventually, get
from tests.netns.descriptors import targets
from tests.netns.streams import objects, streaming
from tests.netns.test_agent_lifecycle import synced_since
from tests.netns.userspace.agent_rig import (
    alive,
    echo_objects,
    echoing,
    flows_to,
    inside,
    sound,
    workers,
    workers_answering,
)

# One world for all of them.
pytestmark = pytest.mark.xdist_group("agent-userspace")

OLD_WORKER = """
import sys
from proxy.userspace import control, worker
control.VERSION = 0
raise SystemExit(worker.main(["--index", sys.argv[1], "--workers", "1"]))
"""
"""A worker of a release whose protocol is another one."""


RUSH = """
import socket, sys, threading
def rush():
    with socket.create_connection((sys.argv[1], 80)) as connection:
        block = b"x" * 65535 + b"\\n"
        def read():
            while connection.recv(1 << 20):
                pass
        threading.Thread(target=read, daemon=True).start()
        while True:
            connection.sendall(block)
for _ in range(4):
    threading.Thread(target=rush).start()
"""


def test_no_connection_is_lost_while_the_agent_restarts_and_nothing_is_written(
    serving: Agent, own_world: World
) -> None:
    serving.apply([*objects(), *echo_objects()])
    before = workers(own_world)
    assert before
    with echoing(own_world) as echoes, streaming(own_world) as streams:
        for _ in range(2):
            serving.stop()
            assert workers(own_world) == before
            position = len(serving.log.read_text())
            serving.start()
            eventually(lambda at=position: len(synced_since(serving, at)) == len(serving.families), "the first syncs")
            assert all(operations == [0] for operations in synced_since(serving, position).values())
        assert echoes.alive() == 8
    assert not streams.wrong(), f"of {streams.made} connections"
    assert workers(own_world) == before


def test_no_connection_is_lost_when_the_agent_is_killed_and_the_next_one_goes_on(
    serving: Agent, own_world: World
) -> None:
    serving.apply([*objects(), *echo_objects()])
    before = workers(own_world)
    with echoing(own_world) as echoes, streaming(own_world) as streams:
        serving.kill()
        assert answering(own_world, "c", "203.0.113.31", 80) == {"p1", "q1"}
        assert echoes.alive() == 8
        serving.publish(objects())  # without the echo: who is connected stays so
        serving.start()
        serving.wait()
        assert echoes.alive() == 8
    assert not streams.wrong(), f"of {streams.made} connections"
    assert workers(own_world) == before
    eventually(lambda: sound(serving), "the end of what lingers")


def test_workers_belong_to_nobody(serving: Agent, own_world: World) -> None:
    for pid in workers(own_world).values():
        assert os.getsid(pid) == pid
        opened = targets(pid)
        assert opened[0] == "/dev/null"
        assert not [target for target in opened.values() if "manifests" in target]


def test_workers_of_another_version_are_replaced_without_a_gap_and_end_with_their_flows(
    serving: Agent, own_world: World, tmp_path
) -> None:
    serving.apply([*objects(), *echo_objects()])
    serving.stop()
    old = {index: _start_old_worker(own_world, index, tmp_path) for index in (10, 11)}
    for index in old:
        inside(own_world, lambda index=index: _copy_table(index))
    inside(own_world, lambda: [_end(index) for index in supervisor.running() if index < 10])
    eventually(lambda: inside(own_world, supervisor.running) == [10, 11], "the old workers alone")
    with echoing(own_world) as echoes, streaming(own_world) as streams:
        serving.start()
        eventually(lambda: inside(own_world, supervisor.running) == [0, 1], "the new workers alone")
        serving.wait()
        eventually(lambda: sound(serving), "the table in the new workers")
        assert echoes.alive() == 8
        assert all(process.poll() is None for process in old.values())
    # A datagram that an old worker has just passed on is answered to nobody: UDP flows end with the listener.
    assert not [each for each in streams.wrong() if "UDP" not in each], f"of {streams.made} connections"
    assert len(streams.wrong()) < 5
    for process in old.values():
        assert process.wait(timeout=DEADLINE) == 0


def _start_old_worker(world: World, index: int, directory: Any) -> subprocess.Popen[bytes]:
    with (directory / f"old-{index}.log").open("wb") as log:
        process = world.start("node1", [sys.executable, "-c", OLD_WORKER, str(index)], stdout=log, stderr=log)

    def answers() -> bool:
        with contextlib.suppress(OSError), contextlib.closing(Connection(index, greet=False)):
            return True
        return False

    eventually(lambda: inside(world, answers), f"the old worker {index}: {control_name(index)!r}")
    return process


def _copy_table(index: int) -> None:
    """Give a worker what worker 0 has."""
    with contextlib.closing(Connection(0)) as one, contextlib.closing(Connection(index, greet=False)) as other:
        for family in Family:
            held = one.ask(Table(family))
            assert isinstance(held, TableAnswer)
            other.ask(Apply(family=family, serial="old", node=held.node, put=held.routes, hairpins_added=held.hairpins))


def _end(index: int) -> None:
    with contextlib.closing(Connection(index)) as connection:
        connection.ask(Drain(5.0))


def test_a_worker_that_dies_is_replaced_and_takes_only_its_own_flows_with_it(serving: Agent, own_world: World) -> None:
    serving.apply([*objects(), *echo_objects()])
    before = workers(own_world)
    assert len(before) == supervisor.default_count()
    victim = min(before)
    with echoing(own_world) as echoes:
        flows = flows_to(own_world, echoes.address)
        assert sum(flows.values()) == 8
        os.kill(before[victim], signal.SIGKILL)
        assert echoes.alive() == 8 - flows[victim]
        eventually(lambda: workers(own_world).get(victim, before[victim]) != before[victim], "the new worker")
        eventually(lambda: sound(serving), "its table")
        assert echoes.alive() == 8 - flows[victim]
    after = workers(own_world)
    assert {index: pid for index, pid in after.items() if index != victim} == {
        index: pid for index, pid in before.items() if index != victim
    }
    assert not alive(before[victim]), "a zombie is left"
    with streaming(own_world) as streams:
        time.sleep(0.2)
    assert not streams.wrong()


def test_all_workers_die_and_come_back(serving: Agent, own_world: World) -> None:
    before = workers(own_world)
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: len(workers(own_world)) == len(before) and sound(serving), "new workers")
    assert answering(own_world, "c", "203.0.113.31", 80) == {"p1", "q1"}


def test_dead_workers_are_drift_that_the_next_agent_repairs(serving: Agent, own_world: World) -> None:
    serving.stop()
    for pid in workers(own_world).values():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not inside(own_world, supervisor.running), "the end of the workers")
    table = serving.read(Family.IPV4)
    assert table is not None
    assert "no worker runs" in table.damage
    assert not table.routes
    serving.start()
    serving.wait()
    assert sound(serving)


def test_while_bytes_rush_through_changes_are_applied_health_is_answered_and_figures_told(
    serving: Agent, own_world: World
) -> None:
    serving.apply([*objects(), *echo_objects()])
    with echoing(own_world) as echoes:
        rushing = own_world.start("p3", [sys.executable, "-c", RUSH, echoes.address])
        try:

            def carried() -> float:
                """Bytes to the echo's backend, as the agent tells them."""
                reply = get(own_world, "node1", "127.0.0.1", 10249, "/metrics")
                lines = reply.body.splitlines() if reply is not None else []
                ours = [
                    line for line in lines if re.match(r"sluice_userspace_bytes_total.*to_backend.*default/echo", line)
                ]
                return sum(float(line.rpartition(" ")[2]) for line in ours)

            eventually(lambda: carried() > 1 << 26, "the rush")
            for _ in range(5):
                serving.apply(objects()[:-1] + echo_objects())
                serving.apply([*objects(), *echo_objects()])
                reply = get(own_world, "node1", "127.0.0.1", 10256, "/healthz")
                assert reply is not None
                assert reply.status == 200
            before = carried()
            eventually(lambda: carried() > before, "more of it")
            assert rushing.poll() is None
        finally:
            rushing.kill()
            rushing.wait()


def test_a_worker_that_is_stuck_is_replaced(serving: Agent, own_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    # An agent would wait for ten seconds.
    monkeypatch.setattr(supervisor, "GREETING", 0.5)
    serving.stop()
    before = workers(own_world)
    victim = max(before)
    os.kill(before[victim], signal.SIGSTOP)
    found = supervisor.Workers(len(before))
    try:
        changed = inside(own_world, found.ensure)
        assert [each.index for each in changed.outdated] == [victim]
        assert len(changed.started) == 1
        assert not alive(before[victim])
    finally:
        found.close()
    serving.start()
    serving.apply(objects())
    assert sound(serving)
    assert workers_answering(own_world) == len(before)


def test_stop_ends_a_worker_at_once(serving: Agent, own_world: World) -> None:
    serving.stop()
    before = workers(own_world)

    def stop() -> None:
        for index in supervisor.running():
            with contextlib.closing(Connection(index)) as connection:
                connection.ask(Stop())

    inside(own_world, stop)
    eventually(lambda: not any(alive(pid) for pid in before.values()), "the end of the workers")
