"""kube-proxy's rules as they were recorded, decoded, against what the objects behind them compute."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from proxy.config.settings import Settings
from proxy.render import render
from proxy.sources.manifest_loading import load
from rules.diff import Drift, Presence, compare
from rules.foreign.comparison import ALLOWANCES, as_held_by, capabilities_of
from rules.foreign.detect import readings
from rules.foreign.gathering import Reading
from rules.forwarding import Family, ForwardingTable, Frontend, Kind, Protocol, parse_address
from tests.builders import networks

RECORDING = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
API_SERVER = Frontend(parse_address("10.96.0.1"), Protocol.TCP, 443)
"""The Service default/kubernetes, which the API server made by itself and objects.yaml doesn't have."""
EXTERNAL_IP = Frontend(parse_address("192.0.2.30"), Protocol.TCP, 80)

FILES = (
    "iptables.iptables-save",
    "iptables.ip6tables-save",
    "iptables-legacy.iptables-save",
    "iptables-legacy.ip6tables-save",
    "nftables.nft",
    "nftables.nft.json",
)


def recorded(name: str) -> Sequence[Reading]:
    return readings((RECORDING / name).read_bytes())


def wanted(mode: str) -> dict[Family, ForwardingTable]:
    settings = Settings(
        mode="nftables" if mode == "nftables" else "iptables",
        hostname_override="node1",
        bind_address="192.168.50.11",
        cluster_cidrs=networks("10.244.0.0/16", "fd00:244::/32"),
        service_cidrs=networks("10.96.0.0/16", "fd00:10:96::/112"),
    )
    rendered = render(load(str(RECORDING / "objects.yaml")), settings, "node1")
    assert rendered.problems == ()
    return {table.family: table for table in rendered.tables}


def drift(reading: Reading, *, configured: bool) -> Drift:
    table = wanted(reading.mode)[reading.table.family]
    held = as_held_by(reading, table, configured=configured)
    return compare(held, reading.table, capabilities_of(reading.mode), but={API_SERVER})


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("configured", [True, False])
def test_rules_decode_to_the_table_that_their_objects_compute(name: str, configured: bool) -> None:
    for reading in recorded(name):
        found = drift(reading, configured=configured)
        # default/kubernetes has an endpoint too, which in iptables mode is marked when it reaches itself (TRF-7).
        others = [each for each in found.hairpins if each.held != "172.31.255.1:7443/TCP"]
        assert [*found.frontends, *found.node, *found.damage, *others] == []


class Remaining(NamedTuple):
    """Something that the rules say otherwise than the objects, and that is set aside before comparing."""

    allowance: str
    mode: str
    family: Family
    what: str
    wanted: str
    held: str


REMAINING = {Remaining("kind", "nftables", Family.IPV4, "kind", "ExternalIP", "LoadBalancer")}
"""All that differs in the recordings without allowances; docs/other-proxies.md lists the allowances for people."""


@pytest.mark.parametrize("name", FILES)
def test_nothing_but_what_is_listed_is_set_aside(name: str) -> None:
    for reading in recorded(name):
        family = reading.table.family
        found = compare(wanted(reading.mode)[family], reading.table, capabilities_of(reading.mode), but={API_SERVER})
        changes = {
            Remaining("kind", reading.mode, family, change.what, change.wanted or "", change.held or "")
            for each in found.frontends
            for change in each.changes
        }
        assert changes == {each for each in REMAINING if (each.mode, each.family) == (reading.mode, family)}
        assert {each.presence for each in found.frontends} <= {Presence.CHANGED}
        assert not found.node


def test_every_allowance_has_its_clause_and_its_line_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "other-proxies.md").read_text()
    assert {each.allowance for each in REMAINING} <= {each.name for each in ALLOWANCES}
    for allowance in ALLOWANCES:
        for clause in allowance.clause.split(", "):
            assert clause in text, f"{allowance.name}: {clause}"


def test_text_and_json_of_nft_say_the_same() -> None:
    assert recorded("nftables.nft") == recorded("nftables.nft.json")


def test_both_kinds_of_iptables_say_the_same() -> None:
    for suffix in ("iptables-save", "ip6tables-save"):
        assert recorded(f"iptables.{suffix}") == recorded(f"iptables-legacy.{suffix}")


def test_both_families_in_one_file_are_told_apart_with_headings_and_without() -> None:
    four, six = ((RECORDING / f"iptables.{each}-save").read_text() for each in ("iptables", "ip6tables"))
    apart = [*recorded("iptables.iptables-save"), *recorded("iptables.ip6tables-save")]
    bare = [re.sub(r"^#.*\n", "", text, flags=re.MULTILINE) for text in (four, six)]
    # Without headings a table with no address in it belongs to those before it: the order of filter and nat stays.
    for texts in ((four, six), bare):
        assert list(readings("".join(texts).encode())) == apart


def test_counters_and_handles_change_nothing() -> None:
    saved = (RECORDING / "iptables.iptables-save").read_text()
    counted = re.sub(r"^-A ", "[12:3456] -A ", saved, flags=re.MULTILINE)
    assert list(readings(counted.encode())) == list(recorded("iptables.iptables-save"))
    listed = (RECORDING / "nftables.nft").read_text()
    handled = re.sub(
        r"^(\t(?:set|map|chain) .*\{|\t\t[a-z].*[a-z0-9\"}])$", r"\1 # handle 7", listed, flags=re.MULTILINE
    )
    assert handled != listed
    assert list(readings(handled.encode())) == list(recorded("nftables.nft"))


@pytest.mark.parametrize("name", ["iptables.iptables-save", "nftables.nft"])
def test_without_comments_the_same_routes_are_read(name: str) -> None:
    text = (RECORDING / name).read_text()
    bare = re.sub(r' (?:-m comment --comment|comment) (?:"[^"]*"|\S+)', "", text)
    (stripped, *_), (whole, *_) = readings(bare.encode()), recorded(name)

    def known(reading: Reading) -> ForwardingTable:
        routes = {
            frontend: msgspec.structs.replace(route, kind=Kind.LOAD_BALANCER)
            if route.kind is Kind.EXTERNAL_IP
            else route
            for frontend, route in reading.table.without_labels().routes.items()
        }
        return msgspec.structs.replace(reading.table, routes=routes)

    assert known(stripped) == known(whole)
    assert EXTERNAL_IP in stripped.vague


def test_the_recordings_have_what_they_are_for() -> None:
    (four,) = recorded("iptables.iptables-save")
    routes = four.table.routes.values()
    assert any(route.affinity for route in routes)
    assert any(route.source_ranges for route in routes)
    assert any(route.local_backends for route in routes)
    assert {route.kind for route in routes} == set(Kind)
    assert four.table.node.loopback_node_ports
    assert four.table.node.health_check_ports
