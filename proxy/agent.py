"""The agent: one process, one event loop, from a source of objects to the kernel.

    source ─▶ State ─▶ Desired ─▶ FamilySync, one per family ─▶ dataplane
                                     │
                                     └─▶ health, metrics, health-check node ports

It holds the lock of its network namespace, adopts what the kernel holds already, and ends on SIGTERM or SIGINT with
the rules in place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata

from proxy import memory, modes
from proxy.config.settings import Settings
from proxy.desired import Desired
from proxy.interfaces import watch_addresses
from proxy.lock import HeldError, Lock
from proxy.logs import get_logger
from proxy.node import Interfaces, eligible, normal_node_name
from proxy.objects import Key
from proxy.reconciler import Reconciler
from proxy.runner import Periods
from proxy.serving.agent_server import AgentServer
from proxy.serving.answers import Answers
from proxy.serving.health import ProxyHealth
from proxy.serving.healthcheck import HealthCheckServers
from proxy.serving.metrics import Metrics
from proxy.serving.observer import Observer
from proxy.serving.servers import BindError, serve
from proxy.sources.base import Resource, Source
from proxy.state import State
from proxy.sync import FamilySync
from proxy.sysctls import ROUTE_LOCALNET, ensure
from rules.dataplane import Applied, Dataplane, DataplaneError, UnavailableError
from rules.forwarding import Family

_log = get_logger("sluice.agent")

NODE_PATIENCE = 30.0
"""Seconds to wait for the own Node and its addresses before going on without (NOD-3)."""
POD_CIDR_PATIENCE = 300.0
"""Seconds to wait for the Node's podCIDRs in detect-local mode NodeCIDR before giving up (NOD-5)."""
TAKEOVER_POLL = 0.2


class FatalError(Exception):
    """The agent cannot go on; the message is its last line."""


def main(settings: Settings) -> int:
    """Run the agent until it is told to end; the exit code of the process."""
    try:
        node_name = normal_node_name(settings.hostname_override, socket.gethostname())
        lock = _take_lock(settings)
        try:
            dataplanes = _open_dataplanes(settings)
            asyncio.run(_Agent(settings, node_name, dataplanes).run())
        finally:
            lock.release()
    except (FatalError, HeldError, DataplaneError, ValueError) as error:
        _log.error(str(error))
        return 1
    return 0


def _take_lock(settings: Settings) -> Lock:
    told = False
    while True:
        try:
            return Lock()
        except HeldError as error:
            if not settings.takeover:
                raise HeldError(f"{error}; stop it first, or use --takeover to wait for its end") from None
            if not told:
                _log.info("waiting", reason=str(error))
                told = True
            time.sleep(TAKEOVER_POLL)


def _open_dataplanes(settings: Settings) -> list[Dataplane]:
    """The dataplane of each family that this node can carry.

    Raises:
        UnavailableError: there is none.
    """
    name = modes.choose(settings.mode)
    opened: list[Dataplane] = []
    supported = modes.supported_families()
    for family in Family:
        if family not in supported:
            _log.warning("family not served", family=family.label, reason="it is switched off on this node")
            continue
        try:
            dataplane = modes.open_dataplane(name, family)
            with contextlib.ExitStack() as undo:
                undo.callback(dataplane.close)
                dataplane.check()
                undo.pop_all()
            opened.append(dataplane)
        except UnavailableError as error:
            if not opened:
                raise
            _log.warning("family not served", family=family.label, reason=str(error))
    return opened


async def _open_source(settings: Settings, node_name: str) -> Source:
    if settings.manifests:
        from proxy.sources.manifests import ManifestSource  # noqa: PLC0415  # one source of the two is loaded

        return ManifestSource(settings.manifests, node_name)
    from proxy.sources.apiserver import ApiServer  # noqa: PLC0415  # likewise
    from proxy.sources.credentials import CredentialsError  # noqa: PLC0415  # likewise

    try:
        return await ApiServer.open(settings.kubeconfig, settings.master, node_name)
    except CredentialsError as error:
        raise FatalError(str(error)) from None


class _Told(Observer):
    """What syncs tell: to health and metrics, and to whoever waits for their effects."""

    def __init__(self, health: ProxyHealth, metrics: Metrics, on_success: Callable[[Family, Applied], None]) -> None:
        super().__init__(health, metrics)
        self._on_success = on_success

    def succeeded(self, family: Family, seconds: float, applied: Applied) -> None:
        super().succeeded(family, seconds, applied)
        self._on_success(family, applied)


