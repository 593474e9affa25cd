"""Deltas, faults, foreign edits and restarts in any order: after the next sync the kernel holds what is wanted."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from rules.dataplane import DataplaneError
from rules.forwarding import Family, ForwardingTable, Frontend, NodeFacts, difference
from rules.netlink.transaction import NetfilterSocket
from rules.nftables import names
from rules.nftables.dataplane import NftablesDataplane
from rules.nftables.elements import (
    ENDPOINT_MAPS,
    MalformedError,
    frontend_key,
    index_key,
    unpack_frontend,
    unpack_reference,
)
from rules.nftables.layout import TABLE
from rules.nftables.messages import Element, add_elements, delete_elements
from tests.fakes.netlink_faults import Fate, FaultySocket, Lost, Meddle, Refused, Stale, Unsent, refuse_elements
from tests.netns.isolation import own_network_namespace
from tests.strategies import frontends, routes, tables

pytestmark = pytest.mark.netns

_REFERENCES = (names.CLUSTER_IP, names.EXTERNAL, names.EXTERNAL_LOCAL, names.NODE_PORT, names.NODE_PORT_LOCAL)

FATES: st.SearchStrategy[Fate] = st.sampled_from(
    [
        None,
        Stale(),
        Lost(applied=True),
        Lost(applied=False),
        Unsent(errno.ENOBUFS),
        Unsent(errno.EMSGSIZE),
        Unsent(errno.EINTR),
        Refused(errno.ENOMEM),
        Refused(errno.ENOMEM, 0),
        Refused(errno.EEXIST, 0),
        Refused(errno.ENOENT, 1),
        Refused(errno.EBUSY, 0),
    ]
)
EDITS = {
    "the table goes": "delete table {table}",
    "everything goes": "flush ruleset",
    "the switch of the table": "add table {table} {{ flags dormant; }}",
    "a rule more": "add rule {table} filter-forward counter drop",
    "a rule before": "insert rule {table} services return",
    "a strange chain": "add chain {table} intruder\nadd rule {table} services jump intruder",
    "a strange set": "add set {table} intruder {{ type inet_service; flags interval; elements = {{ 5-9 }} ; }}",
    "rules less": "flush chain {table} dispatch",
    "frontends go": "flush map {table} cluster-ip",
    "endpoints go": "flush map {table} endpoints-tcp",
    "slots go": "flush map {table} slots",
    "members go": "flush map {table} members",
    "a count is closed": "flush chain {table} pick-2",
}


class Machine(RuleBasedStateMachine):
    """What the agent does with a dataplane, and what the world does to it."""

    def __init__(self) -> None:
        super().__init__()
        subprocess.run(["nft", "flush", "ruleset"], check=True)
        self.now = 0.0
        self.refused: frozenset[Frontend] = frozenset()
        self.known = False
        """Whether deltas may be applied."""
        self.touched = False
        """Whether somebody did something since the last sync, which may still show."""
        self.dataplane: NftablesDataplane | None = None

    @initialize(family=st.sampled_from(list(Family)))
    def start(self, family: Family) -> None:
        self.family = family
        self.wanted = ForwardingTable(family=family)
        self.witness = NftablesDataplane(family)
        self.restart()
        self.sync()

    @rule()
    def restart(self) -> None:
        """The agent dies, and another one adopts."""
        if self.dataplane is not None:
            self.dataplane.close()
        self.dataplane = NftablesDataplane(self.family, clock=lambda: self.now)
        self.socket = FaultySocket()
        self.socket.take_over(self.dataplane)
        self.known = False

    # --- the wanted table ---

    @rule(data=st.data())
    def another_table(self, data: st.DataObject) -> None:
        self._change(data.draw(tables(self.family)))

    @rule(data=st.data())
    def other_routes(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(frontends(self.family), min_size=1, max_size=3))
        fresh = {frontend: data.draw(routes(self.family, kind)) for frontend, kind in chosen}
        self._change(msgspec.structs.replace(self.wanted, routes={**self.wanted.routes, **fresh}))

    @precondition(lambda self: self.wanted.routes)
    @rule(data=st.data())
    def another_route_where_one_is(self, data: st.DataObject) -> None:
        frontend = data.draw(st.sampled_from(sorted(self.wanted.routes)))
        route = data.draw(routes(self.family, self.wanted.routes[frontend].kind))
        # The same Service: lists are rewritten in place.
        route = msgspec.structs.replace(route, label=self.wanted.routes[frontend].label)
        self._change(msgspec.structs.replace(self.wanted, routes={**self.wanted.routes, frontend: route}))

    @precondition(lambda self: self.wanted.routes)
    @rule(data=st.data())
    def routes_go(self, data: st.DataObject) -> None:
        gone = data.draw(st.frozensets(st.sampled_from(sorted(self.wanted.routes)), min_size=1))
        left = {key: route for key, route in self.wanted.routes.items() if key not in gone}
        self._change(msgspec.structs.replace(self.wanted, routes=left))

    def _change(self, table: ForwardingTable) -> None:
        assert self.dataplane is not None
        before, self.wanted = self.wanted, table
        if not self.known:
            return
        there = None if self.touched else self._elements()
        try:
            self.dataplane.apply(difference(before, table))
        except DataplaneError:
            self.known = False
            return
        if there is not None and not self.touched:
            self._expect_held()
            self._expect_old_answers_lead_somewhere(there, self._elements())

    # --- the world ---

    @rule(fates=st.lists(FATES, max_size=4), where=st.sampled_from(["commits", "commits", "dumps", "requests"]))
    def misbehave(self, fates: list[Fate], where: str) -> None:
        if where != "commits":
            fates = [fate for fate in fates if isinstance(fate, Unsent)]
        getattr(self.socket, where).extend(fates)

    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        among = sorted(self.wanted.routes)
        self.refused = data.draw(st.frozensets(st.sampled_from(among), max_size=2)) if among else frozenset()
        keys = {frontend_key(frontend) for frontend in self.refused}
        self.socket.refuse = refuse_elements(keys, errno.EINVAL) if keys else None

    @rule(edit=st.sampled_from(list(EDITS)), between=st.booleans())
    def edit(self, edit: str, between: bool) -> None:
        """Somebody does something: now, or between a reading and the writing that follows."""
        if between:
            self.socket.commits.append(Meddle(lambda: self._edit(edit)))
        else:
            self._edit(edit)

    def _edit(self, edit: str) -> None:
        # It may fail, as what it edits is not there.
        text = EDITS[edit].format(table=f"{'ip' if self.family is Family.IPV4 else 'ip6'} {TABLE}")
        subprocess.run(["nft", "-f", "-"], input=text, text=True, check=False, capture_output=True)
        self.touched = True

    @rule(data=st.data(), action=st.sampled_from(["delete", "change", "copy"]))
    def edit_an_element(self, data: st.DataObject, action: str) -> None:
        held = self._elements()
        among = sorted((name, key) for name, elements in held.items() for key in elements)
        if not among:
            return
        name, key = data.draw(st.sampled_from(among))
        messages = [] if action == "copy" else delete_elements(self.family, TABLE, name, [key])
        if action != "delete":
            other = data.draw(st.sampled_from(sorted(held[name].values())))
            new = Element(key if action == "change" else bytes(len(key)), other.data)
            messages += add_elements(self.family, TABLE, name, [new])
        with NetfilterSocket() as stranger, contextlib.suppress(Exception):
            stranger.commit(messages)
            self.touched = True

    @rule(seconds=st.sampled_from([0.005, 1.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.now += seconds

    # --- and what must hold ---

    @rule()
    def sync(self) -> None:
        """As often as it fails or is disturbed; every fault is over at some time."""
        assert self.dataplane is not None
        for _ in range(40):
            self.touched = False
            with contextlib.suppress(DataplaneError):
                applied = self.dataplane.sync(self.wanted)
                if not self.touched:  # else the monitor tells, and it is synced again
                    break
        else:
            raise AssertionError("it never succeeds")
        labels = {self.wanted.routes[each].label for each in self.refused & self.wanted.routes.keys()}
        assert applied.refused <= labels
        self.known = True
        self._expect_held(applied.refused)
        if not applied.operations:
            return
        self._behave()
        again = self.dataplane.sync(self.wanted)
        assert again.refused == applied.refused
        assert applied.refused or not again.operations, "a second sync writes something"

    def _behave(self) -> None:
        for fates in (self.socket.commits, self.socket.dumps, self.socket.requests):
            fates.clear()

    def _expect_held(self, refused: frozenset[str] = frozenset()) -> None:
        held = self.witness.read()
        assert held is not None
        if not self.refused:
            assert not refused
            assert held == self.wanted
            return

        # Which of the refused ones were there before they were refused, and stayed, does not matter here.
        def others(table: ForwardingTable) -> ForwardingTable:
            left = {key: route for key, route in table.routes.items() if key not in self.refused}
            return msgspec.structs.replace(table, routes=left)

        assert others(held) == others(self.wanted)

    def _elements(self) -> Mapping[str, Mapping[bytes, Element]]:
        return self.witness._snapshot().elements

    def _expect_old_answers_lead_somewhere(
        self, before: Mapping[str, Mapping[bytes, Element]], after: Mapping[str, Mapping[bytes, Element]]
    ) -> None:
        """A packet that looked a frontend up before the delta finds an endpoint after it."""
        size = self.family.address_bytes
        for name in _REFERENCES:
            for key, element in before.get(name, {}).items():
                try:
                    number, count = unpack_reference(element.data)
                    frontend = unpack_frontend(key, 0 if name in (names.NODE_PORT, names.NODE_PORT_LOCAL) else size)
                except MalformedError:
                    continue
                direct, members = after[ENDPOINT_MAPS[frontend.protocol]], after[names.MEMBERS]
                for index in range(count):
                    found = index_key(number, index)
                    assert found in direct or members[found].data in after[names.SLOTS], f"{frontend}: {index}/{count}"

    @precondition(lambda self: self.touched)
    @invariant()
    def it_can_be_read(self) -> None:
        """Whatever others made of it."""
        self.witness.read()

    def teardown(self) -> None:
        try:
            if self.dataplane is not None:
                self.socket.refuse, self.refused = None, frozenset()
                self.sync()
                self._change(ForwardingTable(family=self.family, node=NodeFacts()))
                self._behave()
                self.sync()
                self.now += 10
                # The garbage is gone with the first delta that is late enough.
                self._change(ForwardingTable(family=self.family, node=NodeFacts(mark=1 << 3)))
                left = {name: list(held) for name, held in self._elements().items() if held}
                assert not left, "garbage stays behind"
        finally:
            if self.dataplane is not None:
                self.witness.close()
                self.dataplane.close()


def test_whatever_happens_the_kernel_holds_what_is_wanted_after_the_next_sync(root: None) -> None:
    with own_network_namespace():
        run_state_machine_as_test(
            Machine,
            settings=settings(settings.get_profile("suite"), max_examples=8, stateful_step_count=16),
        )
