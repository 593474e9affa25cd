"""What follows the syncs of one family.

    a sync succeeded ─▶ at once: how long changes took to become rules (MET-5), stale flows are looked for (CT-1)
                     ─▶ beside the sync loop: health-check node ports, what metrics say of the table
                     ─▶ once, when the rules of all families are there: what other modes and kube-proxy have left goes

None of it holds up a sync, and none of its failures is one of a sync.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from functools import partial

from proxy import modes, takeover
from proxy.desired import Desired
from proxy.logs import get_logger
from proxy.reconciler import Reconciler
from proxy.serving.healthcheck import HealthCheckServers
from proxy.serving.metrics import Metrics
from rules.dataplane import Applied, Dataplane, DataplaneError

_log = get_logger("sluice.agent")

OTHERS_PATIENCE = 5.0
"""Seconds for which looking for what other modes have left gives way to the first sync of the other family."""
COUNT_EVERY = 15.0
"""Seconds between two looks at what rules have counted."""
RUNS_EVERY = 10.0
"""Seconds between two looks whether a kube-proxy still runs that has rules here: without it they go stale."""
RETRY = 5.0
"""Seconds after which a health check's port that could not be listened on is tried again (HC-21)."""


class Effects:
    """What follows the syncs of one family's dataplane."""

    def __init__(
        self,
        dataplane: Dataplane,
        desired: Desired,
        metrics: Metrics,
        checks: HealthCheckServers,
        all_settled: asyncio.Event,
        *,
        remove_kube_proxy_rules: bool,
    ) -> None:
        """Of a dataplane; `all_settled` is set when every family has had its first sync."""
        self._dataplane = dataplane
        self._family = dataplane.family
        self._desired = desired
        self._metrics = metrics
        self._checks = checks
        self._all_settled = all_settled
        self._remove_kube_proxy_rules = remove_kube_proxy_rules
        self._reconciler = Reconciler(self._family, partial(desired.serving, self._family), metrics.reconciled)
        self._settled = asyncio.Event()
        """The family has had its first sync."""
        self._synced = asyncio.Event()
        """It has had another one since this was looked at."""

    def succeeded(self, applied: Applied) -> None:
        """A sync was applied; on the event loop."""
        now = time.time()
        for trigger in self._desired.take_triggers(self._family):
            self._metrics.programming_latency(self._family, now - trigger.time)
        self._reconciler.written(self._desired.take_changes(self._family), applied)
        self._settled.set()
        self._synced.set()

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reconciler.run(), name=f"conntrack {self._family.label}")
            group.create_task(self._keep_up(), name=f"checks {self._family.label}")
            if self._dataplane.name == "iptables":
                group.create_task(self._count_packets(), name=f"packets {self._family.label}")
            # Beside the rest: what userspace mode has left may take the time of its drain.
            group.create_task(self._remove_others(), name=f"other modes {self._family.label}")

    def close(self) -> None:
        """Stop serving health checks."""
        self._checks.close()

    async def _keep_up(self) -> None:
        while True:
            # Who holds a health check's port may let it go while nothing changes here.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RETRY if self._checks.refused else None):
                    await self._synced.wait()
            self._synced.clear()
            no_local = self._desired.no_local(self._family)
            self._metrics.no_local(self._family, no_local.internal, no_local.external)
            self._metrics.routes(self._family, self._desired.size(self._family))
            self._checks.set_addresses(self._desired.facts(self._family).node_port_addresses)
            self._checks.sync(self._desired.health_checks(self._family))

    async def _count_packets(self) -> None:
        """Have metrics know what rules have counted (MET-10, MET-11)."""
        from rules.iptables.dataplane import IptablesDataplane  # noqa: PLC0415  # one dataplane of several is loaded

        assert isinstance(self._dataplane, IptablesDataplane)
        await self._settled.wait()
        before = None  # what the first look finds an agent before this one has counted
        while True:
            try:
                now = await asyncio.to_thread(self._dataplane.packets)
            except DataplaneError as error:
                _log.debug("packets are not counted", family=self._family.label, reason=str(error))
            else:
                if before is not None:
                    self._metrics.packets(*now.since(before))
                before = now
            await asyncio.sleep(COUNT_EVERY)

    async def _remove_others(self) -> None:
        """Take away what others have left, once our own rules are in place, so that nobody notices."""
        await self._settled.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OTHERS_PATIENCE):
                await self._all_settled.wait()
                # Flows that userspace mode has accepted must be the rules' before its sockets go.
                await self._reconciler.begun.wait()
        try:
            # New connections are the new mode's; those that go on through the old one have a while to end.
            await asyncio.sleep(await asyncio.to_thread(modes.release_others, self._dataplane))
            for name in await asyncio.to_thread(modes.remove_others, self._dataplane):
                _log.info("removed what another mode had left", mode=name, family=self._family.label)
        except Exception as error:  # noqa: BLE001  # even an error of our own making is no reason to end the agent
            self._stays("what another mode has left stays", error)
        if self._remove_kube_proxy_rules:
            await self._remove_kube_proxy()

    async def _remove_kube_proxy(self) -> None:
        """Take away what kube-proxy has left, as soon as it does not run (docs/takeover.md)."""
        told = False
        while True:
            try:
                done = await asyncio.to_thread(takeover.take_over, self._family)
            except takeover.RunningError as error:
                if not told:
                    _log.warning("rules of kube-proxy stay", family=self._family.label, reason=str(error))
                told = True
            except Exception as error:  # noqa: BLE001  # likewise
                self._stays("rules of kube-proxy stay", error)
                return
            else:
                for line in done:
                    _log.info(line)
                return
            await asyncio.sleep(RUNS_EVERY)

    def _stays(self, what: str, error: Exception) -> None:
        self._metrics.cleanup_failed(self._family)
        expected = isinstance(error, (DataplaneError, OSError))
        _log.warning(what, family=self._family.label, reason=str(error), exc_info=None if expected else error)
