"""One family's syncs: what is wanted goes to the dataplane, as a delta or as a whole.

A delta is enough for as long as the kernel is known to hold the table before it.  After a start, a failure, an hour,
or when another process touched our rules, the kernel is read and what differs is written (DESIGN 4.2).  The dataplane
blocks, so it is called from a thread.

What differs though the kernel was known is drift.  It is repaired, or with the policy `report` only told: then it stays
until a change of Services cannot be applied on top of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import msgspec

from proxy.config.settings import DriftPolicy
from proxy.desired import Desired
from proxy.logs import SYNCS_VERBOSITY, get_logger
from proxy.report import DriftSeen, LastSync, Syncs
from proxy.runner import Allowance, Periods, Runner
from proxy.state import State
from rules.dataplane import Applied, Dataplane, DataplaneError, Stranger
from rules.diff import Drift, compare, lines, summary
from rules.forwarding import Delta, Family, ForwardingTable, Frontend

_log = get_logger("sluice.sync")


class Observer(Protocol):
    """Who is told about syncs: health and metrics."""

    def queued(self, family: Family) -> None:
        """A sync was requested."""

    def started(self, family: Family) -> None:
        """The family's loop runs from now on."""

    def succeeded(self, family: Family, seconds: float, applied: Applied) -> None:
        """A sync was applied."""

    def failed(self, family: Family, seconds: float) -> None:
        """A sync was not applied."""

    def drifted(self, family: Family, differences: int, *, repaired: bool) -> None:
        """The kernel was read, and held so many things otherwise than they were written; mostly none."""


_SHOWN = 10
"""Lines of a drift that are logged and kept."""


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Let no garbage be collected: reading makes many objects and no cycles, and would set off one collection of all
    that the agent holds after the other.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Ended(NamedTuple):
    """A sync that succeeded, and when."""

    at: float
    seconds: float
    applied: Applied


class _Seen(NamedTuple):
    """A drift, and when it was found."""

    at: float
    drift: Drift
    by: tuple[str, ...]
    repaired: bool


