"""Rounds of deleting stale flows: when, with what, and what becomes of failures (CT-1, CT-6, CT-7)."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable

import pytest

from proxy.conntrack import MOST_MATCHES, Change, Serving, change
from proxy.reconciler import Reconciler
from rules.dataplane import Applied
from rules.forwarding import Family, ForwardingTable, Frontend, Kind, Protocol, Route
from rules.netlink.conntrack import DESTINATION_NAT, Flow, Match
from tests.builders import at, backends
from tests.fakes.polling import eventually as until

UDP = Protocol.UDP
DNS = at("10.96.0.10:53", UDP)
A, B = backends("10.0.0.1 53"), backends("10.0.0.2 53")
OTHER = at("10.96.0.11:53", UDP)


def dnat(address: str) -> Flow:
    """A flow to the frontend of these tests that was given to an endpoint."""
    chosen = at(f"{address}:53").address
    return Flow(b"\1\2\3\4", DNS.address, 17, 4000, 53, chosen, b"\1\2\3\4", 53, 4000, DESTINATION_NAT, b"")


class Memory:
    """A table of flows; `hold` keeps the worker's thread waiting, `fails` has calls fail."""

    def __init__(self) -> None:
        self.flows: list[Flow] = []
        self.calls: list[str] = []
        self.hold = threading.Event()
        self.hold.set()
        self.fails: list[Exception] = []
        self.threads: set[int] = set()

    def _delete(self, call: str, stale: Callable[[Flow], bool]) -> int:
        self.calls.append(call)
        self.threads.add(threading.get_ident())
        assert self.hold.wait(10)
        if self.fails:
            raise self.fails.pop()
        before = len(self.flows)
        self.flows = [flow for flow in self.flows if not stale(flow)]
        return before - len(self.flows)

    def delete_matching(self, match: Match) -> int:
        return self._delete("match", match.admits)

    def sweep(self, match: Match, stale: Callable[[Flow], bool]) -> int:
        return self._delete(f"sweep {match.protocol.name}", lambda flow: match.admits(flow) and stale(flow))

    def close(self) -> None:
        self.calls.append("close")


class Rig:
    def __init__(self) -> None:
        self.table = Memory()
        self.serving: dict[Frontend, Serving] = {}
        self.rounds: list[int] = []
        self.reconciler = Reconciler(
            Family.IPV4,
            lambda: self.serving,
            self.report,
            table=self.table,
        )

    def report(self, family: Family, seconds: float, deleted: int) -> None:
        assert family is Family.IPV4
        assert seconds >= 0
        self.rounds.append(deleted)

    def written(self, changes: dict[Frontend, Change] | None = None, applied: Applied | None = None) -> None:
        self.reconciler.written(changes or {}, applied or Applied())

    def change(self, before: Serving | None, after: Serving | None) -> None:
        """The frontend's endpoints are others, and rules say so."""
        if after is None:
            self.serving.pop(DNS, None)
        else:
            self.serving[DNS] = after
        self.written({DNS: change(before, after)})


def running(scenario: Callable[[Rig], Awaitable[None]]) -> Rig:
    async def main() -> Rig:
        rig = Rig()
        task = asyncio.create_task(rig.reconciler.run())
        try:
            await scenario(rig)
        finally:
            rig.table.hold.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return rig

    return asyncio.run(main())


async def started(rig: Rig) -> None:
    rig.serving[DNS] = A
    rig.written({DNS: change(None, A)}, Applied(full=True))
    await until(lambda: rig.rounds)
    rig.table.calls.clear()
    rig.rounds.clear()


def test_CT_1_a_start_looks_at_every_flow_though_nothing_was_written() -> None:
    async def scenario(rig: Rig) -> None:
        rig.table.flows = [dnat("10.0.0.1"), dnat("10.0.0.2")]
        rig.serving[DNS] = A
        rig.written({DNS: change(None, A)}, Applied(full=True))
        await until(lambda: rig.rounds)
        assert rig.table.calls == ["sweep UDP"]
        assert rig.rounds == [1]
        assert rig.table.flows == [dnat("10.0.0.1")]

    rig = running(scenario)
    assert rig.table.calls[-1] == "close"


