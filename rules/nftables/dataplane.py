"""The nftables dataplane: one family's table in the kernel, read and written through netlink.

Every write is one transaction.  A `sync` rests on what it has read: it is refused, and starts again, if anybody
changed nftables in between.  An `apply` rests on the model of what was written last, so that it reads nothing; if the
kernel holds something else by then, the transaction fails as a whole and a `sync` has to follow.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec

from rules.dataplane import Applied, Capabilities, DataplaneError, UnavailableError
from rules.forwarding import Delta, Family, ForwardingTable, Frontend, NodeFacts, Route, difference
from rules.netlink.attributes import DecodeError
from rules.netlink.transaction import (
    Failure,
    LostAnswerError,
    NetfilterSocket,
    NetlinkError,
    StaleGenerationError,
    TransactionError,
)
from rules.nftables import names
from rules.nftables.adopt import Adopted, facts_of
from rules.nftables.decode import Reading, decode
from rules.nftables.describe import describe_message
from rules.nftables.elements import MAX_COUNT, Batch
from rules.nftables.layout import TABLE, Layout, build
from rules.nftables.messages import Element, add_elements, delete_elements, flush_elements, key_at
from rules.nftables.model import Model, Needs, needs_of
from rules.nftables.monitor import Monitor
from rules.nftables.repair import plan_repair
from rules.nftables.replace import messages_to_delete, messages_to_recreate, messages_to_replace
from rules.nftables.sets import PICK, prefix_elements
from rules.nftables.state import StaticState, read_elements, read_static, state_of

MAX_AFFINITY = (1 << 31) - 1
"""Seconds; more cannot be kept."""

_READ_TRIES = 10
_WRITE_TRIES = 5
_NOT_OURS = frozenset({errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.EINTR, errno.EPERM, errno.ENFILE})
"""Errors that say something about the node, and nothing about the element at which they came up."""


class Snapshot(NamedTuple):
    """All that the kernel holds of our table, at one generation."""

    generation: int
    static: StaticState | None
    adopted: Adopted | None
    elements: Mapping[str, Mapping[bytes, Element]]
    facts_elements: Mapping[str, list[Element]]
    """Those of the sets that hold the node's facts."""

    def decode(self, family: Family) -> Reading | None:
        """The table; None: there is none."""
        if self.static is None or self.adopted is None:
            return None
        return decode(family, self.elements, self.adopted.facts, self.adopted.damage)


class _Written(NamedTuple):
    """What the kernel holds since the last write."""

    model: Model
    static: StaticState
    facts: NodeFacts
    present: Needs


class _Step(NamedTuple):
    """One message of a transaction, and where it comes from."""

    message: bytes
    set: str = ""
    """The set whose elements it adds or deletes; empty for the static part."""


class _Plan(NamedTuple):
    """A transaction."""

    steps: list[_Step]
    operations: int
    """How many objects and elements it adds or deletes."""
    written: _Written
    """What the kernel holds after it."""
    damage: frozenset[str] = frozenset()
    """What it repairs."""

    def applied(self, **others: Any) -> Applied:
        return Applied(operations=self.operations, bytes_sent=sum(len(step.message) for step in self.steps), **others)


