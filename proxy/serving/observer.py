"""What the sync loops tell (`proxy.sync.Observer`), to health and metrics."""

from __future__ import annotations

from collections.abc import Callable

from proxy.serving.health import ProxyHealth
from proxy.serving.metrics import Metrics
from rules.dataplane import Applied
from rules.forwarding import Family


class Observer:
    """Hands every report on to both, and what succeeded to whoever waits for its effects."""

    def __init__(
        self,
        health: ProxyHealth,
        metrics: Metrics,
        on_success: Callable[[Family, Applied], None] = lambda _family, _applied: None,
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._on_success = on_success

    def queued(self, family: Family) -> None:
        """A sync was requested (SYN-2)."""
        self._health.queued(family)
        self._metrics.queued(family)

    def started(self, family: Family) -> None:
        """The family's loop runs from now on (SYN-9, MET-18)."""
        self._health.started(family)
        self._metrics.started(family)

    def succeeded(self, family: Family, seconds: float, applied: Applied) -> None:
        """A sync was applied."""
        self._health.updated(family)
        self._metrics.sync_done(family, seconds, applied)
        self._on_success(family, applied)

    def drifted(self, family: Family, differences: int, *, repaired: bool) -> None:
        """The kernel was read, and held so many things otherwise than they were written."""
        self._metrics.drifted(family, differences, repaired=repaired)

    def failed(self, family: Family, seconds: float) -> None:
        """A sync was not applied: what was queued goes on waiting."""
        self._metrics.sync_failed(family, seconds)
