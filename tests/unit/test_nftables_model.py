"""The model's plans, against a kernel made of dictionaries: no root, no netlink."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rules.forwarding import (
    Backend,
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Protocol,
    Route,
    difference,
)
from rules.nftables import names
from rules.nftables.decode import decode
from rules.nftables.elements import Batch, Placed
from rules.nftables.messages import Element
from rules.nftables.model import GRACE, Model
from rules.nftables.repair import plan_repair
from tests.strategies import deltas, from_nothing

FAMILIES = st.sampled_from(list(Family))


class Kernel:
    """Sets as dictionaries, with the kernel's strictness: what is deleted exists, what is added does not."""

    def __init__(self) -> None:
        self.sets: dict[str, dict[bytes, Element]] = {}

    def commit(self, batch: Batch) -> None:
        for name, keys in batch.deleted.items():
            for key in keys:
                del self.sets[name][key]
        for name, elements in batch.added.items():
            for key, element in elements.items():
                assert key not in self.sets.setdefault(name, {}), f"{key.hex()} is in {name} already"
                self.sets[name][key] = element

    def copy(self) -> dict[str, dict[bytes, Element]]:
        return {name: dict(elements) for name, elements in self.sets.items()}


@given(st.data())
def test_what_is_planned_is_what_is_read_back_after_every_delta(data: st.DataObject) -> None:
    family = data.draw(FAMILIES)
    kernel, model = Kernel(), Model(family)
    held = ForwardingTable(family=family)
    now = 0.0
    for table in data.draw(deltas(family, with_node=False)):
        kernel.commit(model.plan(difference(held, table), now))
        reading = decode(family, kernel.copy(), NodeFacts())
        assert reading.table == table
        assert len(reading.repair) == 0
        held = table
        now += data.draw(st.sampled_from([0.0, 1.0]))


@given(st.data())
def test_a_model_that_was_read_goes_on_like_the_one_that_wrote(data: st.DataObject) -> None:
    family = data.draw(FAMILIES)
    kernel = Kernel()
    held = ForwardingTable(family=family)
    for table in data.draw(deltas(family, with_node=False)):
        model = decode(family, kernel.copy(), NodeFacts()).model
        kernel.commit(model.plan(difference(held, table), 1.0))
        assert decode(family, kernel.copy(), NodeFacts()).table == table
        held = table
    empty = ForwardingTable(family=family)
    model = decode(family, kernel.copy(), NodeFacts()).model
    kernel.commit(model.plan(difference(held, empty), 1.0))
    kernel.commit(model.plan(Delta(), 1.0 + 2 * GRACE))
    assert not any(kernel.sets.values()), "garbage stays behind"


@given(st.data())
def test_any_element_that_is_deleted_changed_or_added_shows_and_is_repaired(data: st.DataObject) -> None:
    family = data.draw(FAMILIES)
    table = data.draw(deltas(family, with_node=False))[0]
    kernel = Kernel()
    kernel.commit(Model(family).plan(from_nothing(table), 0.0))
    present = sorted((name, key) for name, elements in kernel.sets.items() for key in elements)
    if not present:
        return
    name, key = data.draw(st.sampled_from(present))
    element = kernel.sets[name].pop(key)
    action = data.draw(st.sampled_from(["delete", "change"]))
    if action == "change":
        others = sorted({each.data for each in kernel.sets[name].values()} - {element.data})
        if others:
            kernel.sets[name][key] = element._replace(data=data.draw(st.sampled_from(others)))
    reading = decode(family, kernel.copy(), NodeFacts())
    assert reading.table != table
    repair(kernel, reading, table)
    assert decode(family, kernel.copy(), NodeFacts()).table == table


def repair(kernel: Kernel, reading, table: ForwardingTable) -> None:
    """What a dataplane does with a reading."""
    kernel.commit(plan_repair(reading, table, 1.0).batch)


@given(st.data())
def test_without_comments_the_same_routes_are_read_unlabelled(data: st.DataObject) -> None:
    family = data.draw(FAMILIES)
    table = data.draw(deltas(family, with_node=False))[0]
    kernel = Kernel()
    kernel.commit(Model(family).plan(from_nothing(table), 0.0))
    stripped = {
        name: {key: element._replace(comment="") for key, element in elements.items()}
        for name, elements in kernel.sets.items()
    }
    assert decode(family, stripped, NodeFacts()).table == table.without_labels()


