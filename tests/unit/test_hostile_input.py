"""Inputs that `make fuzz` found: each ended in an error that nobody had announced, or in no time that anybody has."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from proxy.bundle import checking as bundle_checking
from proxy.bundle import reading as bundle_reading
from proxy.bundle.secrets import without_secrets
from proxy.explain import nftables_chains, passing_nftables, routing
from proxy.explain.passing import Condition, ForeignRule
from proxy.explain.surroundings import ForeignChain, Surroundings
from proxy.sources.credentials import CredentialsError, accept
from rules.dataplane import Capabilities, UnavailableError
from rules.foreign import ipvs_text, kube_proxy_nftables, nft_json
from rules.foreign.removal import removal
from rules.forwarding import Backend, Endpoint, Family, Frontend, Kind, NodeFacts, Prefix, Protocol, Route
from rules.ipvs.device import Device
from rules.netlink.attributes import DONE, ERROR, attribute, be32, message, nested, text
from rules.netlink.conntrack import Flow
from rules.nftables.dataplane import NftablesDataplane
from rules.nftables.expressions import Unknown
from rules.nftables.messages import INTERVAL_END, Element
from rules.nftables.objects import INTERVAL, ListedRule, RuleSpec, SetSpec
from tests.fuzz import kernel
from tests.fuzz.kernel import saying
from tests.fuzz.peers import SEPARATOR, archive_of, file_with
from tests.fuzz.seeds import seeds

ADDRESS = bytes([10, 244, 1, 11])
CUT = b"\x09\0\1\0abc"
"""An attribute of nine bytes, of which there are seven."""


# --- answers of a kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recorded", sorted((Path(kernel.__file__).parent / "recorded").glob("*.txt")), ids=lambda p: p.stem
)
def test_every_conversation_that_was_recorded_is_understood(recorded: Path) -> None:
    targets: dict[str, Callable[[bytes], None]] = {
        "chains": kernel.kernel_chains,
        "device": kernel.kernel_device,
        "flows": kernel.kernel_flows,
        "interfaces": kernel.kernel_interfaces,
        "ipsets": kernel.kernel_ipsets,
        "legacy": kernel.kernel_legacy,
        "local-routes": kernel.kernel_interfaces,
        "routes": kernel.kernel_routes,
        "sockets": kernel.kernel_interfaces,
        "table": kernel.kernel_table,
        "told": kernel.kernel_changes,
    }
    for line in recorded.read_text().split():
        targets[recorded.stem](bytes.fromhex(line))


def test_chains_and_rules_of_others_are_those_that_were_recorded() -> None:
    said = bytes.fromhex((Path(kernel.__file__).parent / "recorded" / "chains.txt").read_text())
    with saying(said):
        found = {str(each): each for each in nftables_chains.read_chains()}
    assert [rule.action for rule in found["inet firewall last"].rules or ()] == ["reject"]
    assert "translated" in {rule.words for rule in found["inet firewall forward"].rules or ()}


def test_an_address_that_is_cut_off_ends_the_list_of_the_nodes_own() -> None:
    whole = message(20, 2, bytes(8) + attribute(1, ADDRESS))
    with saying(whole + message(20, 2, bytes(8) + CUT)):
        assert routing.own_addresses() == [ADDRESS]


def test_a_refusal_without_its_number_says_nothing_of_a_route() -> None:
    with saying(message(ERROR, 0, b"ab")):
        assert routing.ways_to([ADDRESS]) == ({}, {})


def test_a_router_with_half_an_address_is_none() -> None:
    with saying(message(24, 0, bytes(12) + attribute(5, b"ab") + attribute(7, ADDRESS))):
        ways, _ = routing.ways_to([ADDRESS])
    assert ways[ADDRESS] == routing.Way("", ADDRESS, None)


def test_chains_that_cannot_be_understood_are_no_chains() -> None:
    with saying(b"\x11\0\0\0" + bytes(13)):
        assert list(nftables_chains.read_chains()) == []


def test_the_end_of_a_range_of_keys_of_another_length_ends_none() -> None:
    spec = SetSpec("s", key_type=0, key_length=4, flags=INTERVAL)
    elements = [Element(b""), Element(b"\0", flags=INTERVAL_END), Element(ADDRESS)]
    assert passing_nftables.members(elements, spec) == ((ADDRESS, b"\xff" * 4),)


def test_a_range_without_its_ends_is_a_condition_that_nobody_can_tell() -> None:
    rule = ListedRule("f", 1, RuleSpec((Unknown("range", be32(1, 1)),)))
    [condition] = passing_nftables.decode(rule, {}).conditions
    assert condition.what == "other"


def test_a_device_has_whole_addresses() -> None:
    link = message(16, 0, struct.pack("=BxHiII", 0, 0, 7, 1, 0) + nested(18, text(1, "dummy")))
    held = [
        message(20, 2, struct.pack("=BBBBi", 2, 32, 0, 0, 7) + attribute(2, each)) for each in (ADDRESS, b"ab", b"")
    ]
    with saying(link + b"".join(held) + message(DONE, 0, bytes(4))), Device() as device:
        assert device.addresses(Family.IPV4) == frozenset([ADDRESS])


def test_nftables_whose_answers_make_no_sense_cannot_be_used() -> None:
    with saying(message(10 << 8 | 15, 0, bytes(4) + CUT)), pytest.raises(UnavailableError, match="make no sense"):
        NftablesDataplane(Family.IPV4)


# --- logs that go into a bundle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", ["a", "-", "a-", "-a", "token", "-token", "eyJ", "eyJ-", "token='\\", '"'])
def test_a_long_run_of_letters_in_a_log_is_looked_through_once(run: str) -> None:
    """60,000 of them, as of a blob in base 64, once took three minutes: these would take hours."""
    assert without_secrets(f"{run * (600_000 // len(run))} ~ ~").endswith("~")


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("my-secret value", "my-secret [removed]"),
        ("--token-file /x", "--token-file [removed]"),
        ('a.b_token : "c d", e', 'a.b_token : "[removed]", e'),
        ("x-eyJhbGciOi.eyJzdWIi.sig y", "[removed] y"),
        ("monkey: banana", "monkey: banana"),
        ("log: password=abc", 'log: password="[removed]"'),
        (f"{'x' * 100}token{'y' * 100}=abc", f'{"x" * 100}token{"y" * 100}="[removed]"'),
    ],
)
def test_secrets_are_found_by_the_names_of_their_fields(said: str, left: str) -> None:
    assert without_secrets(said) == left


# --- credentials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["https://[10.0.0.1", "https://[df0:1]:6443", "https://a:99999", "https://a:b", "a"])
def test_a_server_that_is_no_address_is_one_line(server: str) -> None:
    for said in ({"server": server}, {"server": "https://10.0.0.1", "proxy_url": server}):
        with pytest.raises(CredentialsError, match=r"neither|not an"):
            accept(msgspec.json.encode(said))


# --- rules of kube-proxy that are removed ----------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_a_comment_with_a_strange_line_break_is_no_rule(end: str) -> None:
    """iptables-save ends lines by one character alone."""
    rule = f'-A PREROUTING -m comment --comment "x{end}-A OUTPUT -j KUBE-SERVICES{end}" -j ACCEPT'
    saved = f"*nat\n:KUBE-SERVICES - [0:0]\n{rule}\nCOMMIT\n"
    assert removal(saved).jumps == 0


def test_a_line_break_in_the_name_of_a_chain_makes_no_second_sentence() -> None:
    table = {"family": "ip", "name": "kube-proxy", "handle": 3}
    element = [{"concat": ["10.96.0.10", "udp", 53]}, {"goto": {"target": "service-2YY5BS5C-kube-system/dns/udp/\ns"}}]
    types = ["ipv4_addr", "inet_proto", "inet_service"]
    map_ = {"family": "ip", "table": "kube-proxy", "name": "service-ips", "type": types, "map": "verdict"}
    listed = [{"metainfo": {"json_schema_version": 1}}, {"table": table}, {"map": {**map_, "elem": [element]}}]
    [parsed] = nft_json.parse(msgspec.json.encode({"nftables": listed}))
    damage = kube_proxy_nftables.decode(parsed).table.damage
    assert any("udp/\\ns" in each for each in damage)
    assert all(each.isprintable() for each in damage)


def test_of_a_real_server_that_stands_twice_the_last_line_counts() -> None:
    where = "-a -t 10.96.0.1:80 -r 10.244.1.1:80"
    for methods, direct in ((("-g", "-m"), False), (("-m", "-g"), True)):
        lines = ["-A -t 10.96.0.1:80 -s rr", *(f"{where} {method} -w 1" for method in methods)]
        [held] = ipvs_text.parse(lines)[0].values()
        assert held.foreign is direct


# --- bundles of strangers --------------------------------------------------------------------------------------------


FRONTEND, BACKEND = Frontend(bytes([10, 96, 0, 1]), Protocol.TCP, 80), Backend(ADDRESS, 80)
ROUTE = Route(kind=Kind.CLUSTER_IP, backends=frozenset([BACKEND]))
TABLE = functools.partial(
    bundle_reading.SavedTable,
    whose="held",
    dataplane="nftables",
    family=Family.IPV4,
    node=NodeFacts(),
    capabilities=Capabilities(),
)
FLOW = Flow(ADDRESS, ADDRESS, 6, 1, 80, ADDRESS, ADDRESS, 80, 1, 8, b"")
CHAIN = ForeignChain("ip", "filter", "FORWARD", forwards=True, drops=False)


def test_what_a_node_held_is_fine() -> None:
    bundle_checking.check_table(TABLE(routes=((FRONTEND, ROUTE),)))
    bundle_checking.check_flow(bundle_reading.SavedFlow(family=Family.IPV4, service="", flow=FLOW, stale=True))


@pytest.mark.parametrize(
    "table",
    [
        TABLE(routes=((FRONTEND._replace(address=b"ab"), ROUTE),)),
        TABLE(routes=((FRONTEND._replace(port=-1), ROUTE),)),
        TABLE(routes=((FRONTEND, msgspec.structs.replace(ROUTE, backends=frozenset([Backend(bytes(16), 80)]))),)),
        TABLE(routes=((FRONTEND, msgspec.structs.replace(ROUTE, source_ranges=(Prefix(ADDRESS, 99),))),)),
        TABLE(hairpins=(Endpoint(b"a", Protocol.TCP, 80),)),
        TABLE(node=NodeFacts(service_cidrs=(Prefix(ADDRESS, -1),))),
    ],
)
def test_a_table_with_half_an_address_is_refused(table: bundle_reading.SavedTable) -> None:
    with pytest.raises(ValueError, match=r"address|network|port"):
        bundle_checking.check_table(table)


@pytest.mark.parametrize("flow", [FLOW._replace(protocol=2), FLOW._replace(source=b""), FLOW._replace(port=1 << 16)])
def test_a_flow_that_no_service_has_is_refused(flow: Flow) -> None:
    with pytest.raises(ValueError, match=r"Protocol|address|port"):
        bundle_checking.check_flow(bundle_reading.SavedFlow(family=Family.IPV4, service="", flow=flow, stale=True))


def test_a_bundle_with_such_a_flow_is_refused_in_one_line() -> None:
    good = seeds("bundle_answers")[0]
    for data, refused in ((good, False), (good.replace(b'"flow":["CmAAAQ=="', b'"flow":["Cg=="'), True)):
        archive = file_with(archive_of(data.split(SEPARATOR)))
        if refused:
            with pytest.raises(bundle_reading.BundleError, match=r"it cannot be read: an address of 1 bytes"):
                bundle_reading.read(archive)
        else:
            assert bundle_reading.read(archive).flows is not None


@pytest.mark.parametrize(
    "node",
    [
        Surroundings(addresses=frozenset([b"abc"])),
        Surroundings(node_ips={Family.IPV6: ADDRESS}),
        Surroundings(ways={ADDRESS: routing.Way("eth0", b"", None)}),
        *(
            Surroundings(chains=(CHAIN._replace(rules=(ForeignRule(1, "drop", (condition,)),)),))
            for condition in (Condition("destination", ("x",)), Condition("port", ("80-x",)), Condition("port", ("",)))
        ),
    ],
)
def test_surroundings_that_no_node_has_are_refused(node: Surroundings) -> None:
    with pytest.raises(ValueError, match=r".+"):
        bundle_checking.check_surroundings(node)