def test_a_start_deletes_flows_of_services_that_went_while_no_agent_was_there() -> None:
    async def scenario(rig: Rig) -> None:
        rig.table.flows = [dnat("10.0.0.1")]
        route = Route(kind=Kind.CLUSTER_IP, backends=A)
        rig.written({}, Applied(full=True, found=ForwardingTable(family=Family.IPV4, routes={DNS: route})))
        await until(lambda: rig.rounds)
        assert not rig.table.flows

    running(scenario)


def test_a_change_asks_for_its_own_flows_alone_and_never_on_the_loops_thread() -> None:
    async def scenario(rig: Rig) -> None:
        await started(rig)
        rig.table.flows = [dnat("10.0.0.1")]
        rig.change(A, B)
        await until(lambda: rig.rounds)
        assert rig.table.calls == ["match"]
        assert not rig.table.flows
        assert threading.get_ident() not in rig.table.threads

    running(scenario)


def test_a_sync_without_changes_is_no_reason_to_ask() -> None:
    async def scenario(rig: Rig) -> None:
        await started(rig)
        rig.written()
        rig.written(applied=Applied(full=True))
        rig.change(A, B)
        await until(lambda: rig.rounds)
        assert rig.table.calls == ["match"]

    running(scenario)


def test_repaired_rules_are_a_reason_to_look_at_every_flow() -> None:
    async def scenario(rig: Rig) -> None:
        await started(rig)
        rig.written(applied=Applied(full=True, operations=1))
        await until(lambda: rig.rounds)
        assert rig.table.calls == ["sweep UDP"]

    running(scenario)


def test_many_changes_are_one_look_with_every_frontend_that_went() -> None:
    async def scenario(rig: Rig) -> None:
        await started(rig)
        rig.table.flows = [dnat("10.0.0.1")]
        others = {at(f"10.96.1.{number}:53", UDP): change(A, B) for number in range(MOST_MATCHES)}
        rig.serving = dict.fromkeys(others, B)
        rig.written(others | {DNS: change(A, None)})
        await until(lambda: rig.rounds)
        assert rig.table.calls == ["sweep UDP"]
        assert not rig.table.flows

    running(scenario)


def test_changes_during_a_round_are_one_more_round() -> None:
    async def scenario(rig: Rig) -> None:
        await started(rig)
        rig.table.hold.clear()
        rig.change(A, B)
        await until(lambda: rig.table.calls)
        rig.change(B, A)
        rig.change(A, None)
        rig.table.flows = [dnat("10.0.0.1"), dnat("10.0.0.2")]
        rig.table.hold.set()
        await until(lambda: len(rig.rounds) == 2)
        assert rig.table.calls == ["match", "match"]
        assert not rig.table.flows

    running(scenario)


@pytest.mark.parametrize("error", [OSError(1, "not permitted"), ValueError("malformed"), ZeroDivisionError()])
def test_CT_7_a_failure_ends_nothing_and_the_next_round_looks_at_every_flow(error: Exception) -> None:
    async def scenario(rig: Rig) -> None:
        await started(rig)
        rig.table.flows = [dnat("10.0.0.1")]
        rig.table.fails = [error]
        rig.change(A, None)
        await until(lambda: rig.table.calls and not rig.table.fails)
        rig.serving[OTHER] = B
        rig.written({OTHER: change(A, B)})
        await until(lambda: rig.rounds)
        assert rig.table.calls == ["match", "sweep UDP"]
        assert not rig.table.flows, "a frontend that went was forgotten"
        rig.change(None, B)
        await until(lambda: len(rig.rounds) == 2)
        assert rig.table.calls[-1] == "match"

    running(scenario)
