"""The iptables layout as text: what is encoded is decoded, at once or by deltas, and nothing else passes for it."""

from __future__ import annotations

import contextlib
import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.forwarding import (
    Backend,
    Endpoint,
    Family,
    ForwardingTable,
    Frontend,
    InputInterface,
    InputInterfacePrefix,
    Kind,
    NodeFacts,
    Protocol,
    Refusal,
    Route,
    difference,
)
from rules.iptables import tree as module
from rules.iptables.decode import decode
from rules.iptables.layout import JUMPS, Options
from rules.iptables.model import Model
from rules.iptables.text import FILTER, NAT, TABLES, Ruleset, Saved, TextError, parse, parse_rule, restore_lines
from rules.iptables.tree import LEAF, MAX_DEPTH, Key, Space, Tree
from tests.iptables_tables import tables

FAMILIES = list(Family)
OPTIONS = st.builds(Options, st.booleans(), st.booleans())


def saved(chains: Ruleset) -> str:
    """The chains as iptables-save prints them."""
    lines = []
    for table in TABLES:
        lines.append(f"*{table}")
        lines += [f":{name} - [0:0]" for name in chains[table]]
        lines += [f"-A {jump.chain} {jump.rule.text}" for jump in JUMPS if jump.table == table]
        lines += [rule.line(name) for name, rules in chains[table].items() for rule in rules]
        lines.append("COMMIT")
    return "\n".join(lines) + "\n"


def reread(chains: Ruleset, family: Family) -> ForwardingTable:
    reading = decode(parse(saved(chains)), family)
    assert reading is not None
    return reading.table


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_encoded_is_decoded(family: Family) -> None:
    @settings(max_examples=40)
    @given(tables(family), OPTIONS)
    def check(table: ForwardingTable, options: Options) -> None:
        reading = decode(parse(saved(Model(table, options).chains())), family)
        assert reading is not None
        assert reading.table == table
        assert reading.options == options

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_lead_to_the_chains_of_the_table_made_at_once(family: Family) -> None:
    @settings(max_examples=20)
    @given(st.lists(tables(family, with_node=False), min_size=2, max_size=5), st.booleans())
    def check(steps: list[ForwardingTable], closed: bool) -> None:
        steps = [
            msgspec.structs.replace(
                each, node=NodeFacts(reject_closed_ports=closed, health_check_ports=each.node.health_check_ports)
            )
            for each in steps
        ]
        model = Model(steps[0], Options())
        held = model.chains()
        for before, after in itertools.pairwise(steps):
            for table, chains in model.plan(difference(before, after)).items():
                for name, rules in chains.items():
                    if rules is None:
                        del held[table][name]
                    else:
                        held[table][name] = rules
            assert held == Model(after, Options()).chains() == model.chains()

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_comments_the_same_routes_are_read_unlabelled(family: Family) -> None:
    @settings(max_examples=15)
    @given(tables(family))
    def check(table: ForwardingTable) -> None:
        chains = Model(table, Options()).chains()
        bare = {
            name: {chain: tuple(rule._replace(comment="") for rule in rules) for chain, rules in each.items()}
            for name, each in chains.items()
        }
        assert reread(bare, family) == table.without_labels()

    check()


@settings(max_examples=40)
@given(st.data())
def test_a_rule_more_less_or_elsewhere_is_seen(data: st.DataObject) -> None:
    table = data.draw(tables(Family.IPV4))
    chains = Model(table, Options()).chains()
    places = [(name, chain) for name in TABLES for chain, rules in chains[name].items() if rules]
    name, chain = data.draw(st.sampled_from(places))
    rules = list(chains[name][chain])
    at = data.draw(st.integers(0, len(rules) - 1))
    if data.draw(st.booleans()):
        rules.insert(at, parse_rule("-j ACCEPT"))
    else:
        del rules[at]
    chains[name][chain] = tuple(rules)
    reading = decode(parse(saved(chains)), Family.IPV4)
    assert reading is not None
    # Options are the node's: a rule that they ask for may be there or not.
    assert reading.table != table or reading.options != Options()