class FamilySync:
    """The sync loop of one family."""

    def __init__(
        self,
        dataplane: Dataplane,
        desired: Desired,
        state: State,
        periods: Periods,
        observer: Observer,
        *,
        policy: DriftPolicy = "repair",
        allowance: Allowance | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._dataplane = dataplane
        self._desired = desired
        self._state = state
        self._observer = observer
        self._policy = policy
        self._allowance = allowance or Allowance()
        self._clock = clock
        self._periods = periods
        self._runner = Runner(self._sync, periods)
        self._known = False
        """Whether the kernel holds the table that the last delta led to, if nobody else touched it."""
        self._touched = asyncio.Event()
        self._answered = asyncio.Event()
        self._strangers: set[Stranger] = set()
        self._doubted = False
        """Whether somebody else may have touched it."""
        self._syncs = self._failures = self._repairs = self._left = 0
        self._error = ""
        self._refused: Mapping[str, str] = {}
        """Labels that the kernel refused, and why."""
        self._refusals = 0
        """Readings in a row that left some out."""
        self._read_again = 0.0
        """When the kernel is read at the latest, however many changes come before."""
        self._last: _Ended | None = None
        self._drift: _Seen | None = None

    @property
    def family(self) -> Family:
        return self._dataplane.family

    @property
    def dataplane(self) -> Dataplane:
        return self._dataplane

    @property
    def at_work(self) -> bool:
        """Whether a sync is computed or written now."""
        return self._runner.at_work

    def statistics(self) -> Syncs:
        now = self._clock()
        last, seen = self._last, self._drift
        return Syncs(
            count=self._syncs,
            pending=self._runner.pending or not self._known,
            failures=self._failures,
            error=self._error,
            last=last
            and LastSync(
                ago=now - last.at,
                seconds=last.seconds,
                full=last.applied.full,
                operations=last.applied.operations,
            ),
            refused=tuple(sorted(self._refused)),
            drift_repairs=self._repairs,
            drift_left=self._left,
            last_drift=seen
            and DriftSeen(
                ago=now - seen.at,
                summary=summary(seen.drift),
                lines=_first_lines(seen.drift),
                by=seen.by,
                repaired=seen.repaired,
            ),
        )

    def configure(self, periods: Periods, policy: DriftPolicy) -> None:
        """Go by other periods, and do something else about drift."""
        self._periods, self._policy = periods, policy
        self._runner.set_periods(periods)

    def request(self) -> None:
        """Something changed."""
        if self._state.synced:
            self._observer.queued(self.family)
            self._runner.request()

    def doubt(self, by: Iterable[Stranger] = ()) -> None:
        """Another process touched our rules: read them, without waiting for the period between syncs."""
        self._strangers.update(by)
        self._touched.set()

    async def run(self) -> None:
        """Sync for ever."""
        self._observer.started(self.family)
        if self._runner.pending:
            self._observer.queued(self.family)  # asked for before: the start is no success of it
        async with asyncio.TaskGroup() as group:
            group.create_task(self._runner.loop(), name=f"syncs {self.family.label}")
            group.create_task(self._attend(), name=f"drift {self.family.label}")

    async def _attend(self) -> None:
        """Have the kernel read when it was touched, as soon as the allowance admits."""
        fighting = False
        while True:
            await self._touched.wait()
            wait = self._allowance.wait(self._clock())
            before, fighting = fighting, wait > 0
            if wait > 0:
                tell = _log.debug if before else _log.warning
                tell(
                    "another process touches our rules again and again",
                    family=self.family.label,
                    by=self._take_strangers(keep=True),
                    next_look=f"in {wait:.1f}s",
                )
                await asyncio.sleep(wait)
            self._touched.clear()
            self._answered.clear()
            self._doubted = True
            if self._state.synced:
                self._observer.queued(self.family)
                self._runner.request(urgent=True)
            await self._answered.wait()

    def _take_strangers(self, *, keep: bool = False) -> tuple[str, ...]:
        names = tuple(sorted(map(str, self._strangers)))
        if not keep:
            self._strangers.clear()
        return names

    async def _sync(self, periodic: bool) -> bool:
        if not self._state.synced:
            return True
        touched, self._doubted = self._doubted, False
        doubted = touched or periodic or self._clock() >= self._read_again
        await self._desired.refresh()
        delta = self._desired.take_delta(self.family)
        known, self._known = self._known, True
        if known and not delta and not doubted:
            self._failures, self._error = 0, ""
            self._observer.succeeded(self.family, 0.0, Applied())
            return not self._refused
        table = None if known and not doubted else self._desired.table(self.family)
        start = self._clock()
        try:
            applied, drift = await self._apply(delta, table, known)
        except Exception as error:  # noqa: BLE001  # see below
            self._known = False
            self._failures += 1
            self._error = str(error) or type(error).__name__
            seconds = self._clock() - start
            self._observer.failed(self.family, seconds)
            # An error of our own making must not end the agent either: the node would lose its next changes too.
            trace = None if isinstance(error, DataplaneError) else error
            _log.error(
                "sync failed", family=self.family.label, seconds=round(seconds, 4), error=str(error), exc_info=trace
            )
            return False
        finally:
            if touched:
                self._allowance.spend(self._clock(), self._clock() - start)
                self._answered.set()
        seconds = self._clock() - start
        self._failures, self._error = 0, ""
        self._observer.succeeded(self.family, seconds, applied)
        if drift is not None:
            self._note_drift(drift, touched=touched)
        if not known:
            self._left = 0
        if applied.full:
            self._note_refused(applied)
        if applied.full or table is not None:
            self._read_again = self._clock() + self._periods.after(self._refusals)
        self._tell(applied, delta, seconds, known)
        return not self._refused

    async def _apply(self, delta: Delta, table: ForwardingTable | None, known: bool) -> tuple[Applied, Drift | None]:
        """What was done and, where the kernel was known and read all the same, the drift.

        Without a table the delta is applied to what the kernel is known to hold.  If it cannot be, then the kernel
        holds something else, or it refuses one Service of the delta: the others must not wait for the next run.
        """
        if table is None:
            try:
                if delta.node is None and delta.size <= self._dataplane.capabilities.at_once:
                    return self._dataplane.apply(delta), None
                return await asyncio.to_thread(self._dataplane.apply, delta), None
            except DataplaneError as error:
                _log.warning("changes not applied: reading what is there", family=self.family.label, error=str(error))
                # The other family's sync may have computed more meanwhile.
                delta = _merged(delta, self._desired.take_delta(self.family))
                table = self._desired.table(self.family)
        return await asyncio.to_thread(self._write, delta, table, known)

    @_without_collections()
    def _write(self, delta: Delta, table: ForwardingTable, known: bool) -> tuple[Applied, Drift | None]:
        """Read the kernel and write what differs; in a thread."""
        dataplane = self._dataplane
        if known and self._policy == "report" and not self._refused:
            drift = _beyond(delta, self._look(table, delta))
            if not delta:
                return Applied(), drift
            with contextlib.suppress(DataplaneError):
                return dataplane.apply(delta), drift
        applied = dataplane.sync(table)
        if not known:
            return applied, None
        drift = compare(table, applied.found, dataplane.capabilities, but=_frontends(delta))
        return applied, _beyond(delta, drift, refused=applied.refused | self._refused.keys())

    def _look(self, table: ForwardingTable, delta: Delta) -> Drift:
        """How the kernel differs; a failure to read it is no reason to write."""
        try:
            held = self._dataplane.read()
        except DataplaneError as error:
            _log.warning("cannot look for drift", family=self.family.label, error=str(error))
            return Drift(family=self.family)
        return compare(table, held, self._dataplane.capabilities, but=_frontends(delta))

    def _note_drift(self, drift: Drift, *, touched: bool) -> None:
        """Count, keep and log what was found when the kernel was read; `touched`: because of another process."""
        repaired = self._policy == "repair"
        by = self._take_strangers()
        self._observer.drifted(self.family, len(drift), repaired=repaired)
        self._left = 0 if repaired else len(drift)
        if not drift:
            if touched:
                _log.debug("another process touched our rules, and nothing differs", family=self.family.label, by=by)
            return
        self._repairs += repaired
        self._drift = _Seen(self._clock(), drift, by, repaired)
        _log.warning(
            "drift repaired" if repaired else "drift left as it is (driftPolicy: report)",
            family=self.family.label,
            what=summary(drift),
            by=by or ("unknown",),
            diff=_first_lines(drift),
        )

    def _tell(self, applied: Applied, delta: Delta, seconds: float, known: bool) -> None:
        """Count and log a sync that succeeded."""
        if not (delta or applied.operations or applied.full):
            return
        self._syncs += 1
        self._last = _Ended(self._clock(), seconds, msgspec.structs.replace(applied, found=None))
        _log.info(
            "synced",
            family=self.family.label,
            full=applied.full,
            changed=len(delta.changed),
            removed=len(delta.removed),
            operations=applied.operations,
            bytes=applied.bytes_sent,
            seconds=round(seconds, 4),
            # A change each second, and mode ipvs' look each 30 s, would be thousands of lines.
            from_verbosity=0 if not known or (applied.full and applied.operations) else SYNCS_VERBOSITY,
        )
        for note in applied.notes:
            _log.warning(note, family=self.family.label)

    def _note_refused(self, applied: Applied) -> None:
        """Name the Services that the kernel refused; they are tried again, later and later."""
        before, self._refused = (
            self._refused,
            {label: applied.why_refused.get(label, "") for label in sorted(applied.refused)},
        )
        self._refusals = self._refusals + 1 if self._refused else 0
        origin = f"kernel {self.family.label}"
        for label in before.keys() - self._refused.keys():
            self._state.trouble(origin, f"Service {label}", None)
        for label, why in self._refused.items():
            self._state.trouble(origin, f"Service {label}", f"the kernel refuses its rules: {why}")
        if self._refused.keys() - before.keys():
            _log.error(
                "the kernel refused Services; the others are served",
                family=self.family.label,
                count=len(self._refused),
                services=list(itertools.islice(self._refused, _SHOWN)),
            )


def _frontends(delta: Delta) -> frozenset[Frontend]:
    return delta.removed.union(delta.changed)


def _merged(first: Delta, then: Delta) -> Delta:
    """Two deltas as one."""
    return Delta(
        changed={**{key: route for key, route in first.changed.items() if key not in then.removed}, **then.changed},
        removed=(first.removed - then.changed.keys()) | then.removed,
        hairpins_added=(first.hairpins_added - then.hairpins_removed) | then.hairpins_added,
        hairpins_removed=(first.hairpins_removed - then.hairpins_added) | then.hairpins_removed,
        node=first.node if then.node is None else then.node,
    )


def _beyond(delta: Delta, drift: Drift, refused: frozenset[str] = frozenset()) -> Drift:
    """A drift without what a delta was about to change anyhow, and without what the kernel refuses or refused."""
    frontends = drift.frontends
    if refused:
        frontends = tuple(each for each in frontends if each.label not in refused)
    return msgspec.structs.replace(
        drift,
        frontends=frontends,
        node=drift.node if delta.node is None else (),
        hairpins=() if delta.hairpins_added or delta.hairpins_removed or refused else drift.hairpins,
    )


def _first_lines(drift: Drift) -> tuple[str, ...]:
    return () if drift.absent else tuple(itertools.islice(lines(drift), _SHOWN))
