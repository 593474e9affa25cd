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
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata

from proxy import events, logs, memory, modes, privileged, takeover
from proxy.config.settings import Settings
from proxy.config.watching import Following
from proxy.desired import Desired
from proxy.interfaces import watch_addresses
from proxy.lock import HeldError
from proxy.logs import get_logger
from proxy.node import Interfaces, eligible, normal_node_name
from proxy.objects import Key
from proxy.opening import FatalError, open_dataplanes, open_source, take_lock
from proxy.reconciler import Reconciler
from proxy.report import Unserved
from proxy.runner import Periods
from proxy.sd_notify import Supervisor
from proxy.serving.agent_server import AgentServer
from proxy.serving.answers import Answers
from proxy.serving.health import ProxyHealth
from proxy.serving.healthcheck import HealthCheckServers
from proxy.serving.http import Server
from proxy.serving.metrics import Metrics
from proxy.serving.observer import Observer
from proxy.serving.servers import BindError, serve
from proxy.sources.base import Resource, Source
from proxy.sources.credentials_reading import Reading
from proxy.state import State
from proxy.sync import FamilySync
from rules.dataplane import Applied, Dataplane, DataplaneError, limits
from rules.forwarding import Family

_log = get_logger("sluice.agent")

NODE_PATIENCE = 30.0
"""Seconds to wait for the own Node and its addresses before going on without (NOD-3)."""
TURN = 0.0005
"""Seconds for which a thread that writes to the kernel may keep the event loop from going on: a health answer takes
some ten turns."""
POD_CIDR_PATIENCE = 300.0
"""Seconds to wait for the Node's podCIDRs in detect-local mode NodeCIDR before giving up (NOD-5)."""
OTHERS_PATIENCE = 5.0
"""Seconds for which looking for what other modes have left gives way to the first sync of the other family."""
EVENT_PATIENCE = 2.0
"""Seconds for an event to be written before the agent ends."""


