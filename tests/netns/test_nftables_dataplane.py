"""The nftables dataplane against the kernel: what is written is what is read, and what others do to it shows."""

from __future__ import annotations

import contextlib
import itertools
import random
import re
import subprocess
from collections.abc import Callable, Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rules.dataplane import DataplaneError
from rules.forwarding import (
    Backend,
    Delta,
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Protocol,
    Route,
    SourcePrefix,
    difference,
)
from rules.nftables.dataplane import NftablesDataplane, watch_tables
from tests.netns.isolation import own_network_namespace
from tests.one_of_each import DNS, WEB, backend, one_of_each
from tests.strategies import tables

pytestmark = pytest.mark.netns

FAMILIES = list(Family)


Open = Callable[[Family], NftablesDataplane]


@pytest.fixture
def opened(root: None) -> Iterator[Open]:
    """Opens dataplanes in a network namespace of the test's own."""
    with own_network_namespace(), contextlib.ExitStack() as stack:

        def open_one(family: Family = Family.IPV4) -> NftablesDataplane:
            return stack.enter_context(contextlib.closing(NftablesDataplane(family)))

        yield open_one


@pytest.fixture
def dataplane(opened: Open) -> NftablesDataplane:
    """The IPv4 dataplane in a namespace of the test's own."""
    return opened(Family.IPV4)


