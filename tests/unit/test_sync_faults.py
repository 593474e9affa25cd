"""The sync loop with a dataplane that fails, refuses, and is meddled with: it ends with the wanted table."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from proxy.config.settings import DriftPolicy, Settings
from proxy.desired import Desired
from proxy.objects import EndpointSlice, Key, Service
from proxy.runner import Periods
from proxy.sources.base import Resource
from proxy.state import State
from proxy.sync import FamilySync
from rules.dataplane import Applied
from rules.forwarding import Family, ForwardingTable
from tests.builders import endpoint, endpoint_slice, service
from tests.fakes.memory_dataplane import FlakyMemory, bad_mood, bug
from tests.fakes.polling import eventually as until

NAMES = ("web", "shop", "dns", "db")


def a_service(name: str, port: int = 80) -> Service:
    return service(name, cluster_ip=f"172.30.0.{NAMES.index(name) + 1}", ports=[{"port": port}])


def a_slice(name: str, *hosts: int) -> EndpointSlice:
    return endpoint_slice([endpoint(f"10.244.1.{host}") for host in hosts], name=f"{name}-1", owner=name)


class Reports:
    def __init__(self) -> None:
        self.succeeded_times = self.failed_times = 0
        self.drifts: list[int] = []

    def queued(self, family: Family) -> None: ...

    def started(self, family: Family) -> None: ...

    def succeeded(self, family: Family, seconds: float, applied: Applied) -> None:
        self.succeeded_times += 1

    def failed(self, family: Family, seconds: float) -> None:
        self.failed_times += 1

    def drifted(self, family: Family, differences: int, *, repaired: bool) -> None:
        self.drifts.append(differences)


class Rig:
    """One agent's life; the kernel may have been left by another."""

    def __init__(
        self,
        held: ForwardingTable | None = None,
        *,
        policy: DriftPolicy = "repair",
        retry: float = 0.001,
        maximum: float = 3600.0,
    ) -> None:
        self.state = State("node1")
        self.kernel = FlakyMemory(Family.IPV4, held)
        self.reports = Reports()
        self.desired = Desired(Settings(mode="nftables"), "node1", self.state, [Family.IPV4])
        periods = Periods(minimum=0.0, retry=retry, maximum=maximum)
        self.sync = FamilySync(self.kernel, self.desired, self.state, periods, self.reports, policy=policy)
        self.state.on_change = self.sync.request
        self.task: asyncio.Task[None] | None = None

    def start(self, *names: str) -> None:
        self.state.replace(Resource.SLICES, [a_slice(name, 1, 2) for name in names])
        self.state.replace(Resource.SERVICES, [a_service(name) for name in names])
        self.task = asyncio.get_running_loop().create_task(self.sync.run())

    async def stop(self) -> None:
        assert self.task is not None
        assert not self.task.done(), "the loop has ended by itself"
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task

    def wanted(self) -> ForwardingTable:
        table = self.desired.table(Family.IPV4)
        routes = {key: route for key, route in table.routes.items() if route.label not in self.kernel.refused}
        return msgspec.structs.replace(table, routes=routes)

    async def settled(self) -> None:
        await until(lambda: self.kernel.held == self.wanted() and not self.sync.statistics().pending)

    def troubled(self) -> set[str]:
        return {subject for origin, subject in self.state.troubles if origin == "kernel IPv4"}


def living(scenario: Callable[[Rig], Awaitable[None]], rig: Callable[[], Rig] = Rig) -> None:
    async def main() -> None:
        one = rig()
        one.start("web", "shop")
        try:
            await one.settled()
            await scenario(one)
        finally:
            await one.stop()

    asyncio.run(main())


def test_a_delta_that_the_kernel_refuses_is_a_sync_in_the_same_run_and_no_failure() -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.faults["apply"] = [bad_mood]
        rig.state.delete(Resource.SERVICES, Key("ns", "web"))
        await rig.settled()
        assert rig.reports.failed_times == 0
        assert rig.kernel.calls["sync"] == 2

    # With an hour to wait for the next try, only the same run can have done it.
    living(scenario, lambda: Rig(retry=3600.0))


