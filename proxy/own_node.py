"""The Node that the agent runs on: what is waited for before anything is said about it, and what ends the agent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection

from proxy import family_check
from proxy.config.settings import Settings
from proxy.logs import get_logger
from proxy.node import Interfaces, eligible, node_ips
from proxy.opening import FatalError
from proxy.sources.base import Resource
from proxy.state import State
from rules.forwarding import Family

_log = get_logger("sluice.agent")

NODE_PATIENCE = 30.0
"""Seconds to wait for the own Node and its addresses before going on without (NOD-3)."""
POD_CIDR_PATIENCE = 300.0
"""Seconds to wait for the Node's podCIDRs in detect-local mode NodeCIDR before giving up (NOD-5)."""


class OwnNode:
    """The agent's own Node, as the state knows it."""

    def __init__(self, name: str, settings: Settings, state: State) -> None:
        """Of a state; only fields of the settings count that no running agent changes."""
        self._name = name
        self._state = state
        self._standalone = bool(settings.manifests)
        self._by_pod_cidrs = settings.detect_local_mode == "NodeCIDR"
        self._pod_cidrs: tuple[str, ...] = ()
        self._changed = asyncio.Event()

    @property
    def eligible(self) -> bool:
        """Whether load balancers may send to it (HC-5); without a cluster a node that nobody describes is."""
        return eligible(self._state.node) or (self._standalone and self._state.node is None)

    def changed(self) -> None:
        """The state changed: whoever waits looks again, and changed podCIDRs end the process (NOD-6)."""
        self._changed.set()
        node = self._state.node
        if not self._by_pod_cidrs or node is None:
            return
        if not self._pod_cidrs:
            self._pod_cidrs = node.spec.pod_cidrs
        elif self._pod_cidrs != node.spec.pod_cidrs:
            _log.error("the Node's podCIDRs changed: ending, to start anew", was=self._pod_cidrs)
            os._exit(1)

    async def wait(self) -> None:
        """Wait until what is said about the node rests on its Node object (NOD-2 to NOD-5).

        Raises:
            FatalError: its podCIDRs are needed, and nobody gives it any.
        """
        if self._standalone:
            return
        await self._until(lambda: self._state.listed(Resource.NODES), None)
        known = await self._until(lambda: bool((node := self._state.node) and node.status.addresses), NODE_PATIENCE)
        if not known:
            _log.error("timed out waiting for the Node and its addresses: going on without", node=self._name)
        if self._by_pod_cidrs and not await self._until(
            lambda: bool((node := self._state.node) and node.spec.pod_cidrs), POD_CIDR_PATIENCE
        ):
            raise FatalError(f'timeout waiting for PodCIDR allocation on node "{self._name}"')

    def check(self, settings: Settings, served: Collection[Family], interfaces: Interfaces) -> None:
        """Tell what of the configuration does not suit the node, now that it is known (CFG-58).

        Raises:
            FatalError: no rules could be right.
        """
        node = self._state.node
        ips = node_ips(node, settings.node_ip_override, interfaces if self._standalone else None)
        pod_cidrs = node.spec.pod_cidrs if node is not None and self._by_pod_cidrs else ()
        for finding in family_check.check(settings, ips, served, pod_cidrs):
            if finding.fatal:
                raise FatalError(finding.sentence)
            tell = _log.info if finding.hint else _log.warning
            tell("configuration", suspect=finding.sentence)

    async def _until(self, condition: Callable[[], bool], seconds: float | None) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while not condition():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True
