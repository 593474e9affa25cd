"""The agent: one process, one event loop, from a source of objects to the kernel.

    source ─▶ State ─▶ Desired ─▶ FamilySync, one per family ─▶ dataplane
                                     │
                                     └─▶ health, metrics, health-check node ports

It holds the lock of its network namespace, adopts what the kernel holds already, and ends on SIGTERM or SIGINT with
the rules in place.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from importlib import metadata

import msgspec

from proxy import events, logs, memory, modes, privileged
from proxy.config.settings import Settings
from proxy.config.watching import Following
from proxy.counters import Ledger
from proxy.counting import Counters, Counting, Off, Relayed, Relaying
from proxy.desired import Desired
from proxy.effects import Effects
from proxy.interfaces import watch_addresses
from proxy.lock import HeldError
from proxy.logs import get_logger
from proxy.node import Interfaces, normal_node_name
from proxy.objects import Key
from proxy.opening import FatalError, make_room, open_dataplanes, open_source, take_lock
from proxy.own_node import OwnNode
from proxy.reloading import follow
from proxy.report import Unserved
from proxy.runner import Periods
from proxy.sd_notify import Supervisor
from proxy.serving.agent_server import AgentServer
from proxy.serving.answers import Answers
from proxy.serving.health import ProxyHealth
from proxy.serving.healthcheck import HealthCheckServers
from proxy.serving.http import Handler, Server
from proxy.serving.metrics import Metrics
from proxy.serving.observer import Observer
from proxy.serving.servers import BindError, serve
from proxy.serving.traffic import TrafficCollector
from proxy.sources.base import Resource, Source
from proxy.sources.credentials_reading import Reading
from proxy.state import State
from proxy.strangers import watch_strangers
from proxy.sync import FamilySync
from rules.dataplane import Applied, Dataplane, DataplaneError, limits
from rules.forwarding import Family

_log = get_logger("sluice.agent")

TURN = 0.0005
"""Seconds for which a thread that writes to the kernel may keep the event loop from going on: a health answer takes
some ten turns."""
EVENT_PATIENCE = 2.0
"""Seconds for an event to be written before the agent ends."""


def main(settings: Settings, reading: Reading | None = None, following: Following | None = None) -> int:
    """Run the agent until it is told to end; the exit code of the process.

    `reading` is a child that reads the API server's credentials already, `following` follows the configuration file.
    """
    try:
        node_name = normal_node_name(settings.hostname_override, socket.gethostname())
        make_room()
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
        self._server = Server(busy=lambda: any(sync.at_work for sync in self._syncs))
        self._health = ProxyHealth(settings.health_timeout)
        self._metrics = Metrics(
            self._mode,
            metadata.version("sluice-proxy"),
            native=settings.feature_gates.get("NativeHistograms", False),
        )
        self._metrics.follow(self._state.statistics)
        self._metrics.follow_server(self._server)
        if self._mode == "userspace":
            from proxy.userspace.dataplane import UserspaceDataplane  # noqa: PLC0415  # one dataplane of several is loaded
            from proxy.userspace.metrics import WorkersCollector  # noqa: PLC0415  # likewise

            counted = [each for each in self._dataplanes if isinstance(each, UserspaceDataplane)]
            self._metrics.register(WorkersCollector(counted))
        self._counters = self._count()
        self._events = events.Recorder(node_name, told=self._metrics.event)
        periods = self._periods(settings)
        told = Observer(self._health, self._metrics, self._on_success)
        self._syncs = [
            FamilySync(dataplane, self._desired, self._state, periods, told, policy=settings.drift_policy)
            for dataplane in self._dataplanes
        ]
        self._settled = asyncio.Event()
        """Every family has had its first sync."""
        self._effects = {dataplane.family: self._effects_of(dataplane) for dataplane in self._dataplanes}
        self._supervisor = Supervisor(os.environ)
        self._answers: Answers | None = None
        self._own_node = OwnNode(node_name, settings, self._state)
        self._interfaces: Interfaces = {}
        self._interfaces_known = asyncio.Event()
        self._unsettled = set(families)
        """Families whose first sync is still to come."""

    def _prepare(self) -> None:
        privileged.set_up_or_tell(self._settings, self._mode)
        if self._mode == "ipvs":  # IPVS-2
            _log.error("mode ipvs is deprecated in Kubernetes and will be removed there: use mode nftables")

    def _periods(self, settings: Settings) -> Periods:
        """How often to sync; in mode ipvs everything is looked at each syncPeriod, as backends drain (IPVS-28)."""
        periods = Periods(minimum=settings.min_sync_period, retry=settings.sync_period)
        return msgspec.structs.replace(periods, maximum=settings.sync_period) if self._mode == "ipvs" else periods

    def _effects_of(self, dataplane: Dataplane) -> Effects:
        family = dataplane.family
        checks = HealthCheckServers(
            family,
            partial(self._health.healthy, family),
            report=partial(self._tell, family),
            failed=self._health_check_failed,
            server=self._server,
        )
        return Effects(
            dataplane,
            self._desired,
            self._metrics,
            checks,
            self._settled,
            remove_kube_proxy_rules=self._settings.remove_kube_proxy_rules,
        )

    def _count(self) -> Counters:
        """What counts the traffic of Services."""
        relaying = [each for each in self._dataplanes if isinstance(each, Relaying)]
        if relaying:
            return Relayed(relaying)
        if not self._settings.traffic_counters:
            return Off()
        families = [dataplane.family for dataplane in self._dataplanes]
        ledgers = [Ledger(family, partial(self._desired.routes, family)) for family in families]
        counting = Counting(ledgers, nat=self._mode != "ipvs")
        self._metrics.register(TrafficCollector(counting, self._settings.traffic_counter_series))
        return counting

    async def run(self, reading: Reading | None, following: Following | None) -> None:
        """Run until SIGTERM or SIGINT; the arguments are those of `main`.

        Raises:
            FatalError: the agent cannot go on, or a server cannot listen and the configuration wants it to end then.
        """
        sys.setswitchinterval(TURN)
        memory.expect_much()
        asyncio.get_running_loop().call_later(memory.LONGEST, memory.give_up)
        self._prepare()
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
        self._state.on_event = _tell_event
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(source.run(self._state), name="source"),
                    group.create_task(watch_addresses(self._on_interfaces), name="interfaces"),
                    group.create_task(self._serve(source), name="serve"),
                    group.create_task(self._sync(), name="sync"),
                    *(group.create_task(each.run(), name="effects") for each in self._effects.values()),
                    group.create_task(watch_strangers(self._dataplanes, self._syncs), name="strangers"),
                    group.create_task(self._answer(source), name="agent socket"),
                    group.create_task(self._supervisor.run(), name="supervisor"),
                    *self._event_tasks(group, source),
                ]
                if isinstance(self._counters, Counting):
                    tasks.append(group.create_task(self._counters.run(), name="counters"))
                if following is not None:
                    tasks.append(
                        group.create_task(follow(following, self._configure, self._supervisor), name="configuration")
                    )
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
            for effects in self._effects.values():
                effects.close()
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
        self._health.set_eligible(self._own_node.eligible)
        self._own_node.changed()
        for sync in self._syncs:
            sync.request()

    def _on_interfaces(self, interfaces: Interfaces) -> None:
        self._interfaces = interfaces
        self._interfaces_known.set()
        self._desired.set_interfaces(interfaces)
        for sync in self._syncs:
            sync.request()

    def _configure(self, settings: Settings) -> None:
        """Go by another configuration, as far as `proxy.config.schema` calls its fields live."""
        before, self._settings = self._settings, settings
        logs.configure(settings.log_format, settings.verbosity)
        if privileged.concerns(before) != privileged.concerns(settings):
            privileged.set_up_or_tell(settings, self._mode)
        self._health.set_timeout(settings.health_timeout)
        self._desired.set_settings(settings)
        if self._answers is not None:
            self._answers.configured(settings)
        for sync in self._syncs:
            sync.configure(self._periods(settings), settings.drift_policy)
            if settings.drift_policy != before.drift_policy:
                sync.doubt()
            sync.request()

    def _tell(self, family: Family, service: Key, reason: str | None) -> None:
        self._state.trouble(f"health check {family.label}", f"Service {service}", reason)

    # --- what goes out ---------------------------------------------------------------------------------------

    async def _sync(self) -> None:
        await self._interfaces_known.wait()
        await self._own_node.wait()
        self._own_node.check(self._settings, [each.family for each in self._dataplanes], self._interfaces)
        try:
            await asyncio.to_thread(modes.meet_workers, self._dataplanes)
        except (DataplaneError, OSError) as error:
            _log.warning("connections of userspace mode may be cut", reason=str(error))
        async with asyncio.TaskGroup() as group:
            for sync in self._syncs:
                sync.request()
                group.create_task(sync.run(), name=f"sync {sync.family.label}")

    def _page(self, source: Source) -> Handler | None:
        """What serves /debug/services, where it may be served."""
        from proxy.explain.gather import Means  # noqa: PLC0415  # who has no page does not pay for it
        from proxy.serving import debug_services as services  # noqa: PLC0415  # likewise

        if why := services.not_served(self._settings):
            _log.warning("the page /debug/services is not served", reason=why)
            return None
        node = services.Node(
            name=self._node_name,
            version=metadata.version("sluice-proxy"),
            mode=self._mode,
            source=source.description,
            families=lambda: self._answers.families() if self._answers is not None else (),
        )
        families = tuple(sync.family for sync in self._syncs)
        page = services.ServicesPage(
            self._settings,
            node,
            self._state,
            self._desired,
            families=families,
            counters=self._counters,
            means=Means(open_dataplane=modes.opener(self._settings)),
        )
        return page.answer

    async def _serve(self, source: Source) -> None:
        await serve(
            self._settings,
            self._health,
            self._metrics,
            proxy_mode=self._settings.behaviour,
            version=metadata.version("sluice-proxy"),
            server=self._server,
            configz=lambda: self._settings.configz,
            page=self._page(source) if self._settings.debug_page else None,
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
            counters=self._counters,
        )
        await AgentServer(self._settings.run_directory, self._answers.answer).run()

    def _on_success(self, family: Family, applied: Applied) -> None:
        if self._unsettled:
            self._unsettled.discard(family)
            if not self._unsettled:
                memory.settle()
                self._supervisor.ready()
                self._settled.set()
        self._effects[family].succeeded(applied)


def _leaves(group: ExceptionGroup[Exception]) -> Iterator[Exception]:
    for each in group.exceptions:
        if isinstance(each, ExceptionGroup):
            yield from _leaves(each)
        else:
            yield each


def _tell_event(how: str, resource: Resource, key: Key, changed: bool) -> None:
    """At verbosity 4 (CFG-64)."""
    _log.debug("object", how=how, resource=resource.value, object=str(key), differs=changed)


def _tell_trouble(origin: str, subject: str, reason: str | None) -> None:
    if reason is None:
        _log.info("no longer in trouble", origin=origin, subject=subject)
    else:
        _log.warning("in trouble", origin=origin, subject=subject, reason=reason)