class NftablesDataplane:
    """The table `sluice` of one family, in the network namespace of the thread that made this object."""

    name = "nftables"

    def __init__(self, family: Family, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Of a family; `clock` gives monotonic seconds.

        Raises:
            UnavailableError: the node cannot run it; the message says what is missing.
        """
        self._family = family
        self._clock = clock
        self._written: _Written | None = None
        try:
            self._socket = NetfilterSocket()
            self._socket.generation()
        except OSError as error:
            raise UnavailableError(_why_unavailable(error)) from None

    @property
    def family(self) -> Family:
        return self._family

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(loopback_node_ports=self._family is Family.IPV4, max_backends=MAX_COUNT)

    @property
    def port(self) -> int:
        """The netlink port id by which the kernel names us as the cause of changes."""
        return self._socket.port

    # --- reading ---------------------------------------------------------------------------------------------

    def read(self) -> ForwardingTable | None:
        """The table that the kernel holds; see `rules.dataplane.Dataplane`."""
        reading = self._snapshot().decode(self._family)
        return reading.table if reading else None

    def _snapshot(self) -> Snapshot:
        try:
            for _ in range(_READ_TRIES):
                generation = self._socket.generation()
                try:
                    snapshot = self._dump(generation)
                except NetlinkError as error:
                    if error.errno != errno.ENOENT:
                        raise
                    continue  # a set vanished while it was read
                if self._socket.generation() == generation:
                    return snapshot
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"nftables ({self._family.label}) cannot be read: {error}") from error
        raise DataplaneError(f"nftables ({self._family.label}) changed again and again while it was read")

    def _dump(self, generation: int) -> Snapshot:
        static = read_static(self._socket, self._family)
        if static is None:
            return Snapshot(generation, None, None, {}, {})
        facts_elements = {
            name: read_elements(self._socket, self._family, name) if name in static.sets else []
            for name in (names.SERVICE_CIDRS, names.NODE_PORT_ADDRESSES)
        }
        elements = {
            name: {element.key: element for element in read_elements(self._socket, self._family, name)}
            for name in static.sets
            if name not in facts_elements and name not in {names.STICKY, PICK}
        }
        adopted = facts_of(static, facts_elements[names.SERVICE_CIDRS], facts_elements[names.NODE_PORT_ADDRESSES])
        return Snapshot(generation, static, adopted, elements, facts_elements)

    # --- writing ---------------------------------------------------------------------------------------------

    def sync(self, table: ForwardingTable) -> Applied:
        """Make the kernel hold `table`; see `rules.dataplane.Dataplane`."""
        self._written = None
        routes, notes = self._fit(table.routes)
        wanted = msgspec.structs.replace(table, routes=routes)
        refused: dict[Frontend, Route] = {}
        anew = False
        for _ in range(_WRITE_TRIES):
            snapshot = self._snapshot()
            plan = self._plan(snapshot, wanted, anew=anew)
            try:
                self._commit(plan.steps, snapshot.generation)
            except (StaleGenerationError, LostAnswerError):
                continue
            except TransactionError as error:
                culprits = self._culprits(error, plan)
                if culprits:
                    refused |= culprits
                    remaining = {key: route for key, route in wanted.routes.items() if key not in culprits}
                    wanted = msgspec.structs.replace(wanted, routes=remaining)
                    continue
                if anew or not plan.damage:
                    raise self._refusal(error, plan.steps) from error
                anew = True  # what is there is in the way of its own repair
                continue
            self._written = plan.written
            return plan.applied(
                refused=frozenset(route.label for route in refused.values()),
                full=True,
                notes=(*notes, *(f"repaired: {each}" for each in sorted(plan.damage))),
            )
        raise DataplaneError(f"nftables ({self._family.label}) changed again and again while it was written")

    def apply(self, delta: Delta) -> Applied:
        """Apply `delta` to what was written last; see `rules.dataplane.Dataplane`."""
        written, self._written = self._written, None
        if written is None:
            raise DataplaneError("nothing is known of the kernel's table: a sync must come first")
        changed, notes = self._fit(delta.changed)
        facts = written.facts if delta.node is None else delta.node
        needs = needs_of(changed.values())
        steps: list[_Step] = []
        if facts != written.facts or not needs <= written.present:
            present = written.present | needs
            layout = self._layout(facts, present)
            steps += map(_Step, messages_to_replace(written.static, layout).messages)
            written = _Written(written.model, state_of(layout), facts, present)
        if delta.node is not None:
            steps += self._facts_steps(facts, None)
        batch = written.model.plan(msgspec.structs.replace(delta, changed=changed), self._clock())
        plan = _Plan([*steps, *self._element_steps(batch)], len(steps) + len(batch), written)
        try:
            self._commit(plan.steps, None)
        except TransactionError as error:
            raise self._refusal(error, plan.steps) from error
        self._written = written
        return plan.applied(notes=tuple(notes))

    def _plan(self, snapshot: Snapshot, wanted: ForwardingTable, *, anew: bool) -> _Plan:
        """What makes the kernel hold `wanted`; `anew` without regard to what it holds."""
        reading = None if anew else snapshot.decode(self._family)
        needs = needs_of(wanted.routes.values())
        if reading is not None:
            needs |= _held(snapshot, everything=reading.table == wanted)
        layout = self._layout(wanted.node, needs)
        messages, recreated = (
            (messages_to_recreate(layout), True) if anew else messages_to_replace(snapshot.static, layout)
        )
        if reading is None or recreated:
            model = Model(self._family)
            empty = ForwardingTable(family=self._family, node=wanted.node)
            batch = model.plan(difference(empty, wanted), self._clock())
        else:
            batch, model, _ = plan_repair(reading, wanted, self._clock())
        before = [*map(_Step, messages), *self._facts_steps(wanted.node, {} if recreated else snapshot.facts_elements)]
        return _Plan(
            [*before, *self._element_steps(batch)],
            len(before) + len(batch),
            _Written(model, state_of(layout), wanted.node, needs),
            reading.table.damage if reading else frozenset(),
        )

    def _layout(self, facts: NodeFacts, needs: Needs) -> Layout:
        return build(facts, self._family, counts=needs.counts, timeouts=needs.timeouts, lengths=needs.lengths)

    def _facts_steps(self, facts: NodeFacts, held: Mapping[str, list[Element]] | None) -> Iterator[_Step]:
        """The elements of the node's facts, all of them where they differ; `held` None: what is there is not known."""
        wanted = {
            names.SERVICE_CIDRS: prefix_elements(facts.service_cidrs),
            names.NODE_PORT_ADDRESSES: [Element(address) for address in facts.node_port_addresses or ()],
        }
        for name, elements in wanted.items():
            there = None if held is None else {(each.key, each.flags) for each in held.get(name, ())}
            if there == {(each.key, each.flags) for each in elements}:
                continue
            if there != set():
                yield _Step(flush_elements(self._family, TABLE, name))
            for message in add_elements(self._family, TABLE, name, elements):
                yield _Step(message, name)

    def _element_steps(self, batch: Batch) -> Iterator[_Step]:
        for name, keys in batch.deleted.items():
            for message in delete_elements(self._family, TABLE, name, keys):
                yield _Step(message, name)
        for name, elements in batch.added.items():
            for message in add_elements(self._family, TABLE, name, elements.values()):
                yield _Step(message, name)

    def _commit(self, steps: list[_Step], generation: int | None) -> None:
        try:
            self._socket.commit([step.message for step in steps], generation)
        except TransactionError:
            raise
        except OSError as error:
            raise DataplaneError(f"nftables ({self._family.label}) cannot be written: {error}") from error

    def _fit(self, routes: Mapping[Frontend, Route]) -> tuple[Mapping[Frontend, Route], list[str]]:
        """The routes as this dataplane can store them, and what it had to leave out."""
        fitted: dict[Frontend, Route] = {}
        notes: list[str] = []
        for frontend, route in routes.items():
            if len(route.backends) <= MAX_COUNT >= len(route.local_backends or ()) and route.affinity <= MAX_AFFINITY:
                continue
            local = route.local_backends
            fitted[frontend] = msgspec.structs.replace(
                route,
                backends=frozenset(sorted(route.backends)[:MAX_COUNT]),
                local_backends=None if local is None else frozenset(sorted(local)[:MAX_COUNT]),
                affinity=min(route.affinity, MAX_AFFINITY),
            )
            if len(route.backends) > MAX_COUNT:
                notes.append(f"{route.label}: {len(route.backends)} endpoints, of which {MAX_COUNT} are used")
        return ({**routes, **fitted} if fitted else routes), notes

    def _culprits(self, error: TransactionError, plan: _Plan) -> dict[Frontend, Route]:
        """The routes whose elements the kernel refused for their own sake."""
        found: set[Frontend] = set()
        model = plan.written.model
        for failure in error.errors:
            if failure.errno in _NOT_OURS or not 0 <= failure.message < len(plan.steps):
                return {}
            step = plan.steps[failure.message]
            key = key_at(step.message, failure.offset) if step.set else None
            owners = model.owners(step.set, key) if key is not None else frozenset()
            if not owners:
                return {}
            found |= owners
        return {frontend: model.placements[frontend].route for frontend in found if frontend in model.placements}

    def _refusal(self, error: TransactionError, steps: list[_Step]) -> DataplaneError:
        shown = [self._explain(failure, steps) for failure in error.errors[:3]]
        more = f" and {len(error.errors) - 3} more" if len(error.errors) > 3 else ""
        return DataplaneError(
            f"the kernel refused a change of nftables ({self._family.label}): {'; '.join(shown)}{more}"
        )

    def _explain(self, failure: Failure, steps: list[_Step]) -> str:
        reason = os.strerror(failure.errno) + (f" ({failure.text})" if failure.text else "")
        if not 0 <= failure.message < len(steps):
            return reason
        step = steps[failure.message]
        return f"{f'elements of {step.set}' if step.set else describe_message(step.message)}: {reason}"

    # --- the rest --------------------------------------------------------------------------------------------

    def cleanup(self) -> bool:
        """Remove the table; see `rules.dataplane.Dataplane`."""
        self._written = None
        try:
            there = read_static(self._socket, self._family) is not None
        except NetlinkError as error:
            raise DataplaneError(f"nftables ({self._family.label}) cannot be read: {error}") from error
        except DecodeError:
            there = True
        if there:
            steps = [_Step(message) for message in messages_to_delete(self._family)]
            try:
                self._commit(steps, None)
            except TransactionError as error:
                raise self._refusal(error, steps) from error
        return there

    def close(self) -> None:
        self._socket.close()


def watch_tables(dataplanes: Iterable[NftablesDataplane]) -> Monitor:
    """A monitor that becomes readable when somebody else changes nftables.

    Raises:
        OSError: the kernel offers none.
    """
    return Monitor(TABLE, [dataplane.port for dataplane in dataplanes])


def _held(snapshot: Snapshot, *, everything: bool) -> Needs:
    """What stays of the static part beyond what is needed.

    Chains of counts do (LAYOUT.md), and sets for as long as they hold something; `everything` where nothing else is
    to be written, as tidying alone is no reason to.
    """
    assert snapshot.adopted is not None
    if everything:
        return Needs(snapshot.adopted.counts, snapshot.adopted.timeouts, snapshot.adopted.lengths)
    held = {name for name, elements in snapshot.elements.items() if elements}
    return Needs(
        snapshot.adopted.counts,
        frozenset(timeout for timeout in snapshot.adopted.timeouts if names.affinity(timeout) in held),
        frozenset(length for length in snapshot.adopted.lengths if names.source_ranges(length) in held),
    )


def _why_unavailable(error: OSError) -> str:
    if error.errno in (errno.EPERM, errno.EACCES):
        return "nftables needs the capability CAP_NET_ADMIN: run sluice as root"
    if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP):
        return (
            f"this kernel has no nftables over netlink (CONFIG_NF_TABLES, CONFIG_NETFILTER_NETLINK): {error.strerror}"
        )
    return f"nftables cannot be used: {error.strerror}"
