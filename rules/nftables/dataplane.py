"""The nftables dataplane: one family's table in the kernel, read and written through netlink.

Every write is one transaction.  A `sync` rests on what it has read: it is refused, and starts again, if anybody
changed nftables in between.  An `apply` rests on the model of what was written last, so that it reads nothing; if the
kernel holds something else by then, the transaction fails as a whole and a `sync` has to follow.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from rules.dataplane import Applied, Capabilities, DataplaneError, Raw, UnavailableError
from rules.forwarding import Delta, Family, ForwardingTable, Frontend, NodeFacts, Route, difference
from rules.netlink.attributes import DecodeError
from rules.netlink.errors import NetlinkError, StaleGenerationError, TransactionError
from rules.netlink.transaction import NetfilterSocket
from rules.nftables import names
from rules.nftables.adopt import Adopted, facts_of
from rules.nftables.attempts import Attempts, Plan, Written
from rules.nftables.decode import Reading, decode
from rules.nftables.elements import MAX_COUNT, Batch
from rules.nftables.layout import TABLE, Layout, build
from rules.nftables.messages import Element, add_elements, delete_elements, flush_elements
from rules.nftables.model import Model
from rules.nftables.monitor import Monitor
from rules.nftables.needs import Needs, needs_of
from rules.nftables.objects import delete_set, get_table
from rules.nftables.raw import raw_items
from rules.nftables.refusals import Step, lacking, refusal
from rules.nftables.repair import plan_repair
from rules.nftables.replace import messages_to_create, messages_to_delete, messages_to_recreate, messages_to_replace
from rules.nftables.sets import PICK, build_sets, prefix_elements
from rules.nftables.state import StaticState, read_elements, read_static, state_of

MAX_AFFINITY = (1 << 31) - 1
"""Seconds; more cannot be kept."""

_AT_ONCE = 300
"""Frontends and backends whose change is worth no thread of its own: some 2 ms."""
_READ_TRIES = 10
_WRITE_TRIES = 10

_SAMPLES = {
    Family.IPV4: NodeFacts(node_port_addresses=frozenset(), loopback_node_ports=True),
    Family.IPV6: NodeFacts(node_port_addresses=frozenset()),
}
"""Facts whose layout has an expression of every kind."""


class Snapshot(NamedTuple):
    """All that the kernel holds of our table, at one generation."""

    generation: int
    static: StaticState | None
    adopted: Adopted | None
    elements: Mapping[str, Mapping[bytes, Element]]
    facts_elements: Mapping[str, list[Element]]
    """Those of the sets that hold the node's facts."""

    def holds_what(self, other: Snapshot) -> bool:
        """Whether our table is the same in both, whatever else has changed between them."""
        return self._replace(generation=other.generation) == other

    def decode(self, family: Family) -> Reading | None:
        """The table; None: there is none."""
        if self.static is None or self.adopted is None:
            return None
        return decode(family, self.elements, self.adopted.facts, self.adopted.damage)


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
        self._written: Written | None = None
        try:
            self._socket = NetfilterSocket()
        except OSError as error:
            raise UnavailableError(_why_unavailable(error)) from None
        try:
            self._socket.generation()
        except (OSError, DecodeError) as error:
            self._socket.close()
            raise UnavailableError(_why_unavailable(error)) from None

    @property
    def family(self) -> Family:
        return self._family

    @property
    def capabilities(self) -> Capabilities:
        # Another program's transaction holds up ours, whichever thread waits for it; those of 10,000 rules take 0.1 s.
        return Capabilities(loopback_node_ports=self._family is Family.IPV4, max_backends=MAX_COUNT, at_once=_AT_ONCE)

    @property
    def port(self) -> int:
        """The netlink port id by which the kernel names us as the cause of changes."""
        return self._socket.port

    def check(self) -> None:
        """Ask whether the kernel has all that the layout needs; see `rules.dataplane.Dataplane`.

        Where our table is there, it has.  Else it is given a table to check, in a transaction whose last message must
        fail: so nothing is applied, nobody is told, and the generation stays.
        """
        with contextlib.suppress(OSError):
            self._socket.request(get_table(self._family, TABLE))
            return
        layout = self._layout(_SAMPLES[self._family], Needs(*(frozenset([1]) for _ in Needs._fields)))
        steps = [*map(Step, messages_to_create(layout)), Step(delete_set(self._family, TABLE, "none-such"))]
        try:
            self._socket.commit([step.message for step in steps])
        except (OSError, DecodeError):
            return  # the first sync says what is wrong
        except TransactionError as error:
            for failure in error.errors:
                feature = lacking(failure, steps, self._family)
                if feature:
                    raise UnavailableError(f"this kernel lacks {feature}, which nftables rules need") from None

    # --- reading ---------------------------------------------------------------------------------------------

    def read(self) -> ForwardingTable | None:
        """The table that the kernel holds; see `rules.dataplane.Dataplane`."""
        reading = self._snapshot().decode(self._family)
        return reading.table if reading else None

    def raw(self) -> Raw | None:
        """The rules and elements themselves; see `rules.dataplane.Dataplane`."""
        snapshot = self._snapshot()
        reading = snapshot.decode(self._family)
        if reading is None or snapshot.static is None:
            return None
        elements = {
            **snapshot.elements,
            **{name: {each.key: each for each in found} for name, found in snapshot.facts_elements.items()},
            PICK: {each.key: each for each in snapshot.static.picks},
        }
        return Raw(reading.table, list(raw_items(snapshot.static, elements, reading.table, reading.model)))

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
        adopted = facts_of(static, facts_elements[names.SERVICE_CIDRS], facts_elements[names.NODE_PORT_ADDRESSES])
        # What somebody else's set holds goes with the set.
        ours = {each.name for each in build_sets(self._family, adopted.timeouts, adopted.lengths)}
        elements = {
            name: {element.key: element for element in read_elements(self._socket, self._family, name)}
            for name in static.sets
            if name in ours and name not in facts_elements and name not in {names.STICKY, PICK}
        }
        return Snapshot(generation, static, adopted, elements, facts_elements)

    # --- writing ---------------------------------------------------------------------------------------------

    def sync(self, table: ForwardingTable) -> Applied:
        """Make the kernel hold `table`; see `rules.dataplane.Dataplane`."""
        self._written = None
        routes, notes = self._fit(table.routes)
        wanted = msgspec.structs.replace(table, routes=routes)
        attempts = Attempts(wanted)
        planned: tuple[Snapshot, Plan] | None = None
        for _ in range(_WRITE_TRIES):
            snapshot = self._snapshot()
            # What came between two tries is most often something else, such as the other family's table.
            if planned is None or not snapshot.holds_what(planned[0]):
                planned = snapshot, self._plan(snapshot, attempts)
            plan = planned[1]
            try:
                self._commit(plan.steps, attempts.generation(snapshot.generation))
            except TransactionError as error:
                attempts.learn(error, plan)
                if not isinstance(error, StaleGenerationError):
                    planned = None
                continue
            self._written = plan.written
            return attempts.applied(plan, notes)
        raise DataplaneError(
            f"nftables ({self._family.label}) cannot be written: {attempts.exhausted()} again and again"
        )

    def apply(self, delta: Delta) -> Applied:
        """Apply `delta` to what was written last; see `rules.dataplane.Dataplane`."""
        written, self._written = self._written, None
        if written is None:
            raise DataplaneError("nothing is known of the kernel's table: a sync must come first")
        changed, notes = self._fit(delta.changed)
        facts = written.facts if delta.node is None else delta.node
        needs = needs_of(changed.values())
        steps: list[Step] = []
        if facts != written.facts or not needs <= written.present:
            present = written.present | needs
            layout = self._layout(facts, present)
            steps += map(Step, messages_to_replace(written.static, layout).messages)
            written = Written(written.model, state_of(layout), facts, present)
        if delta.node is not None:
            steps += self._facts_steps(facts, None)
        batch = written.model.plan(msgspec.structs.replace(delta, changed=changed), self._clock())
        plan = Plan([*steps, *self._element_steps(batch)], len(steps) + len(batch), written)
        try:
            self._commit(plan.steps, None)
        except TransactionError as error:
            raise refusal(error, plan.steps, self._family) from error
        self._written = written
        return plan.applied(notes=tuple(notes))

    def _plan(self, snapshot: Snapshot, attempts: Attempts) -> Plan:
        """What makes the kernel hold what is wanted."""
        wanted, anew = attempts.wanted, attempts.anew
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
        before = [*map(Step, messages), *self._facts_steps(wanted.node, {} if recreated else snapshot.facts_elements)]
        plan = Plan(
            [*before, *self._element_steps(batch, attempts.apart)],
            len(before) + len(batch),
            Written(model, state_of(layout), wanted.node, needs),
            recreated,
            reading.table if reading else None,
        )
        attempts.planned(plan)
        return plan

    def _layout(self, facts: NodeFacts, needs: Needs) -> Layout:
        return build(facts, self._family, counts=needs.counts, timeouts=needs.timeouts, lengths=needs.lengths)

    def _facts_steps(self, facts: NodeFacts, held: Mapping[str, list[Element]] | None) -> Iterator[Step]:
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
                yield Step(flush_elements(self._family, TABLE, name))
            for message in add_elements(self._family, TABLE, name, elements):
                yield Step(message, name)

    def _element_steps(self, batch: Batch, apart: Collection[str] = ()) -> Iterator[Step]:
        """The messages of a batch; those of the sets `apart` have one element each."""
        for name, keys in batch.deleted.items():
            for some_keys in ([key] for key in keys) if name in apart else (keys,):
                for message in delete_elements(self._family, TABLE, name, some_keys):
                    yield Step(message, name)
        for name, elements in batch.added.items():
            for some in ([each] for each in elements.values()) if name in apart else (elements.values(),):
                for message in add_elements(self._family, TABLE, name, some):
                    yield Step(message, name)

    def _commit(self, steps: list[Step], generation: int | None) -> None:
        try:
            self._socket.commit([step.message for step in steps], generation)
        except TransactionError:
            raise
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"nftables ({self._family.label}) cannot be written: {error}") from error

    def _fit(self, routes: Mapping[Frontend, Route]) -> tuple[Mapping[Frontend, Route], list[str]]:
        """The routes as this dataplane can store them, and what it had to leave out."""
        fitted: dict[Frontend, Route] = {}
        notes: list[str] = []
        for frontend, asked in routes.items():
            # Chance alone chooses, and nothing is put into a connection.
            plain = not (asked.scheduler or asked.proxy_protocol)
            route = asked if plain else msgspec.structs.replace(asked, scheduler="", proxy_protocol=False)
            if not plain:
                fitted[frontend] = route
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

    # --- the rest --------------------------------------------------------------------------------------------

    def cleanup(self) -> bool:
        """Remove the table; see `rules.dataplane.Dataplane`."""
        self._written = None
        try:
            there = read_static(self._socket, self._family) is not None
        except OSError as error:
            raise DataplaneError(f"nftables ({self._family.label}) cannot be read: {error}") from error
        except DecodeError:
            there = True
        if there:
            steps = [Step(message) for message in messages_to_delete(self._family)]
            try:
                self._commit(steps, None)
            except TransactionError as error:
                raise refusal(error, steps, self._family) from error
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


def _why_unavailable(error: OSError | DecodeError) -> str:
    if isinstance(error, DecodeError):
        return f"nftables cannot be used, as its answers make no sense: {error}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return "nftables needs the capability CAP_NET_ADMIN: run sluice as root"
    if error.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP):
        return (
            "this kernel has no nftables over netlink (CONFIG_NF_TABLES, CONFIG_NETFILTER_NETLINK): load nf_tables, or "
            f"use another mode: {error.strerror}"
        )
    return f"nftables cannot be used: {error.strerror}"