LINES = st.one_of(
    st.text(max_size=60),
    st.sampled_from(
        ["*nat", "*filter", "COMMIT", ":SLUICE-S - [0:0]", ":SLUICE-CLUSTER-IP - [0:0]", "-A SLUICE-S -j X"]
    ),
    st.builds(
        "-A {} {}".format,
        st.sampled_from(["SLUICE-S", "SLUICE-N", "SLUICE-H", "SLUICE-R", "SLUICE-SERVICES", "PREROUTING"]),
        st.sampled_from(
            [
                "-d 999.1.1.1/32 -p tcp -m tcp --dport 80 -j SLUICE-CLUSTER-IP",
                "-d 10.96.0.1/32 -p tcp -m tcp --dport 99999 -j SLUICE-CLUSTER-IP",
                "-d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:0",
                "-d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination [::1]:80",
                "-d 10.96.0.1/32 -p tcp -m tcp --dport 80 -g SLUICE-REJECT-NODE-PORT",
                '-p udp -m udp --dport 80 -m comment --comment "a\\\\" -j SLUICE-CLUSTER-IP',
                "-s x -g SLUICE-MARK",
                "-i ? -j RETURN",
                "-j MARK --set-xmark 0xfffffffffffffff/0x0",
            ]
        ),
    ),
)


@settings(max_examples=100)
@given(st.lists(LINES, max_size=30), st.sampled_from(FAMILIES))
def test_no_text_brings_the_decoder_down(lines: list[str], family: Family) -> None:
    with contextlib.suppress(TextError):
        decode(parse("\n".join(lines)), family)


def test_foreign_chains_and_rules_are_passed_over() -> None:
    text = """# Generated by iptables-save v1.8.9 on Mon Jan  1 00:00:00 2024
*raw
:PREROUTING ACCEPT [0:0]
:SLUICE-NOT-A-TABLE-OF-OURS - [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment "mentions -j SLUICE but leads elsewhere" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.1:80
COMMIT
"""
    assert not parse(text)
    assert decode(parse(text), Family.IPV4) is None


def test_an_output_that_ends_early_is_not_taken_for_a_table() -> None:
    with pytest.raises(TextError, match="nat"):
        parse("*nat\n:SLUICE-S - [0:0]\n")
    with pytest.raises(TextError, match="line 2"):
        parse("*nat\n-A SLUICE-S -j RETURN\nCOMMIT\n")


def backend(host: int) -> Backend:
    return Backend(bytes([10, 244, *divmod(host, 250)]), 8080)


def route(count: int, **others: object) -> Route:
    values = {
        "kind": Kind.CLUSTER_IP,
        "backends": frozenset(map(backend, range(count))),
        "label": "default/web",
        **others,
    }
    return Route(**values)  # type: ignore[arg-type]  # fields of a Route


def frontend(number: int, port: int = 80) -> Frontend:
    return Frontend(bytes([10, 96, *divmod(number, 250)]), Protocol.TCP, port)


def chances(rules: list[str]) -> list[float]:
    """How often each of these rules, one after the other, is the one that matches."""
    left, found = 1.0, []
    for rule in rules:
        chance = float(rule.partition("--probability ")[2].partition(" ")[0] or 1)
        found.append(left * chance)
        left *= 1 - chance
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9, 33, 100, 5000])
def test_every_backend_is_drawn_as_often_as_the_others(count: int) -> None:
    table = ForwardingTable(family=Family.IPV4, routes={frontend(1): route(count)})
    chains = Model(table, Options()).chains()[NAT]
    base = next((name for name in chains if name.startswith("SLUICE-CI-") and len(name) == 23), None)
    listing = [rule.text for rule in (chains[base] if base else chains["SLUICE-S"])][1:]
    whole = []
    for text, share in zip(listing, chances(listing), strict=True):
        part = text.partition("-g ")[2]
        whole += [share * each for each in chances([rule.text for rule in chains[part]])] if part else [share]
    assert len(whole) == count
    assert max(abs(each * count - 1) for each in whole) < 1e-3
    assert sum(whole) == pytest.approx(1)