def nft(*arguments: str, text: str | None = None) -> str:
    done = subprocess.run(["nft", *arguments], input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_applied_is_what_is_read_with_every_field(family: Family, opened: Open) -> None:
    seen: dict[str, set[object]] = {}
    dataplane = opened(family)

    def note(value: msgspec.Struct) -> None:
        for field in type(value).__struct_fields__:
            got = getattr(value, field)
            seen.setdefault(f"{type(value).__name__}.{field}", set()).add(
                got if not isinstance(got, dict) else bool(got)
            )

    @settings(max_examples=40)
    @given(tables(family))
    def check(table: ForwardingTable) -> None:
        dataplane.sync(table)
        assert dataplane.read() == table
        assert dataplane.sync(table).operations == 0, "a second sync writes something"
        note(table.node)
        for route in table.routes.values():
            note(route)

    check()
    # What a field never leaves at its default shows nothing about it.
    single = {"NodeFacts.loopback_node_ports"} if family is Family.IPV6 else set()
    # Those that this dataplane has no use for; its capabilities say so.
    single |= {"NodeFacts.health_check_ports", "NodeFacts.bound", "NodeFacts.relayed"}
    single |= {"Route.scheduler", "Route.proxy_protocol"}
    assert {name for name, values in seen.items() if len(values) < 2} <= single
    assert set(Kind) == seen["Route.kind"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_reached_by_deltas_is_the_table_applied_at_once(family: Family, opened: Open) -> None:
    dataplane = opened(family)

    @settings(max_examples=30)
    @given(st.lists(tables(family), min_size=2, max_size=4))
    def check(steps: list[ForwardingTable]) -> None:
        dataplane.sync(steps[0])
        for before, after in itertools.pairwise(steps):
            dataplane.apply(difference(before, after))
            assert dataplane.read() == after

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_listing_loads_again_and_reads_the_same(family: Family, opened: Open) -> None:
    dataplane = opened(family)

    @settings(max_examples=8)
    @given(tables(family))
    def check(table: ForwardingTable) -> None:
        # nft refuses comments of more than 128 characters; the longest label has more.
        short = {
            frontend: msgspec.structs.replace(route, label=route.label[:120])
            for frontend, route in table.routes.items()
        }
        table = msgspec.structs.replace(table, routes=short)
        dataplane.sync(table)
        listing = nft("list", "ruleset")
        # Over itself nft takes it too: with every rule twice, which the next sync mends.
        nft("-f", "-", text=listing)
        dataplane.sync(table)
        assert dataplane.read() == table
        nft("-f", "-", text="flush ruleset\n" + listing)
        assert dataplane.read() == table
        assert nft("list", "ruleset") == listing

    check()


EVERYTHING = one_of_each(
    NodeFacts(
        detector=SourcePrefix(Prefix(bytes([10, 244, 0, 0]), 16)),
        node_port_addresses=frozenset({bytes([192, 168, 50, 11])}),
        service_cidrs=(Prefix(bytes([10, 96, 0, 0]), 16),),
    )
)

FOREIGN_EDITS = {
    "one address": lambda: edit_endpoint("10.244.1.2 . 8080", "10.244.9.9 . 8080"),
    "one port": lambda: edit_endpoint("10.244.1.2 . 8080", "10.244.1.2 . 9999"),
    "one count": lambda: edit_count("2"),
    "one backend less": lambda: delete_first("endpoints-tcp"),
    "one flag": lambda: delete_first("node-port-policy-local"),
    "one verdict": lambda: delete_first("drop-node-ports"),
    "one source range": lambda: delete_first("source-ranges-24"),
    "affinity": lambda: delete_first("affinity-600"),
    "a slot": lambda: delete_first("slots"),
    "a hairpin": lambda: delete_first("local-endpoint-pairs"),
    "a ClusterIP": lambda: delete_first("cluster-ips"),
    "a frontend": lambda: delete_first("cluster-ip"),
    "a frontend too many": lambda: nft("add", "element", "ip", "sluice", "reject-frontends", "{ 10.9.9.9 . tcp . 1 }"),
    "a service network": lambda: nft("flush", "set", "ip", "sluice", "service-cidrs"),
    "a node-port address": lambda: nft("add", "element", "ip", "sluice", "node-port-addresses", "{ 10.9.9.9 }"),
    "the detector": lambda: nft("flush", "chain", "ip", "sluice", "internal"),
    "a rule less": lambda: nft("flush", "chain", "ip", "sluice", "nat-postrouting"),
    "a rule more": lambda: nft("add", "rule", "ip", "sluice", "filter-forward", "drop"),
    "a rule before": lambda: nft("insert", "rule", "ip", "sluice", "services", "return"),
    "a chain more": lambda: nft("add", "chain", "ip", "sluice", "intruder"),
    "a set more": lambda: nft("add", "set", "ip", "sluice", "intruder", "{ type ipv4_addr; }"),
    "a count's chain": lambda: nft("flush", "chain", "ip", "sluice", "pick-3"),
    "the switch of the table": lambda: nft("add", "table", "ip", "sluice", "{ flags dormant; }"),
    "everything": lambda: nft("delete", "table", "ip", "sluice"),
    "all elements": lambda: [
        nft("flush", "map", "ip", "sluice", name) for name in ("cluster-ip", "endpoints-tcp", "members")
    ],
}


def listed(name: str) -> list[str]:
    text = nft("list", "set" if name not in MAPS else "map", "ip", "sluice", name)
    _, _, body = text.partition("elements = {")
    return [" ".join(each.split()) for each in body.rpartition("}")[0].rpartition("}")[0].rpartition("}")[0].split(",")]


MAPS = {"cluster-ip", "external", "external-local", "node-port", "node-port-local", "endpoints-tcp", "members", "slots"}


def delete_first(name: str) -> None:
    key = listed(name)[0].split(" comment ")[0].split(" : ")[0]
    nft("delete", "element", "ip", "sluice", name, f"{{ {key} }}")


def edit_endpoint(old: str, new: str) -> None:
    element = next(each for each in listed("endpoints-tcp") if each.endswith(f": {old}"))
    key = element.split(" : ")[0]
    replace("endpoints-tcp", key, f"{key} : {new}")


def replace(name: str, key: str, element: str) -> None:
    nft("-f", "-", text=f"delete element ip sluice {name} {{ {key} }}\nadd element ip sluice {name} {{ {element} }}")


def edit_count(count: str) -> None:
    element = listed("cluster-ip")[0]
    key, _, value = element.rpartition(" : ")
    key = key.split(" comment ")[0]
    wrong = value[:-1] + count
    replace("cluster-ip", key, f"{key} : {wrong}")


@pytest.mark.parametrize("edit", FOREIGN_EDITS)
def test_another_process_edits_and_read_shows_it_and_sync_repairs_it(edit: str, dataplane: NftablesDataplane) -> None:
    dataplane.sync(EVERYTHING)
    assert dataplane.read() == EVERYTHING
    FOREIGN_EDITS[edit]()
    assert dataplane.read() != EVERYTHING
    assert dataplane.sync(EVERYTHING).operations
    assert dataplane.read() == EVERYTHING
    assert not dataplane.sync(EVERYTHING).operations


def test_one_lost_element_is_repaired_by_that_element_alone(dataplane: NftablesDataplane) -> None:
    dataplane.sync(EVERYTHING)
    delete_first("cluster-ips")
    assert dataplane.sync(EVERYTHING).operations == 1


def test_without_comments_the_same_routes_are_read_unlabelled(dataplane: NftablesDataplane) -> None:
    dataplane.sync(EVERYTHING)
    listing = re.sub(r' ?comment "[^"]*"', "", nft("list", "ruleset"))
    nft("-f", "-", text="flush ruleset\n" + listing)
    assert "comment" not in nft("list", "ruleset")
    assert dataplane.read() == EVERYTHING.without_labels()
    dataplane.sync(EVERYTHING)
    assert dataplane.read() == EVERYTHING


def test_the_longest_label_is_kept_whole(dataplane: NftablesDataplane) -> None:
    label = f"{'n' * 63}/{'s' * 63}:{'p' * 63}"
    route = Route(kind=Kind.CLUSTER_IP, backends=frozenset([backend(1)]), label=label)
    dataplane.sync(ForwardingTable(family=Family.IPV4, routes={WEB: route}))
    table = dataplane.read()
    assert table is not None
    assert table.routes[WEB].label == label


def test_a_restart_adopts_what_is_there_and_goes_on(opened: Open) -> None:
    opened(Family.IPV4).sync(EVERYTHING)
    successor = opened(Family.IPV4)
    assert successor.sync(EVERYTHING).operations == 0
    fewer = {
        **EVERYTHING.routes,
        WEB: msgspec.structs.replace(EVERYTHING.routes[WEB], backends=frozenset([backend(9)])),
    }
    successor.apply(Delta(changed={WEB: fewer[WEB]}))
    assert successor.read() == msgspec.structs.replace(EVERYTHING, routes=fewer)


def test_cleanup_removes_our_table_and_nothing_else(dataplane: NftablesDataplane) -> None:
    nft("add", "table", "ip", "other")
    dataplane.sync(EVERYTHING)
    assert dataplane.cleanup()
    assert nft("list", "tables").split() == ["table", "ip", "other"]
    assert dataplane.read() is None
    assert not dataplane.cleanup()


def test_an_apply_on_rules_that_were_changed_meanwhile_fails_whole_and_the_next_sync_mends_it(
    dataplane: NftablesDataplane,
) -> None:
    dataplane.sync(EVERYTHING)
    nft("delete", "table", "ip", "sluice")
    gone = ForwardingTable(family=Family.IPV4, node=EVERYTHING.node)
    with pytest.raises(DataplaneError, match="refused"):
        dataplane.apply(difference(EVERYTHING, gone))
    assert dataplane.read() is None
    dataplane.sync(gone)
    assert dataplane.read() == gone


def test_the_watch_notices_others_and_not_ourselves(dataplane: NftablesDataplane) -> None:
    watch = watch_tables([dataplane])
    dataplane.sync(EVERYTHING)
    dataplane.apply(Delta(removed=frozenset([DNS])))
    nft("add", "table", "ip", "other")
    assert not watch.touched()
    delete_first("cluster-ips")
    assert watch.touched()
    assert not watch.touched()
    nft("flush", "ruleset")
    assert watch.touched()
    watch.close()


def test_more_backends_than_a_list_can_hold_are_cut_and_named(dataplane: NftablesDataplane) -> None:
    many = frozenset(Backend(bytes([10, 244, *divmod(number, 250)]), 8080) for number in range(9000))
    applied = dataplane.sync(
        ForwardingTable(family=Family.IPV4, routes={WEB: Route(kind=Kind.CLUSTER_IP, backends=many, label="a/b")})
    )
    assert applied.notes == ("a/b: 9000 endpoints, of which 8191 are used",)
    table = dataplane.read()
    assert table is not None
    assert len(table.routes[WEB].backends) == 8191


def test_large_tables_are_written_in_one_transaction_and_read_back(dataplane: NftablesDataplane) -> None:
    randomly = random.Random(1)
    routes = {}
    for number in range(2000):
        backends = frozenset(backend(randomly.randrange(1, 250)) for _ in range(4))
        frontend = Frontend(bytes([10, 97, *divmod(number, 250)]), Protocol.TCP, 80)
        routes[frontend] = Route(kind=Kind.CLUSTER_IP, backends=backends, label=f"default/s{number}")
    table = ForwardingTable(family=Family.IPV4, routes=routes)
    dataplane.sync(table)
    assert dataplane.read() == table


def test_a_flushed_table_is_told_in_some_lines(dataplane: NftablesDataplane) -> None:
    """Its chains lack hundreds of rules: the log names the first, and says how many more there are."""
    table = EVERYTHING
    dataplane.sync(table)
    subprocess.run(["nft", "flush", "table", "ip", "sluice"], check=True)
    applied = dataplane.sync(table)
    assert dataplane.read() == table
    *named, more = applied.notes
    assert len(named) == 10
    assert all(re.fullmatch("repaired: chain .* lacks its rule .*", each) for each in named)
    assert re.fullmatch(r"repaired: \d{3} more", more)
