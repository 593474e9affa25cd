"""What happens between userspace mode and modes of rules: who is told what, and for how long who waits."""

from __future__ import annotations

import pytest

from proxy.userspace import handover
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, Kind, Protocol, Route, parse_address
from tests.fakes.memory_dataplane import FlakyMemory, bad_mood

EMPTY = ForwardingTable(family=Family.IPV4)
SERVING = ForwardingTable(
    family=Family.IPV4,
    routes={
        Frontend(parse_address("10.96.0.1"), Protocol.TCP, 80): Route(
            kind=Kind.CLUSTER_IP, backends=frozenset({Backend(parse_address("10.244.1.1"), 8080)}), label="a/b:c"
        )
    },
)


class OfWorkers(FlakyMemory):
    name = "userspace"


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """For how long somebody would have waited, on a node with workers."""
    waits: list[float] = []
    monkeypatch.setattr(handover, "anything_left", lambda: True)
    monkeypatch.setattr(handover.time, "sleep", waits.append)
    return waits


def test_before_rules_come_an_empty_table_has_the_workers_connections_tracked(waited: list[float]) -> None:
    new = FlakyMemory()
    handover.meet([new])
    assert new.held == EMPTY
    assert waited == [handover.ACQUAINTANCE]


def test_rules_that_are_there_already_stay(waited: list[float]) -> None:
    adopted = FlakyMemory(held=SERVING)
    handover.meet([adopted])
    assert adopted.held == SERVING
    assert not waited


def test_without_workers_nobody_is_met(waited: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "anything_left", lambda: False)
    new = FlakyMemory()
    handover.meet([new])
    assert new.held is None
    assert not waited


def test_workers_that_go_on_meet_nobody(waited: list[float]) -> None:
    new = OfWorkers()
    handover.meet([new])
    assert new.held is None
    assert not waited


def test_old_rules_take_no_new_connection_and_stay_for_the_drain() -> None:
    old = FlakyMemory(held=SERVING)
    assert handover.release(old, 7.0) == 7.0
    assert old.held == EMPTY


def test_where_there_are_no_old_rules_nothing_waits() -> None:
    old = FlakyMemory()
    assert handover.release(old, 7.0) == 0
    assert old.held is None


def test_old_rules_that_cannot_be_emptied_go_at_once() -> None:
    old = FlakyMemory(held=SERVING)
    old.faults["sync"].append(bad_mood)
    assert handover.release(old, 7.0) == 0


def test_backends_have_a_moment_to_answer_through_old_workers() -> None:
    assert handover.release(OfWorkers(held=SERVING), 7.0) == handover.LAST_ANSWERS