WEB = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80)
WEB_NODE_PORT = Frontend(b"", Protocol.TCP, 30080)


def backend(host: int) -> Backend:
    return Backend(bytes([10, 244, 0, host]), 8080)


def service(*hosts: int, affinity: int = 0) -> dict[Frontend, Route]:
    chosen = frozenset(backend(host) for host in hosts)
    return {
        WEB: Route(kind=Kind.CLUSTER_IP, backends=chosen, affinity=affinity, label="default/web"),
        WEB_NODE_PORT: Route(kind=Kind.NODE_PORT, backends=chosen, affinity=affinity, label="default/web"),
    }


def started(*hosts: int, affinity: int = 0) -> tuple[Kernel, Model]:
    kernel, model = Kernel(), Model(Family.IPV4)
    kernel.commit(model.plan(Delta(changed=service(*hosts, affinity=affinity)), 0.0))
    return kernel, model


def test_the_frontends_of_a_service_port_share_one_list() -> None:
    kernel, _ = started(1, 2, 3)
    assert len(kernel.sets[names.ENDPOINTS_TCP]) == 3


def test_one_backend_replaced_is_one_element_deleted_and_one_added() -> None:
    _, model = started(*range(1, 200))
    batch = model.plan(Delta(changed=service(*range(2, 201))), 1.0)
    assert {name: len(keys) for name, keys in batch.deleted.items()} == {names.ENDPOINTS_TCP: 1}
    assert {name: len(keys) for name, keys in batch.added.items()} == {names.ENDPOINTS_TCP: 1}


def test_one_backend_more_is_one_element_and_the_counts() -> None:
    _, model = started(1, 2, 3)
    batch = model.plan(Delta(changed=service(1, 2, 3, 4)), 1.0)
    assert len(batch.added[names.ENDPOINTS_TCP]) == 1
    assert names.ENDPOINTS_TCP not in batch.deleted
    assert len(batch) == 1 + 2 * 2


@pytest.mark.parametrize("gone", [1, 2, 3])
def test_a_list_that_shrinks_keeps_a_live_backend_at_its_last_index_until_the_next_sync(gone: int) -> None:
    kernel, model = started(1, 2, 3)
    left = {1, 2, 3} - {gone}
    kernel.commit(model.plan(Delta(changed=service(*left)), 1.0))
    held = kernel.sets[names.ENDPOINTS_TCP]
    assert len(held) == 3
    assert {element.data[3] for element in held.values()} == left
    kernel.commit(model.plan(Delta(), 1.0 + GRACE / 2))
    assert len(held) == 3
    kernel.commit(model.plan(Delta(), 1.0 + 2 * GRACE))
    assert len(held) == 2


def test_a_slot_stays_with_its_backend_and_is_not_given_to_the_next_one() -> None:
    kernel, model = started(1, 2, 3, affinity=600)
    before = {element.data[3]: key for key, element in kernel.sets[names.SLOTS].items()}
    kernel.commit(model.plan(Delta(changed=service(1, 3, 4, affinity=600)), 1.0))
    after = {element.data[3]: key for key, element in kernel.sets[names.SLOTS].items()}
    assert after[1] == before[1]
    assert after[3] == before[3]
    assert after[4] not in before.values()


def test_garbage_of_another_agent_goes_with_the_first_change_and_is_no_drift() -> None:
    kernel, model = started(1, 2, 3)
    kernel.commit(model.plan(Delta(changed=service(1)), 1.0))
    reading = decode(Family.IPV4, kernel.copy(), NodeFacts())
    assert reading.table.routes == service(1)
    assert len(reading.repair) == 0
    kernel.commit(reading.model.plan(Delta(changed=service(2)), 2.0))
    assert len(kernel.sets[names.ENDPOINTS_TCP]) == 1


def test_a_placed_element_is_replaced_by_deleting_and_adding_it() -> None:
    batch = Batch()
    old, new = Placed("s", Element(b"k", b"1")), Placed("s", Element(b"k", b"2"))
    batch.exchange([old], [new])
    assert batch.deleted == {"s": {b"k": None}}
    assert batch.added == {"s": {b"k": new.element}}