def main(settings: Settings, reading: Reading | None = None, following: Following | None = None) -> int:
    """Run the agent until it is told to end; the exit code of the process.

    `reading` is a child that reads the API server's credentials already, `following` follows the configuration file.
    """
    try:
        node_name = normal_node_name(settings.hostname_override, socket.gethostname())
        lock = take_lock(settings)
        try:
            dataplanes, unserved = open_dataplanes(settings)
            asyncio.run(_Agent(settings, node_name, dataplanes, unserved).run(reading, following))
        finally:
            lock.release()
    except (FatalError, HeldError, DataplaneError, ValueError) as error:
        _log.error(str(error))
        return 1
    finally:
        if reading is not None:
            reading.end()
    return 0


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

    def __init__(
        self, settings: Settings, node_name: str, dataplanes: Iterable[Dataplane], unserved: Iterable[Unserved]
    ) -> None:
        self._settings = settings
        self._unserved = tuple(unserved)
        self._node_name = node_name
        self._dataplanes = tuple(dataplanes)
        families = [dataplane.family for dataplane in self._dataplanes]
        self._state = State(node_name, started=time.time())
        self._desired = Desired(settings, node_name, self._state, families)
        self._mode = self._dataplanes[0].name
        self._server = Server()
        self._health = ProxyHealth(settings.health_timeout)
        self._metrics = Metrics(self._mode, metadata.version("sluice-proxy"))
        self._metrics.follow(self._state.statistics)
        self._metrics.follow_server(self._server)
        if self._mode == "userspace":
            from proxy.userspace.dataplane import UserspaceDataplane  # noqa: PLC0415  # one dataplane of several is loaded
            from proxy.userspace.metrics import WorkersCollector  # noqa: PLC0415  # likewise

            counted = [each for each in self._dataplanes if isinstance(each, UserspaceDataplane)]
            self._metrics.register(WorkersCollector(counted))
        self._events = events.Recorder(node_name, told=self._metrics.event)
        periods = Periods(minimum=settings.min_sync_period, retry=settings.sync_period)
        told = _Told(self._health, self._metrics, self._on_success)
        self._syncs = [
            FamilySync(dataplane, self._desired, self._state, periods, told, policy=settings.drift_policy)
            for dataplane in self._dataplanes
        ]
        self._checks = {
            family: HealthCheckServers(
                family,
                partial(self._health.healthy, family),
                report=partial(self._tell, family),
                failed=self._health_check_failed,
                server=self._server,
            )
            for family in families
        }
        self._reconcilers = {
            family: Reconciler(family, partial(self._desired.serving, family), self._metrics.reconciled)
            for family in families
        }
        self._supervisor = Supervisor(os.environ)
        self._answers: Answers | None = None
        self._effects = {family: asyncio.Event() for family in families}
        self._interfaces_known = asyncio.Event()
        self._changed = asyncio.Event()
        self._pod_cidrs: tuple[str, ...] = ()
        self._unsettled = set(families)
        """Families whose first sync is still to come."""
        self._settled = asyncio.Event()

    async def run(self, reading: Reading | None, following: Following | None) -> None:
        """Run until SIGTERM or SIGINT; the arguments are those of `main`.

        Raises:
            FatalError: the agent cannot go on, or a server cannot listen and the configuration wants it to end then.
        """
        sys.setswitchinterval(TURN)
        memory.expect_much()
        asyncio.get_running_loop().call_later(memory.LONGEST, memory.give_up)
        self._set_up(self._settings)
        source = await open_source(self._settings, self._node_name, self._metrics, reading)
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
        for limit in limits(self._dataplanes[0].capabilities):
            _log.warning("what this mode cannot do", mode=self._mode, limit=limit)
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
                    group.create_task(self._supervisor.run(), name="supervisor"),
                    *self._event_tasks(group, source),
                ]
                if following is not None:
                    tasks.append(group.create_task(self._follow(following), name="configuration"))
                await stop.wait()
                self._supervisor.stopping()
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
                checks.close()
            for dataplane in self._dataplanes:
                dataplane.close()

    def _event_tasks(self, group: asyncio.TaskGroup, source: Source) -> Iterator[asyncio.Task[None]]:
        """What writes events, where there is an API server to write them to."""
        if isinstance(source, events.Writer):
            self._events.record(events.starting(self._node_name))
            if self._mode == "ipvs":
                self._events.record(events.ipvs_deprecated(self._node_name))
            yield group.create_task(self._events.run(source), name="events")

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

    async def _follow(self, following: Following) -> None:
        """Take on what changes in the configuration file, or end because of it (CFG-54)."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reload, following)
        async with contextlib.aclosing(following.changes()) as changes:
            async for news in changes:
                for problem in news.problems:
                    _log.error("the configuration stays as it was", reason=problem)
                if news.change.restart:
                    fields = ", ".join(news.change.restart)
                    raise FatalError(f"the configuration file was updated: ending, to start anew with its {fields}")
                if news.problems:
                    self._supervisor.reloaded()
                    continue
                for warning in news.loaded.warnings:
                    _log.warning(warning)
                _log.info("configuration", changed=", ".join(news.change.live) or "nothing")
                self._configure(news.loaded.settings)
                self._supervisor.reloaded()

    def _reload(self, following: Following) -> None:
        self._supervisor.reloading()
        following.look()

    def _set_up(self, settings: Settings) -> None:
        for complaint in privileged.set_up(settings):
            _log.warning("the node is not set up as configured", reason=complaint)

    def _configure(self, settings: Settings) -> None:
        """Go by another configuration, as far as `proxy.config.schema` calls its fields live."""
        before, self._settings = self._settings, settings
        logs.configure(settings.log_format, settings.verbosity)
        if privileged.concerns(before) != privileged.concerns(settings):
            self._set_up(settings)
        self._health.set_timeout(settings.health_timeout)
        self._desired.set_settings(settings)
        if self._answers is not None:
            self._answers.configured(settings)
        for sync in self._syncs:
            sync.configure(Periods(minimum=settings.min_sync_period, retry=settings.sync_period), settings.drift_policy)
            if settings.drift_policy != before.drift_policy:
                sync.doubt()
            sync.request()

    def _tell(self, family: Family, service: Key, reason: str | None) -> None:
        self._state.trouble(f"health check {family.label}", f"Service {service}", reason)

    def _check_pod_cidrs(self) -> None:
        """End the process when the Node's podCIDRs change under detect-local mode NodeCIDR (NOD-6)."""
        node = self._state.node
        if self._settings.detect_local_mode != "NodeCIDR" or node is None:
            return
        if not self._pod_cidrs:
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
        await self._wait_for_node()
        async with asyncio.TaskGroup() as group:
            for sync in self._syncs:
                sync.request()
                group.create_task(sync.run(), name=f"sync {sync.family.label}")

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
        await serve(
            self._settings,
            self._health,
            self._metrics,
            proxy_mode=self._settings.behaviour,
            version=metadata.version("sluice-proxy"),
            server=self._server,
            configz=lambda: self._settings.configz,
            failed=self._server_failed,
        )

    async def _server_failed(self, server: str, reason: str) -> None:
        self._events.record(events.server_not_started(self._node_name, server, reason))
        await self._events.settled(EVENT_PATIENCE)

    def _health_check_failed(self, service: Key, port: int, why: str) -> None:
        self._events.record(events.health_check_not_started(self._node_name, service, port, why))

    async def _answer(self, source: Source) -> None:
        """Serve the agent's socket (DESIGN 4.12)."""
        self._answers = Answers(
            settings=self._settings,
            node_name=self._node_name,
            source=source,
            state=self._state,
            desired=self._desired,
            syncs=self._syncs,
            health=self._health,
            unserved=self._unserved,
        )
        await AgentServer(self._settings.run_directory, self._answers.answer).run()

    def _on_success(self, family: Family, applied: Applied) -> None:
        if self._unsettled:
            self._unsettled.discard(family)
            if not self._unsettled:
                memory.settle()
                self._supervisor.ready()
                self._settled.set()
        now = time.time()
        for trigger in self._desired.take_triggers(family):
            self._metrics.programming_latency(family, now - trigger.time)
        self._reconcilers[family].written(self._desired.take_changes(family), applied)
        self._effects[family].set()

    async def _remove_other_modes(self, family: Family) -> None:
        """Take away what an agent in another mode has left: our own rules are in place, so nobody notices."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OTHERS_PATIENCE):
                await self._settled.wait()
                # Flows that userspace mode has accepted must be the rules' before its sockets go.
                await self._reconcilers[family].begun.wait()
        [dataplane] = (each for each in self._dataplanes if each.family is family)
        try:
            for name in await asyncio.to_thread(modes.remove_others, dataplane):
                _log.info("removed what another mode had left", mode=name, family=family.label)
        except DataplaneError as error:
            self._metrics.cleanup_failed(family)
            _log.warning("what another mode has left stays", family=family.label, reason=str(error))
        if self._settings.remove_kube_proxy_rules:
            await self._remove_kube_proxy(family)

    async def _remove_kube_proxy(self, family: Family) -> None:
        """Take away what kube-proxy has left, unless it runs (docs/takeover.md)."""
        try:
            for line in await asyncio.to_thread(takeover.take_over, family):
                _log.info(line)
        except takeover.RunningError as error:
            _log.warning("rules of kube-proxy stay", family=family.label, reason=str(error))
        except DataplaneError as error:
            self._metrics.cleanup_failed(family)
            _log.warning("rules of kube-proxy stay", family=family.label, reason=str(error))

    async def _apply_effects(self, family: Family) -> None:
        """After each sync: health-check node ports, and what metrics say of the tables (IPT-27)."""
        checks = self._checks[family]
        await self._effects[family].wait()
        async with asyncio.TaskGroup() as group:
            # Beside the rest: what userspace mode has left may take the time of its drain.
            group.create_task(self._remove_other_modes(family), name=f"other modes {family.label}")
            await self._keep_up_effects(family, checks)

    async def _keep_up_effects(self, family: Family, checks: HealthCheckServers) -> None:
        while True:
            await self._effects[family].wait()
            self._effects[family].clear()
            no_local = self._desired.no_local(family)
            self._metrics.no_local(family, no_local.internal, no_local.external)
            self._metrics.routes(family, self._desired.size(family))
            checks.set_addresses(self._desired.facts(family).node_port_addresses)
            checks.sync(self._desired.health_checks(family))


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