@pytest.mark.parametrize("policy", ["repair", "report"])
def test_a_refused_Service_is_named_the_others_are_served_and_it_is_tried_again(policy: DriftPolicy) -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.refused = {"ns/dns"}
        rig.state.set(Resource.SERVICES, a_service("dns"))
        rig.state.set(Resource.SERVICES, a_service("db"))
        await rig.settled()
        await until(lambda: rig.troubled() == {"Service ns/dns"})
        assert "a bad element" in rig.state.troubles["kernel IPv4", "Service ns/dns"]
        assert rig.sync.statistics().refused == ("ns/dns",)
        assert not rig.sync.statistics().error
        syncs = rig.kernel.calls["sync"]
        await until(lambda: rig.kernel.calls["sync"] > syncs + 1)
        rig.kernel.refused = set()
        await rig.settled()
        await until(lambda: not rig.troubled())
        assert not rig.sync.statistics().refused
        assert not any(rig.reports.drifts), "what was refused before is no drift"
        calls = rig.kernel.calls.total()
        await asyncio.sleep(0.01)
        assert rig.kernel.calls.total() == calls, "it is read again though nothing is refused any more"

    living(scenario, lambda: Rig(policy=policy))


def test_a_refused_Service_is_tried_again_though_others_change_all_the_time() -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.refused = {"ns/dns"}
        rig.state.set(Resource.SERVICES, a_service("dns"))
        await until(rig.troubled)
        rig.kernel.refused = set()
        port = 1000
        # No run is ever one that nobody asked for.
        while rig.kernel.held != rig.wanted() or rig.troubled():
            port += 1
            assert port < 50000
            rig.state.set(Resource.SERVICES, a_service("web", port))
            await asyncio.sleep(0)

    living(scenario, lambda: Rig(retry=0.05))


def test_a_refused_Service_is_tried_again_though_somebody_asks_for_nothing() -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.refused = {"ns/dns"}
        rig.state.set(Resource.SERVICES, a_service("dns"))
        await until(rig.troubled)
        rig.kernel.refused = set()
        done = rig.reports.succeeded_times
        rig.sync.request()
        await until(lambda: rig.reports.succeeded_times > done)
        await until(lambda: rig.kernel.held == rig.wanted() and not rig.troubled())

    living(scenario, lambda: Rig(retry=0.2))


def test_a_refused_Service_that_goes_is_no_trouble_any_more() -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.refused = {"ns/dns"}
        rig.state.set(Resource.SERVICES, a_service("dns"))
        await until(rig.troubled)
        rig.state.delete(Resource.SERVICES, Key("ns", "dns"))
        await until(lambda: not rig.troubled())

    living(scenario)


def test_the_kernel_is_read_once_a_period_though_changes_never_end() -> None:
    async def scenario(rig: Rig) -> None:
        port = 1000
        while rig.kernel.calls["sync"] < 4:
            port += 1
            assert port < 50000
            rig.state.set(Resource.SERVICES, a_service("web", port))
            await asyncio.sleep(0)
        assert rig.kernel.calls["apply"]

    living(scenario, lambda: Rig(maximum=0.05))


def test_what_made_a_delta_fail_is_told_as_drift() -> None:
    async def scenario(rig: Rig) -> None:
        rig.kernel.held = None
        rig.state.set(Resource.SERVICES, a_service("dns"))
        await rig.settled()
        assert [bool(each) for each in rig.reports.drifts] == [True]
        assert rig.sync.statistics().last_drift is not None

    living(scenario)


# --- any interleaving -----------------------------------------------------------------------------------------------

names = st.sampled_from(NAMES)
FAULTS = st.sampled_from([bad_mood, bug])
CALLS = st.sampled_from(["apply", "sync", "read", "after"])