def test_a_packet_meets_few_rules_whichever_service_it_is_for() -> None:
    routes = {frontend(number): route(4) for number in range(10_000)}
    chains = Model(ForwardingTable(family=Family.IPV4, routes=routes), Options()).chains()[NAT]
    met = dict.fromkeys(routes, 0)
    names = {
        rule.partition(" -j SLUICE")[0]: each
        for each in routes
        for rule in [f"-d {each_address(each)}/32 -p tcp -m tcp --dport 80"]
    }

    def walk(chain: str, before: int) -> None:
        for number, rule in enumerate(chains[chain], start=1):
            match, leads, target = rule.text.partition(" -g ")
            if leads:
                walk(target, before + number)
            elif rule.text.endswith("-j SLUICE-CLUSTER-IP"):
                met[names[match.partition(" -j ")[0]]] = before + number

    walk("SLUICE-S", 0)
    assert min(met.values()) > 0
    assert max(met.values()) < LEAF + 50
    assert len(chains) < 3000


def each_address(frontend: Frontend) -> str:
    return ".".join(map(str, frontend.address))


def test_a_change_of_one_of_many_rewrites_one_leaf() -> None:
    routes = {frontend(number): route(4) for number in range(5000)}
    table = ForwardingTable(family=Family.IPV4, routes=routes)
    model = Model(table, Options())
    model.chains()
    after = ForwardingTable(family=Family.IPV4, routes={**routes, frontend(77): route(3)})
    changes = model.plan(difference(table, after))
    assert len(changes[NAT]) == 1
    assert not changes[FILTER]


def test_health_checks_come_and_go_in_their_tree_alone() -> None:
    """IPT-19, TRF-27: a port more rewrites a leaf of the filter table, and no Service."""
    routes = {frontend(number): route(4) for number in range(500)}
    facts = NodeFacts(health_check_ports=frozenset(range(30000, 31000)))
    table = ForwardingTable(family=Family.IPV4, node=facts, routes=routes)
    model = Model(table, Options())
    held = model.chains()
    after = msgspec.structs.replace(
        table, node=msgspec.structs.replace(facts, health_check_ports=facts.health_check_ports ^ {30000, 32767})
    )
    delta = difference(table, after)
    assert model.stands(delta.node)
    assert not model.stands(msgspec.structs.replace(facts, masquerade_all=True))
    changes = model.plan(delta)
    assert not changes[NAT]
    assert set(changes[FILTER]) < {name for name in {*held[FILTER], *changes[FILTER]} if name.startswith("SLUICE-A")}
    assert len(changes[FILTER]) < 5
    assert model.chains() == Model(after, Options()).chains()
    assert max(map(len, model.chains()[FILTER].values())) <= LEAF


def test_many_ports_of_one_address_are_dispatched_by_port() -> None:
    routes = {frontend(1, port): route(2) for port in range(1, 2000)}
    routes[frontend(1)._replace(protocol=Protocol.UDP)] = route(2)
    routes[Frontend(b"", Protocol.TCP, 30000)] = route(2, kind=Kind.NODE_PORT)
    table = ForwardingTable(family=Family.IPV4, routes=routes)
    chains = Model(table, Options()).chains()
    assert max(map(len, chains[NAT].values())) <= LEAF
    assert reread(chains, Family.IPV4) == table


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_never_follow_each_other_deeper_than_nftables_lets_chains(family: Family) -> None:
    size = family.address_bytes
    addresses = {((1 << bit) | low).to_bytes(size) for bit in range(size * 8) for low in range(4)}
    routes = {Frontend(each, Protocol.TCP, port): route(1) for each in addresses for port in (1, 2, 4, 8)}
    routes = {
        each: Route(kind=Kind.CLUSTER_IP, backends=frozenset({Backend(bytes(size), 1)}), label="a/b") for each in routes
    }
    table = ForwardingTable(family=family, routes=routes)
    chains = Model(table, Options()).chains()[NAT]

    def depth(name: str) -> int:
        return 1 + max(
            (depth(rule.text.partition("-g ")[2]) for rule in chains[name] if " -g " in rule.text), default=0
        )

    # Before the root come the base chain and SLUICE-SERVICES, behind a leaf at most three chains of a frontend's own.
    assert depth("SLUICE-S") <= 11


def test_chain_names_fit_where_iptables_keeps_them() -> None:
    table = ForwardingTable(
        family=Family.IPV6,
        routes={
            Frontend(bytes(15) + bytes([n]), Protocol.SCTP, 80): Route(
                kind=Kind.LOAD_BALANCER,
                backends=frozenset(Backend(bytes(14) + bytes([1, m]), 1) for m in range(70)),
                local_backends=frozenset(Backend(bytes(14) + bytes([1, m]), 1) for m in range(40)),
                affinity=5,
                label="a/b",
            )
            for n in range(70)
        },
        hairpins=frozenset(Endpoint(bytes(14) + bytes([n, 1]), Protocol.TCP, 1) for n in range(70)),
    )
    for chains in Model(table, Options()).chains().values():
        assert max(map(len, chains)) <= 28


