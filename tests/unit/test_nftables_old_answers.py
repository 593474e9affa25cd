"""A packet that looked its frontend up before a change finds an endpoint after it (LAYOUT.md: two lookups)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hypothesis import given
from hypothesis import strategies as st

from rules.forwarding import Backend, Delta, Family, ForwardingTable, Frontend, Kind, Protocol, Route, difference
from rules.nftables import names
from rules.nftables.elements import (
    ENDPOINT_MAPS,
    Batch,
    index_key,
    unpack_backend,
    unpack_frontend,
    unpack_reference,
)
from rules.nftables.messages import Element
from rules.nftables.model import GRACE, Model
from tests.strategies import backends

Sets = dict[str, dict[bytes, Element]]
FRONTEND = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80)
NODE_PORT = Frontend(b"", Protocol.TCP, 30080)
BALANCER = Frontend(bytes([203, 0, 113, 1]), Protocol.TCP, 80)
_REFERENCES = (names.CLUSTER_IP, names.EXTERNAL, names.EXTERNAL_LOCAL, names.NODE_PORT, names.NODE_PORT_LOCAL)


@st.composite
def services(draw: st.DrawFn) -> ForwardingTable:
    """One Service, whose endpoints and affinity are others every time."""
    everywhere = draw(st.frozensets(backends(Family.IPV4), min_size=1, max_size=6))
    local = draw(st.none() | st.frozensets(st.sampled_from(sorted(everywhere)), min_size=1))
    affinity = draw(st.sampled_from([0, 600, 10800]))
    common = {"backends": everywhere, "affinity": affinity, "label": "default/web"}
    routes = {
        FRONTEND: Route(kind=Kind.CLUSTER_IP, **common),
        NODE_PORT: Route(kind=Kind.NODE_PORT, local_backends=local, **common),
        BALANCER: Route(kind=Kind.LOAD_BALANCER, local_backends=local, **common),
    }
    chosen = draw(st.frozensets(st.sampled_from(sorted(routes))))
    return ForwardingTable(family=Family.IPV4, routes={key: routes[key] for key in chosen})


def commit(sets: Sets, batch: Batch) -> None:
    for name, keys in batch.deleted.items():
        for key in keys:
            del sets[name][key]
    for name, elements in batch.added.items():
        sets.setdefault(name, {}).update(elements)


def answers(sets: Sets) -> Iterator[tuple[Frontend, int, int]]:
    """What lookups of frontends answer: the frontend, a list, a count."""
    for name in _REFERENCES:
        for key, element in sets.get(name, {}).items():
            yield unpack_frontend(key, len(key) - 8), *unpack_reference(element.data)


def endpoint_at(sets: Mapping[str, Mapping[bytes, Element]], protocol: Protocol, number: int, index: int) -> Backend:
    """What a packet finds that had this answer, and drew this index."""
    key = index_key(number, index)
    direct = sets.get(ENDPOINT_MAPS[protocol], {}).get(key)
    if direct is None:
        direct = sets[names.SLOTS][sets[names.MEMBERS][key].data]
    return unpack_backend(direct.data, Family.IPV4)


@given(st.lists(services(), min_size=2, max_size=8), st.data())
def test_what_an_old_answer_leads_to_is_there_and_lives(steps: list[ForwardingTable], data: st.DataObject) -> None:
    sets: Sets = {}
    model = Model(Family.IPV4)
    held, now = ForwardingTable(family=Family.IPV4), 0.0
    for table in steps:
        before = list(answers(sets))
        commit(sets, model.plan(difference(held, table), now))
        used = {number for _, number, _ in answers(sets)}
        live = {backend for route in table.routes.values() for backend in route.backends}
        old = {backend for route in held.routes.values() for backend in route.backends}
        for frontend, number, count in before:
            found = {endpoint_at(sets, frontend.protocol, number, index) for index in range(count)}
            # A list that nobody uses any more keeps what it had.
            assert found <= (live if number in used else old), f"{frontend}: list {number} of {count}"
        held = table
        now += data.draw(st.sampled_from([0.0, GRACE / 2, 2 * GRACE]))
    commit(sets, model.plan(difference(held, ForwardingTable(family=Family.IPV4)), now))
    commit(sets, model.plan(Delta(), now + 2 * GRACE))
    assert not any(sets.values()), "garbage stays behind"