class Machine(RuleBasedStateMachine):
    """Changes, faults, refusals, meddling and restarts; whenever it calms down, the kernel holds what is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.objects: dict[tuple[Resource, str], Service | EndpointSlice] = {}
        self.rig = Rig()

    def _run(self, awaitable: Awaitable[None]) -> None:
        self.loop.run_until_complete(awaitable)

    @initialize(policy=st.sampled_from(["repair", "report"]))
    def begin(self, policy: DriftPolicy) -> None:
        self.policy = policy
        self._run(self._restart(None))

    async def _restart(self, held: ForwardingTable | None) -> None:
        if self.rig.task is not None:
            await self.rig.stop()
        self.rig = Rig(held, policy=self.policy)
        self.rig.start()
        for resource in (Resource.SLICES, Resource.SERVICES):
            self.rig.state.replace(resource, [each for (kind, _), each in self.objects.items() if kind is resource])

    @rule(name=names, port=st.sampled_from([80, 443]))
    def set_service(self, name: str, port: int) -> None:
        self.objects[Resource.SERVICES, name] = value = a_service(name, port)
        self.rig.state.set(Resource.SERVICES, value)

    @rule(name=names, hosts=st.lists(st.integers(1, 5), max_size=4, unique=True))
    def set_endpoints(self, name: str, hosts: list[int]) -> None:
        self.objects[Resource.SLICES, name] = value = a_slice(name, *hosts)
        self.rig.state.set(Resource.SLICES, value)

    @rule(name=names, resource=st.sampled_from([Resource.SERVICES, Resource.SLICES]))
    def delete(self, name: str, resource: Resource) -> None:
        value = self.objects.pop((resource, name), None)
        if value is not None:
            self.rig.state.delete(resource, value.key)

    @rule(call=CALLS, faults=st.lists(FAULTS, min_size=1, max_size=3))
    def misbehave(self, call: str, faults: list[Callable[[], None]]) -> None:
        self.rig.kernel.faults[call] += faults

    @rule(refused=st.frozensets(names.map(lambda name: f"ns/{name}"), max_size=2))
    def refuse(self, refused: frozenset[str]) -> None:
        self.rig.kernel.refused = set(refused)

    @rule(how=st.sampled_from(["gone", "less", "damaged"]))
    def meddle(self, how: str) -> None:
        held = self.rig.kernel.held
        if held is None:
            return
        fewer = dict(list(held.routes.items())[1:])
        self.rig.kernel.held = {
            "gone": None,
            "less": msgspec.structs.replace(held, routes=fewer),
            "damaged": msgspec.structs.replace(held, damage=frozenset(["a rule too many"])),
        }[how]
        self.rig.sync.doubt()

    @rule()
    def restart(self) -> None:
        self._run(self._restart(self.rig.kernel.held))

    @rule(rounds=st.integers(1, 20))
    def go_on(self, rounds: int) -> None:
        async def some() -> None:
            for _ in range(rounds):
                await asyncio.sleep(0)

        self._run(some())

    @rule()
    def calm_down(self) -> None:
        if self.policy == "report":
            # What others did stays, until it is in the way; from here on it is as after a restart.
            self._run(self._restart(self.rig.kernel.held))
        self._run(until(self._holds_the_others))
        wanted = {f"Service {route.label}" for route in self.rig.desired.table(Family.IPV4).routes.values()}
        refused = {f"Service {label}" for label in self.rig.kernel.refused}
        self._run(until(lambda: self.rig.troubled() <= wanted & refused))

    def _holds_the_others(self) -> bool:
        """Of those that are refused now, the kernel may hold what it took before."""
        kernel, wanted = self.rig.kernel, self.rig.wanted()
        if kernel.held is None or self.rig.sync.statistics().pending:
            return False
        routes = {key: route for key, route in kernel.held.routes.items() if route.label not in kernel.refused}
        return msgspec.structs.replace(kernel.held, routes=routes) == wanted

    def teardown(self) -> None:
        try:
            if self.rig.task is not None:
                self.rig.kernel.refused = set()
                self.calm_down()
                self._run(self.rig.settled())
        finally:
            if self.rig.task is not None:
                self._run(self.rig.stop())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()


TestAnyInterleaving = Machine.TestCase
TestAnyInterleaving.settings = settings(settings.get_profile("suite"), max_examples=40, stateful_step_count=25)