def test_what_cannot_be_said_is_refused_and_not_written_otherwise() -> None:
    for detector in (
        InputInterface("a b"),
        InputInterface('x" -j ACCEPT'),
        InputInterface("cni+"),
        InputInterfacePrefix("a" * 15),
    ):
        with pytest.raises(ValueError, match="local pods"):
            Model(ForwardingTable(family=Family.IPV4, node=NodeFacts(detector=detector)), Options())


def test_a_label_cannot_break_out_of_its_line() -> None:
    label = 'a/b" -j ACCEPT\n-A INPUT -j ACCEPT\\'
    table = ForwardingTable(
        family=Family.IPV4, routes={frontend(1): Route(kind=Kind.CLUSTER_IP, refusal=Refusal.DROP, label=label)}
    )
    chains = Model(table, Options()).chains()
    lines = list(restore_lines(chains))
    assert not any(line.startswith("-A INPUT") for line in lines)
    assert reread(chains, Family.IPV4).routes[frontend(1)].label == label.replace("\n", "?")


STEPS = st.lists(
    st.tuples(
        st.integers(0, 300), st.sampled_from([0, 1, 64, 65, 128]), st.sampled_from(list(Protocol)), st.integers(0, 60)
    ),
    max_size=60,
)


@pytest.mark.parametrize("deepest", [2, 3, 4, MAX_DEPTH])
def test_a_tree_is_the_same_however_it_came_to_its_keys(deepest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DEPTH", deepest)

    @settings(max_examples=150)
    @given(STEPS)
    def check(steps: list[tuple[int, int, Protocol, int]]) -> None:
        tree = Tree("SLUICE-S", 32)
        known: dict[str, object] = {"SLUICE-S": tree.content("SLUICE-S")}
        held: dict[Key, int] = {}
        for host, net, protocol, weight in steps:
            key = Key(bytes([10, net, host // 256, host % 256]), protocol, 80)
            tree.put(key, weight)
            held[key] = weight
            for name, there in tree.take_changes().items():
                known[name] = tree.content(name) if there else None
        fresh = Tree("SLUICE-S", 32)
        fresh.build({key: weight for key, weight in held.items() if weight})
        wanted = {name: fresh.content(name) for name in fresh.chains()}
        assert {name: content for name, content in known.items() if content is not None} == wanted

    check()


def test_a_key_that_stands_apart_rewrites_the_way_to_it_and_not_the_others() -> None:
    """One pod of another network, among many of one: it comes and goes without the others being written again."""
    tree = Tree("SLUICE-H", 32)
    tree.build({Key(bytes([10, 128, *divmod(number, 250)]), Protocol.TCP, 8080): 1 for number in range(5000)})
    tree.take_changes()
    apart = Key(bytes([10, 192, 0, 1]), Protocol.TCP, 8080)
    before = {name: tree.content(name) for name in tree.chains()}
    tree.put(apart, 1)
    assert len(tree.take_changes()) == 3
    tree.put(apart, 0)
    assert len(tree.take_changes()) == 3
    assert {name: tree.content(name) for name in tree.chains()} == before


def test_every_key_is_matched_by_the_way_to_it() -> None:
    space = Space(32)
    key = Key(bytes([10, 96, 0, 1]), Protocol.UDP, 53)
    number = space.pack(key)
    assert space.unpack(number) == key
    assert space.match(number >> 18, 32) == "-d 10.96.0.1/32"
    assert space.match(number >> 16, 34) == "-d 10.96.0.1/32 -p udp"
    assert space.match(number >> 3, 47) == "-d 10.96.0.1/32 -p udp -m udp --dport 48:55"
    assert Space(0).match(Space(0).pack(key._replace(address=b"")), 18) == "-p udp -m udp --dport 53"


def test_nothing_is_written_where_nothing_changes() -> None:
    assert not list(restore_lines({NAT: {}, FILTER: {}}))
    assert Saved({NAT: {}, FILTER: {}}, ()).jumps == ()
