"""Health: whether every family's syncs keep up (HC-2 to HC-6).

A family is healthy as long as no requested sync has been waiting for more than the timeout, which is twice the sync
period.  The state is pure: both clocks are passed in, the one that dates the answers and the one that measures ages,
so that setting the node's time makes nobody unhealthy.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from rules.forwarding import Family

_NEVER = "0001-01-01T00:00:00Z"
"""How Go prints a time that was never set."""


class Answer(NamedTuple):
    """An answer to a probe."""

    status: int
    body: bytes


class _Family:
    """What is known of one family's syncs."""

    def __init__(self) -> None:
        self.updated: int | None = None
        """When the last sync succeeded or the loop started, in ns since the epoch; None: not started."""
        self.queued: float | None = None
        """Since when a requested sync waits, on the clock for ages; None: none does."""


class ProxyHealth:
    """The health of the proxy, by family, and whether the node is to get new load."""

    def __init__(
        self,
        timeout: float,
        *,
        now: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Healthy while no sync waits for more than `timeout` seconds (`Settings.health_timeout`).

        Args:
            timeout: seconds.
            now: nanoseconds since the epoch, for the dates in answers.
            monotonic: seconds, for ages.
        """
        self._timeout = timeout
        self._now = now
        self._monotonic = monotonic
        self._families: dict[Family, _Family] = {}
        self._eligible = False

    def set_timeout(self, seconds: float) -> None:
        """Healthy while no sync waits for more than this."""
        self._timeout = seconds

    def started(self, family: Family) -> None:
        """The family's sync loop runs: from now on the family counts (SYN-9)."""
        self.updated(family)

    def queued(self, family: Family) -> None:
        """A sync was requested; only the oldest request that waits counts."""
        state = self._families.setdefault(family, _Family())
        if state.queued is None:
            state.queued = self._monotonic()

    def updated(self, family: Family) -> None:
        """A sync succeeded: nothing waits any more."""
        state = self._families.setdefault(family, _Family())
        state.queued = None
        state.updated = self._now()

    def set_eligible(self, eligible: bool) -> None:
        """Whether the node is to get new load (HC-5; `proxy.node.eligible`); false until somebody says so."""
        self._eligible = eligible

    @property
    def eligible(self) -> bool:
        return self._eligible

    def healthy(self, family: Family | None = None) -> bool:
        """Whether a family is healthy, or all are; one that has not started makes nobody unhealthy (HC-3)."""
        states = self._families.values() if family is None else filter(None, [self._families.get(family)])
        now = self._monotonic()
        return all(
            state.queued is None or state.updated is None or now - state.queued < self._timeout for state in states
        )

    def healthz(self) -> Answer:
        """For load balancers: healthy and eligible (HC-4)."""
        return self._answer(healthz=True)

    def livez(self) -> Answer:
        """For the kubelet: healthy, whatever becomes of the node (HC-4)."""
        return self._answer(healthz=False)

    def _answer(self, *, healthz: bool) -> Answer:
        healthy = self.healthy()
        served = healthy and (self._eligible or not healthz)
        now = self._now()
        listed = sorted((each, state.updated) for each, state in self._families.items() if state.updated is not None)
        newest = max((updated for _, updated in listed), default=None)
        body: dict[str, Any] = {"lastUpdated": format_time(now if served else newest), "currentTime": format_time(now)}
        if healthz:
            body["nodeEligible"] = self._eligible
        body["healthy"] = healthy
        if listed:
            body["status"] = {
                family.label: {"lastUpdated": format_time(updated), "healthy": self.healthy(family)}
                for family, updated in listed
            }
        return Answer(200 if served else 503, json.dumps(body, separators=(",", ":")).encode())


def format_time(nanoseconds: int | None) -> str:
    """A time since the epoch as Go prints it in JSON: RFC 3339 in UTC, with nanoseconds without trailing zeros."""
    if nanoseconds is None:
        return _NEVER
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    text = _format_seconds(seconds)
    fraction = f"{rest:09}".rstrip("0")
    return f"{text}.{fraction}Z" if fraction else f"{text}Z"


@functools.lru_cache(maxsize=16)  # an answer has four times, mostly of the same few seconds
def _format_seconds(seconds: int) -> str:
    return dt.datetime.fromtimestamp(seconds, tz=dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")