class _Agent:
    """One run of the agent."""

    def __init__(self, settings: Settings, node_name: str, dataplanes: Iterable[Dataplane]) -> None:
        self._settings = settings
        self._node_name = node_name
        self._dataplanes = tuple(dataplanes)
        families = [dataplane.family for dataplane in self._dataplanes]
        self._state = State(node_name, started=time.time())
        self._desired = Desired(settings, node_name, self._state, families)
        self._mode = self._dataplanes[0].name
        self._health = ProxyHealth(settings.health_timeout)
        self._metrics = Metrics(self._mode, metadata.version("sluice-proxy"))
        periods = Periods(minimum=settings.min_sync_period, retry=settings.sync_period)
        told = _Told(self._health, self._metrics, self._on_success)
        self._syncs = [
            FamilySync(dataplane, self._desired, self._state, periods, told, policy=settings.drift_policy)
            for dataplane in self._dataplanes
        ]
        self._checks = {
            family: HealthCheckServers(
                family, partial(self._health.healthy, family), report=partial(self._tell, family)
            )
            for family in families
        }
        self._reconcilers = {
            family: Reconciler(family, partial(self._desired.serving, family), self._metrics.reconciled)
            for family in families
        }
        self._effects = {family: asyncio.Event() for family in families}
        self._interfaces_known = asyncio.Event()
        self._changed = asyncio.Event()
        self._pod_cidrs: tuple[str, ...] | None = None
        self._unsettled = set(families)
        """Families whose first sync is still to come."""

    async def run(self) -> None:
        """Run until SIGTERM or SIGINT.

        Raises:
            FatalError: the agent cannot go on, or a server cannot listen and the configuration wants it to end then.
        """
        memory.expect_much()
        asyncio.get_running_loop().call_later(memory.LONGEST, memory.give_up)
        source = await _open_source(self._settings, self._node_name)
        _log.info(
            "starting",
            version=metadata.version("sluice-proxy"),
            node=self._node_name,
            mode=self._mode,
            meaning=self._settings.behaviour,
            families=[sync.family.label for sync in self._syncs],
            source=source.description,
            pid=os.getpid(),
        )
        self._state.on_change = self._on_change
        self._state.on_trouble = _tell_trouble
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(source.run(self._state), name="source"),
                    group.create_task(watch_addresses(self._on_interfaces), name="interfaces"),
                    group.create_task(self._serve(), name="serve"),
                    group.create_task(self._sync(), name="sync"),
                    *(group.create_task(self._apply_effects(family), name="checks") for family in self._checks),
                    *(group.create_task(each.run(), name="conntrack") for each in self._reconcilers.values()),
                    group.create_task(self._watch_strangers(), name="strangers"),
                    group.create_task(self._answer(source), name="agent socket"),
                ]
                await stop.wait()
                _log.info("ending", rules="stay as they are")
                for task in tasks:
                    task.cancel()
        except ExceptionGroup as errors:
            fatal, others = errors.split((FatalError, BindError))
            if fatal is None or others is not None:
                raise
            raise FatalError("; ".join(str(each) for each in _leaves(fatal))) from None
        finally:
            for checks in self._checks.values():
                await checks.close()
            for dataplane in self._dataplanes:
                dataplane.close()

    # --- what comes in ---------------------------------------------------------------------------------------

    def _on_change(self) -> None:
        self._changed.set()
        self._health.set_eligible(eligible(self._state.node) or bool(self._settings.manifests and not self._state.node))
        self._check_pod_cidrs()
        for sync in self._syncs:
            sync.request()

    def _on_interfaces(self, interfaces: Interfaces) -> None:
        self._interfaces_known.set()
        self._desired.set_interfaces(interfaces)
        for sync in self._syncs:
            sync.request()

    def _tell(self, family: Family, service: Key, reason: str | None) -> None:
        self._state.trouble(f"health check {family.label}", f"Service {service}", reason)

    def _check_pod_cidrs(self) -> None:
        """End the process when the Node's podCIDRs change under detect-local mode NodeCIDR (NOD-6)."""
        node = self._state.node
        if self._settings.detect_local_mode != "NodeCIDR" or node is None or not node.spec.pod_cidrs:
            return
        if self._pod_cidrs is None:
            self._pod_cidrs = node.spec.pod_cidrs
        elif self._pod_cidrs != node.spec.pod_cidrs:
            _log.error("the Node's podCIDRs changed: ending, to start anew", was=self._pod_cidrs)
            os._exit(1)

    async def _watch_strangers(self) -> None:
        """Look at the kernel again when another process touched our rules (DESIGN 4.2)."""
        loop = asyncio.get_running_loop()
        try:
            watch = modes.watch(self._dataplanes)
        except OSError as error:
            _log.warning("changes by other processes are noticed hourly only", reason=str(error))
            return
        with contextlib.closing(watch):
            loop.add_reader(watch.fileno(), self._doubt, watch)
            try:
                await loop.create_future()
            finally:
                loop.remove_reader(watch.fileno())

    def _doubt(self, watch: modes.Watch) -> None:
        for family, by in watch.touched():
            for sync in self._syncs:
                if sync.family is family:
                    sync.doubt([by] if by is not None else [])

    # --- what goes out ---------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        await self._interfaces_known.wait()
        self._allow_loopback_node_ports()
        await self._wait_for_node()
        async with asyncio.TaskGroup() as group:
            for sync in self._syncs:
                sync.request()
                group.create_task(sync.run(), name=f"sync {sync.family.label}")

    def _allow_loopback_node_ports(self) -> None:
        settings = self._settings
        if settings.behaviour == "nftables" or not settings.localhost_node_ports:
            return
        if any(sync.family is Family.IPV4 for sync in self._syncs):
            trouble = ensure(ROUTE_LOCALNET, 1)
            if trouble:
                _log.warning("node ports on loopback will not answer", reason=trouble)

    async def _wait_for_node(self) -> None:
        """Wait until what is said about the node rests on its Node object (NOD-2 to NOD-5)."""
        if self._settings.manifests:
            return
        needs_pod_cidrs = self._settings.detect_local_mode == "NodeCIDR"
        await self._wait_until(lambda: self._state.listed(Resource.NODES), None)
        known = await self._wait_until(
            lambda: bool((node := self._state.node) and node.status.addresses), NODE_PATIENCE
        )
        if not known:
            _log.error("timed out waiting for the Node and its addresses: going on without", node=self._node_name)
        if needs_pod_cidrs and not await self._wait_until(
            lambda: bool((node := self._state.node) and node.spec.pod_cidrs), POD_CIDR_PATIENCE
        ):
            raise FatalError(f'timeout waiting for PodCIDR allocation on node "{self._node_name}"')

    async def _wait_until(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def _serve(self) -> None:
        await serve(self._settings, self._health, self._metrics, proxy_mode=self._settings.behaviour)

    async def _answer(self, source: Source) -> None:
        """Serve the agent's socket (DESIGN 4.12)."""
        answers = Answers(
            settings=self._settings,
            node_name=self._node_name,
            source=source,
            state=self._state,
            desired=self._desired,
            syncs=self._syncs,
            health=self._health,
        )
        await AgentServer(self._settings.run_directory, answers.answer).run()

    def _on_success(self, family: Family, applied: Applied) -> None:
        if self._unsettled:
            self._unsettled.discard(family)
            if not self._unsettled:
                memory.settle()
        now = time.time()
        for trigger in self._desired.take_triggers(family):
            self._metrics.programming_latency(family, now - trigger.time)
        self._reconcilers[family].written(self._desired.take_changes(family), applied)
        self._effects[family].set()

    async def _remove_other_modes(self, family: Family) -> None:
        """Take away what an agent in another mode has left: our own rules are in place, so nobody notices."""
        [dataplane] = (each for each in self._dataplanes if each.family is family)
        try:
            for name in await asyncio.to_thread(modes.remove_others, dataplane):
                _log.info("removed what another mode had left", mode=name, family=family.label)
        except DataplaneError as error:
            _log.warning("what another mode has left stays", family=family.label, reason=str(error))

    async def _apply_effects(self, family: Family) -> None:
        """After each sync: health-check node ports, and what metrics say of the tables (IPT-27)."""
        checks = self._checks[family]
        await self._effects[family].wait()
        await self._remove_other_modes(family)
        while True:
            await self._effects[family].wait()
            self._effects[family].clear()
            counts, no_local = self._state.statistics(), self._desired.no_local(family)
            self._metrics.service_changes(counts.service_changes_total, counts.service_changes_pending)
            self._metrics.endpoint_changes(counts.endpoint_changes_total, counts.endpoint_changes_pending)
            self._metrics.troubles(counts.troubles)
            self._metrics.no_local(family, no_local.internal, no_local.external)
            self._metrics.routes(family, self._desired.size(family))
            await checks.set_addresses(self._desired.facts(family).node_port_addresses)
            await checks.sync(self._desired.health_checks(family))


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for each in group.exceptions:
        if isinstance(each, ExceptionGroup):
            yield from _leaves(each)
        else:
            yield each


def _tell_trouble(origin: str, subject: str, reason: str | None) -> None:
    if reason is None:
        _log.info("no longer in trouble", origin=origin, subject=subject)
    else:
        _log.warning("in trouble", origin=origin, subject=subject, reason=reason)
