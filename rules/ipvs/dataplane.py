"""The ipvs dataplane: one family's virtual servers, sets, addresses and rules.

A `sync` reads the kernel and writes what differs, in the order of `rules.ipvs.plan`; an `apply` rests on what was
written last, and changes what the delta names.  Connections that are open are never touched: a backend that goes
drains, and is removed by the first `sync` that finds it without connections (IPVS-23, 28).

What the kernel refuses of one frontend (a set that is full, a scheduler that it lacks) leaves that frontend out: the
steps are planned again without it, so that none is opened half.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import msgspec

from rules.dataplane import Applied, Capabilities, DataplaneError, Raw, repairs
from rules.diff import fit
from rules.forwarding import (
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    NodeFacts,
    Prefix,
)
from rules.iptables.programs import Backend
from rules.iptables.watch import OwnWrites, signature
from rules.ipvs import sets
from rules.ipvs.chains import TABLES, Wanted, build, difference
from rules.ipvs.decode import Context, Reading, decode
from rules.ipvs.kernel import Found, Kernel, RefusedError
from rules.ipvs.known import Known
from rules.ipvs.layout import (
    DEFAULT_SCHEDULER,
    NO_STATE,
    Layout,
    addresses_of,
    capabilities,
    joined,
    kernel_scheduler,
)
from rules.ipvs.marks import Numbers, scheme
from rules.ipvs.messages import Timeouts
from rules.ipvs.node import check_scheduler
from rules.ipvs.plan import size, steps
from rules.ipvs.raw import frontends_of, raw_items
from rules.ipvs.sets import Set


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How mode ipvs is configured."""

    scheduler: str | None = ""
    """How servers pick whose Service doesn't say, by the kernel's name; empty: `rr` (IPVS-5).  None: nobody knows, and
    what most servers have is taken for it."""
    excluded: tuple[Prefix, ...] = ()
    """Networks whose virtual servers are left alone, if nobody wants one there (IPVS-24, 25)."""
    timeouts: Timeouts = Timeouts(0, 0, 0)
    """Of connections, in seconds; 0: as they are (IPVS-4)."""


class _LeftOutError(Exception):
    """The kernel refused parts of some frontends, by which it names why."""

    def __init__(self, frontends: Mapping[Frontend, str]) -> None:
        super().__init__()
        self.frontends = frontends


