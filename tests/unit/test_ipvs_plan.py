"""Mode ipvs without a kernel: tables into sets and servers and back, and what packets meet between two steps."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.forwarding import (
    Backend,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Route,
    SourcePrefix,
    difference,
    parse_prefix,
)
from rules.iptables.text import Saved
from rules.ipvs import chains
from rules.ipvs.chains import JUMPS, Wanted
from rules.ipvs.decode import Context, Reading, decode
from rules.ipvs.known import Known
from rules.ipvs.layout import Layout, State, addresses_of, joined
from rules.ipvs.marks import Numbers
from rules.ipvs.messages import Key, Target
from rules.ipvs.plan import (
    Add,
    Delete,
    NewReal,
    Oddities,
    RemoveReal,
    Serve,
    Step,
    Weigh,
    WriteRules,
    operations,
    steps,
)
from rules.ipvs.sets import Set
from tests.ipvs_model import OWN, Model, destinations, expected, offered, sources, tables, wanted
from tests.one_of_each import one_of_each

WEB = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80)
ONE, TWO = Backend(bytes([10, 244, 1, 1]), 8080), Backend(bytes([10, 244, 1, 2]), 8080)


def read(state: State, table: ForwardingTable) -> Reading:
    saved = Saved(chains.build(Wanted(table.node), table.family), JUMPS)
    return decode(saved, state, Context(table.family, "rr", OWN[table.family]))


def carried_out(model: Model, planned: list[Step]) -> Model:
    for step in planned:
        model.carry_out(step)
    return model


@pytest.mark.parametrize("family", list(Family))
def test_what_is_laid_out_is_what_is_read(family: Family) -> None:
    @settings(max_examples=200)
    @given(tables(family))
    def check(table: ForwardingTable) -> None:
        assert read(wanted(table), table).table == table

    check()


@pytest.mark.parametrize("family", list(Family))
def test_a_kernel_that_holds_what_is_wanted_is_left_alone(family: Family) -> None:
    @given(tables(family))
    def check(table: ForwardingTable) -> None:
        state = wanted(table)
        numbers = read(state, table).numbers
        assert steps(state, wanted(table, Numbers(numbers))) == []

    check()


@pytest.mark.parametrize("family", list(Family))
def test_deltas_lead_where_the_whole_leads(family: Family) -> None:
    """Marks may be others: what is read is compared."""

    @settings(max_examples=150)
    @given(st.lists(tables(family), min_size=2, max_size=4))
    def check(some: list[ForwardingTable]) -> None:
        model = Model(family, some[0].node)
        numbers = Numbers({})
        carried_out(model, steps(State({}, {}, frozenset()), wanted(some[0], numbers)))
        known = Known(some[0], numbers, OWN[family], "rr")
        for before, after in itertools.pairwise(some):
            delta = difference(before, after)
            facts = msgspec.structs.replace(after, routes=delta.changed)
            carried_out(model, known.take(delta, facts))
        assert read(model.state(), some[-1]).table == some[-1]

    check()


FACTS = st.sampled_from(
    [
        NodeFacts(),
        NodeFacts(masquerade_all=True),
        NodeFacts(detector=InputInterface("cni0")),
        NodeFacts(detector=SourcePrefix(Prefix(bytes([10, 244, 0, 0]), 16))),
        NodeFacts(detector=SourcePrefix(Prefix(bytes([10, 244, 0, 0]), 16)), node_port_addresses=OWN[Family.IPV4]),
    ]
)


def on(table: ForwardingTable, facts: NodeFacts) -> ForwardingTable:
    return msgspec.structs.replace(table, node=facts)


@settings(max_examples=300)
@given(tables(Family.IPV4, with_node=False), FACTS)
def test_packets_meet_what_the_table_says(table: ForwardingTable, facts: NodeFacts) -> None:
    table = on(table, facts)
    model = carried_out(Model(Family.IPV4, facts), steps(State({}, {}, frozenset()), wanted(table)))
    for destination in destinations(table):
        for source in sources(Family.IPV4):
            said, met = expected(table, destination, source), model.meets(destination, source)
            if said.how in {"dropped", "rejected"} and len(both_at(table, destination)) > 1:
                continue  # which of two refusals is told is all the same
            assert met == said, (destination, source)


def both_at(table: ForwardingTable, destination: Frontend) -> list[Route]:
    ports = Frontend(b"", destination.protocol, destination.port)
    return [table.routes[each] for each in (destination, ports) if each in table.routes]


def order_holds(old: ForwardingTable, new: ForwardingTable, model: Model, planned: list[Step]) -> None:
    """At no point does anybody get a backend, or keep a source, that neither table says.

    While a policy changes, local pods and the node may be given those of outsiders, as kube-proxy always does.
    """
    family = old.family
    where = [(each, source) for each in destinations(old, new) for source in sources(family)]
    said = {each: [offered(table, *each) for table in (old, new)] for each in where}
    for step in planned:
        for operation in operations(step):
            model.carry_out(operation)
            for each in where:
                met = model.meets(*each)
                for backend in met.backends:
                    fits = [one for one in said[each] if backend in one.backends and met.masqueraded >= one.masqueraded]
                    assert fits, f"{each} gets {backend} (masqueraded: {met.masqueraded}) after {operation}"


@settings(max_examples=300, deadline=None)
@given(tables(Family.IPV4, with_node=False), tables(Family.IPV4, with_node=False), FACTS)
def test_at_every_point_packets_meet_what_the_old_or_the_new_table_says(
    old: ForwardingTable, new: ForwardingTable, facts: NodeFacts
) -> None:
    old, new = on(old, facts), on(new, facts)
    numbers = Numbers({})
    model = carried_out(Model(Family.IPV4, facts), steps(State({}, {}, frozenset()), wanted(old, numbers)))
    delta = difference(old, new)
    known = Known(old, numbers, OWN[Family.IPV4], "rr")
    order_holds(old, new, model, known.take(delta, msgspec.structs.replace(new, routes=delta.changed)))


@settings(max_examples=100, deadline=None)
@given(tables(Family.IPV4, with_node=False), FACTS)
def test_a_start_opens_nothing_before_its_time(table: ForwardingTable, facts: NodeFacts) -> None:
    table = on(table, facts)
    empty = ForwardingTable(family=Family.IPV4, node=facts)
    order_holds(empty, table, Model(Family.IPV4, facts), steps(State({}, {}, frozenset()), wanted(table)))


@settings(max_examples=100, deadline=None)
@given(tables(Family.IPV4, with_node=False), FACTS)
def test_a_clean_up_leaves_nothing_open_without_its_firewall(table: ForwardingTable, facts: NodeFacts) -> None:
    table = on(table, facts)
    empty = ForwardingTable(family=Family.IPV4, node=facts)
    state = wanted(table)
    model = carried_out(Model(Family.IPV4, facts), steps(State({}, {}, frozenset()), state))
    order_holds(table, empty, model, steps(state, State({}, {}, frozenset())))
    assert model.state() == State({}, {}, frozenset())


def test_the_order_of_kinds_of_steps_on_a_start() -> None:
    """Issue 7, point 3."""
    planned = steps(State({}, {}, frozenset()), wanted(one_of_each(NodeFacts())), rules=True)
    kinds = [step.which.name if isinstance(step, Add) else type(step).__name__ for step in planned]
    rules = kinds.index("WriteRules")
    assert {"RANGED", "SOURCES", "CLUSTER_IP", "LOAD_BALANCER", "HAIRPIN"} <= set(kinds[:rules])
    gates = ["NODE_PORT_LOCAL", "LOCAL", "NODE_PORT"]
    assert kinds[rules:] == ["WriteRules", "Serve", *gates, "Serve", "OPEN", "BOUND", "Bind"]
    assert kinds.index("SOURCES") < kinds.index("RANGED")
    assert isinstance(planned[rules], WriteRules)


# --- backends that come and go -------------------------------------------------------------------------------------


def table_of(*backends: Backend, protocol: Protocol = Protocol.TCP) -> ForwardingTable:
    routes = {WEB._replace(protocol=protocol): Route(kind=Kind.CLUSTER_IP, backends=frozenset(backends))}
    return ForwardingTable(family=Family.IPV4, routes=routes)


def changes(old: ForwardingTable, new: ForwardingTable, odd: Oddities = Oddities()) -> list[object]:  # noqa: B008  # frozen
    planned = steps(wanted(old), wanted(new), odd)
    assert all(isinstance(step, Serve) for step in planned)
    return [change for step in planned if isinstance(step, Serve) for change in step.changes]


@pytest.mark.parametrize("protocol", list(Protocol))
def test_a_tcp_backend_drains_and_others_go_at_once(protocol: Protocol) -> None:
    """IPVS-23, B-220."""
    both, one = table_of(ONE, TWO, protocol=protocol), table_of(ONE, protocol=protocol)
    key, two = Key(Family.IPV4, protocol, WEB.address, 80), Target(*TWO)
    leaves = Weigh(key, two, 0) if protocol is Protocol.TCP else RemoveReal(key, two)
    assert changes(both, one) == [leaves]
    assert changes(both, one, Oddities(idle=frozenset({(key, two)}))) == [RemoveReal(key, two)]


def test_a_backend_that_drained_is_removed_and_one_that_returns_is_weighed_again() -> None:
    """IPVS-6, IPVS-22, IPVS-23."""
    key, two = Key(Family.IPV4, Protocol.TCP, WEB.address, 80), Target(*TWO)
    both, one = table_of(ONE, TWO), table_of(ONE)
    draining = Oddities(draining=frozenset({(key, two)}))
    assert changes(one, one, draining) == []
    assert changes(one, one, draining._replace(idle=frozenset({(key, two)}))) == [RemoveReal(key, two)]
    assert changes(one, both, draining) == [Weigh(key, two, 1)]
    assert changes(one, both) == [NewReal(key, two)]


def test_weights_that_somebody_changed_are_reset() -> None:
    """B-217."""
    key = Key(Family.IPV4, Protocol.TCP, WEB.address, 80)
    some = table_of(ONE, TWO)
    odd = Oddities(misweighed=frozenset({(key, Target(*TWO))}))
    assert changes(some, some, odd) == [Weigh(key, Target(*TWO), 1)]


def test_a_change_of_one_endpoint_is_one_message_and_an_endpoint_replaced_two() -> None:
    known = Known(table_of(ONE, TWO), Numbers({}), frozenset(), "rr")
    after = table_of(ONE)
    planned = known.take(difference(table_of(ONE, TWO), after), after)
    assert [len(step[-1]) for step in planned] == [1]


def test_a_source_that_is_admitted_no_longer_is_shut_out_before_new_backends_come() -> None:
    """And one that is new is admitted before, so that what narrows is done once and nobody waits."""

    def ranged(prefix: str, *backends: Backend) -> ForwardingTable:
        kind, sources = Kind.LOAD_BALANCER, (parse_prefix(prefix),)
        route = Route(kind=kind, backends=frozenset(backends), source_ranges=sources)
        return ForwardingTable(family=Family.IPV4, routes={WEB: route})

    planned = steps(wanted(ranged("192.0.2.0/24", ONE)), wanted(ranged("198.51.100.0/24", ONE, TWO)))
    shut_out = [isinstance(step, Delete) and step.which is Set.SOURCES for step in planned]
    admitted = [isinstance(step, Add) and step.which is Set.SOURCES for step in planned]
    served = [isinstance(step, Serve) for step in planned]
    assert [sum(each) for each in (admitted, shut_out, served)] == [1, 1, 1]
    assert admitted.index(True) < shut_out.index(True) < served.index(True)


# --- damage --------------------------------------------------------------------------------------------------------

EVERYTHING = one_of_each(NodeFacts(bound=True, detector=SourcePrefix(Prefix(bytes([10, 244, 0, 0]), 16))))


def test_every_element_less_or_more_is_seen() -> None:
    state = wanted(EVERYTHING)
    for which, elements in state.elements.items():
        for element in elements:
            less = {name: dict(own) for name, own in state.elements.items()}
            del less[which][element]
            found = read(state._replace(elements=less), EVERYTHING).table
            assert found != EVERYTHING, f"{which} without {element}"


def test_every_server_and_backend_less_is_seen() -> None:
    state = wanted(EVERYTHING)
    for key, server in state.servers.items():
        less = {other: each for other, each in state.servers.items() if other != key}
        assert read(state._replace(servers=less), EVERYTHING).table != EVERYTHING
        for real in server.reals:
            fewer = state.servers | {key: server._replace(reals=server.reals - {real})}
            assert read(state._replace(servers=fewer), EVERYTHING).table != EVERYTHING
    for address in state.addresses:
        found = read(state._replace(addresses=state.addresses - {address}), EVERYTHING).table
        assert any("the device lacks" in each for each in found.damage)


def test_who_does_not_know_the_usual_scheduler_takes_the_most_frequent_one() -> None:
    layout = Layout(Family.IPV4, EVERYTHING.node, Numbers({}), OWN[Family.IPV4], "lc")
    parts = layout.state(EVERYTHING.routes, EVERYTHING.hairpins), layout.node()
    state = joined(*parts, layout.bound(addresses_of(EVERYTHING.routes)))
    saved = Saved(chains.build(Wanted(EVERYTHING.node), Family.IPV4), JUMPS)
    for scheduler in (None, "lc"):
        assert decode(saved, state, Context(Family.IPV4, scheduler, OWN[Family.IPV4])).table == EVERYTHING
    assert decode(saved, state, Context(Family.IPV4, "rr", OWN[Family.IPV4])).table != EVERYTHING


def test_every_rule_less_is_seen() -> None:
    saved = Saved(chains.build(Wanted(EVERYTHING.node), Family.IPV4), JUMPS)
    context = Context(Family.IPV4, "rr", OWN[Family.IPV4])
    assert decode(saved, wanted(EVERYTHING), context).table == EVERYTHING
    for table, own in saved.chains.items():
        for name, rules in own.items():
            for place in range(len(rules)):
                less = saved.chains | {table: own | {name: rules[:place] + rules[place + 1 :]}}
                found = decode(saved._replace(chains=less), wanted(EVERYTHING), context).table
                assert found != EVERYTHING, f"{name} without {rules[place].text}"
    for jump in JUMPS:
        fewer = saved._replace(jumps=tuple(each for each in JUMPS if each != jump))
        assert decode(fewer, wanted(EVERYTHING), context).table.damage


def test_without_comments_the_same_routes_are_read_without_labels() -> None:
    state = wanted(EVERYTHING)
    bare = {
        which: {element: extra._replace(comment="") for element, extra in own.items()}
        for which, own in state.elements.items()
    }
    assert read(state._replace(elements=bare), EVERYTHING).table == EVERYTHING.without_labels()