class IpvsDataplane:
    """Mode ipvs of one family, in the network namespace of the thread that opens it."""

    name = "ipvs"

    def __init__(self, family: Family, options: Options | None = None, backend: Backend | None = None) -> None:
        """Of a family, its rules written by iptables-legacy or iptables-nft; None: by the one in use on this node.

        Raises:
            UnavailableError: the kernel or the node lacks something; the message says what.
        """
        self._family = family
        self._options = options or Options()
        self._usual = self._options.scheduler
        self._scheduler = kernel_scheduler(self._usual or "") or DEFAULT_SCHEDULER
        self._kernel = Kernel(family, [each for each in self._options.excluded if _is_of(family, each)], backend)
        self._known: Known | None = None
        self._timeouts_set = False
        self._own_writes = OwnWrites(lambda: _Signature(self._kernel, family))

    @property
    def family(self) -> Family:
        return self._family

    @property
    def backend(self) -> Backend:
        """By which iptables programs rules are written."""
        return self._kernel.backend

    @property
    def capabilities(self) -> Capabilities:
        return capabilities(self._scheduler)

    def read_as(self, writer: Capabilities) -> None:
        """From here on, read what a dataplane of these capabilities has written: its usual scheduler is not guessed."""
        self._usual = writer.usual_scheduler
        self._scheduler = kernel_scheduler(self._usual) or DEFAULT_SCHEDULER

    def check(self) -> None:
        """Ask for the scheduler, which is all that is not known yet; see `rules.dataplane.Dataplane`."""
        check_scheduler(self._kernel.ipvs, self._scheduler, self._family)

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self) -> ForwardingTable | None:
        """The table that the kernel holds; see `rules.dataplane.Dataplane`."""
        with self._own_writes.unwatched():
            found = self._kernel.find()
        return self._decode(found).table if found else None

    def raw(self) -> Raw | None:
        """Rules, sets with their elements, servers; see `rules.dataplane.Dataplane`."""
        with self._own_writes.unwatched():
            found = self._kernel.find()
        if not found:
            return None
        reading = self._decode(found)
        return Raw(reading.table, list(raw_items(self._family, found, reading)))

    def _decode(self, found: Found) -> Reading:
        usual = None if self._usual is None else self._scheduler
        return decode(found.saved, found.state, Context(self._family, usual, found.own), found.damage)

    # --- writing -----------------------------------------------------------------------------------------------

    def sync(self, table: ForwardingTable) -> Applied:
        """Make the kernel hold `table`; see `rules.dataplane.Dataplane`."""
        with self._own_writes.writing():
            self._set_timeouts()
            fitting = fit(msgspec.structs.replace(table, damage=frozenset()), self.capabilities)
            refused: dict[Frontend, str] = {}
            first: ForwardingTable | None = None
            tried = done = 0
            notes: list[str] = []
            while True:
                wanted = _without(fitting, refused)
                found = self._kernel.find()
                reading = self._decode(found) if found else None
                if not tried and reading is not None:
                    first = reading.table
                    notes = repairs(first.damage)
                tried += 1
                try:
                    done += self._write(wanted, found, reading)
                except _LeftOutError as error:
                    refused |= error.frontends
                    continue
                break
            why = {table.routes[frontend].label or str(frontend): reason for frontend, reason in refused.items()}
            return Applied(
                operations=done,
                full=True,
                refused=frozenset(why),
                why_refused=why,
                notes=tuple(notes),
                found=first,
            )

    def _write(self, table: ForwardingTable, found: Found, reading: Reading | None) -> int:
        """Write what makes the kernel hold a table; how many operations that took."""
        self._known = None
        try:
            marks = scheme(table.node.mark)
        except ValueError as error:
            raise DataplaneError(str(error)) from None
        used = {
            marks.number(mark)
            for mark in (
                *(key.mark for key in found.servers),
                *(extra.mark for elements in found.state.elements.values() for extra in elements.values()),
            )
            if mark and marks.is_ours(mark)
        }
        numbers = Numbers(reading.numbers if reading is not None else {}, used)
        layout = Layout(self._family, table.node, numbers, found.own, self._scheduler)
        new = joined(
            layout.state(table.routes, table.hairpins), layout.node(), layout.bound(addresses_of(table.routes))
        )
        if foreign := new.servers.keys() & (found.servers.keys() - found.state.servers.keys()):
            # Somebody else's, at a place that a frontend has now: it is ours from here on.
            found = self._kernel.find(foreign)
        wanted = Wanted(table.node)
        self._kernel.prepare(found)
        planned = steps(found.state, new, found.odd, rules=bool(found.missing) or self._rules_are_due(found, wanted))
        try:
            written = self._kernel.perform(planned, wanted)
        except RefusedError as error:
            owners = {numbers[owner]: owner[0] for owner in layout.owners_of(table.routes)}
            frontends = [frontends_of(each.what, table, owners, marks) for each in error.refused]
            if not all(frontends):
                raise
            raise _LeftOutError(
                {frontend: each.why for each, own in zip(error.refused, frontends, strict=True) for frontend in own}
            ) from error
        numbers.keep(set(layout.owners_of(table.routes)))
        known = Known(table, numbers, found.own, self._scheduler)
        known.draining = set(found.odd.draining)
        known.note(planned)
        self._known = known
        return written + sum(map(size, planned))

    def _rules_are_due(self, found: Found, wanted: Wanted) -> bool:
        try:
            return bool(difference(found.saved, build(wanted, self._family)))
        except ValueError as error:
            raise DataplaneError(str(error)) from None

    def apply(self, delta: Delta) -> Applied:
        """Apply `delta` to what was written last; see `rules.dataplane.Dataplane`."""
        with self._own_writes.writing():
            known, self._known = self._known, None
            if known is None:
                raise DataplaneError("nothing is known of the kernel's servers: a sync must come first")
            facts = known.facts if delta.node is None else delta.node
            fitting = fit(ForwardingTable(family=self._family, node=facts, routes=delta.changed), self.capabilities)
            try:
                planned = known.take(delta, fitting)
            except ValueError as error:
                raise DataplaneError(str(error)) from None
            written = self._kernel.perform(planned, Wanted(known.facts))
            self._known = known
            return Applied(operations=written + sum(map(size, planned)))

    def _set_timeouts(self) -> None:
        """Once, as they are configured (IPVS-4)."""
        if not self._timeouts_set and any(self._options.timeouts):
            self._kernel.ipvs.set_timeouts(self._options.timeouts)
        self._timeouts_set = True

    # --- watching ----------------------------------------------------------------------------------------------

    def disturbed(self) -> bool:
        """Whether something is other than after the last write, or the last call: rules, the sizes of sets, addresses.

        Servers that somebody changes are seen by the next sync, which comes every syncPeriod (IPVS-28).
        """
        return self._own_writes.disturbed()

    # --- the rest ----------------------------------------------------------------------------------------------

    def cleanup(self) -> bool:
        """Remove addresses, servers, rules and sets of ours, the device if it is empty then.

        See `rules.dataplane.Dataplane`.
        """
        with self._own_writes.writing():
            self._known = None
            found = self._kernel.find()
            there = bool(found)
            if there:
                self._kernel.perform(steps(found.state, NO_STATE, found.odd), Wanted(NodeFacts()))
            removed = self._kernel.remove_rules()
            removed |= self._kernel.remove_sets()
            removed |= self._kernel.remove_device()
            return there or removed

    def remove_other(self) -> bool:
        """Remove rules that the other kind of iptables holds, from before a change of kinds; whether there were any.

        Raises:
            DataplaneError: they could not be removed.
        """
        return self._kernel.remove_other_rules()

    def close(self) -> None:
        """Give back sockets; everything else stays."""
        self._own_writes.close()
        self._kernel.close()


class _Signature:
    """Of all that a change by others alters: rules, the sizes of sets, addresses."""

    def __init__(self, kernel: Kernel, family: Family) -> None:
        self._kernel = kernel
        self._family = family
        self._rules = signature(family, kernel.backend, TABLES)

    def take(self) -> Hashable:
        sizes = self._kernel.sets.sizes()
        held = tuple(sizes.get(sets.name(self._family, which)) for which in Set)
        return self._rules.take(), held, self._kernel.device.elsewhere(self._family)

    def close(self) -> None:
        self._rules.close()


def _is_of(family: Family, prefix: Prefix) -> bool:
    return len(prefix.address) == family.address_bytes


def _without(table: ForwardingTable, frontends: Mapping[Frontend, str]) -> ForwardingTable:
    routes = {frontend: route for frontend, route in table.routes.items() if frontend not in frontends}
    return msgspec.structs.replace(table, routes=routes)
