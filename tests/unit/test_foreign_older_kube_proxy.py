"""Rules of a real kube-proxy 1.20.2 in mode iptables, decoded, against what the same objects compute today."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config.settings import Settings
from proxy.render import render
from proxy.sources.manifest_loading import load
from rules.diff import Drift, compare
from rules.foreign.comparison import as_held_by, capabilities_of
from rules.foreign.detect import readings
from rules.foreign.gathering import Reading
from rules.forwarding import Backend, Family, Kind, Refusal, parse_address
from tests.builders import networks

RECORDING = Path(__file__).parents[1] / "recordings" / "kube-proxy-v1.20.2-iptables"
NEWER = {"default/itp", "default/zoned", "default/drain"}
"""internalTrafficPolicy, zones' hints, endpoints that end but serve: 1.20 knows nothing of them."""
NO_KUBELET = {
    "INPUT of table filter has no rule that leads to KUBE-FIREWALL",
    "OUTPUT of table filter has no rule that leads to KUBE-FIREWALL",
    "KUBE-FIREWALL does not keep others than the node itself from 127.0.0.0/8",
}
"""True where this was recorded: then it was the kubelet that guarded 127.0.0.0/8, and there was none."""


def recorded(name: str) -> Reading:
    [reading] = readings((RECORDING / name).read_bytes())
    return reading


def drift(reading: Reading) -> Drift:
    settings = Settings(
        mode="iptables",
        hostname_override="node1",
        bind_address="192.168.50.11",
        cluster_cidrs=networks("10.244.0.0/16", "fd00:244::/32"),
    )
    rendered = render(load(str(RECORDING / "objects.yaml")), settings, "node1")
    table = next(each for each in rendered.tables if each.family is reading.table.family)
    held = as_held_by(reading, table, configured=True)
    return compare(held, reading.table, capabilities_of(reading.mode))


@pytest.mark.parametrize("name", ["iptables-save", "ip6tables-save"])
def test_what_a_real_1_20_writes_otherwise_is_what_came_later_and_nothing_else(name: str) -> None:
    reading = recorded(name)
    four = reading.table.family is Family.IPV4
    found = drift(reading)
    assert {each.label for each in found.frontends} == (NEWER if four else set())
    assert {each.what for each in found.node} == ({"health-check ports let in"} if four else set())
    assert set(found.damage) == (NO_KUBELET if four else set())


def test_external_ips_of_a_real_1_20_have_their_backends_and_a_note_says_whom_they_do_not_serve() -> None:
    reading = recorded("iptables-save")
    [route] = [each for each in reading.table.routes.values() if each.kind is Kind.EXTERNAL_IP]
    assert route.backends == {Backend(parse_address("10.244.1.13"), 8080)}
    assert route.refusal is None
    [note] = reading.notes
    assert "the node's own connections to an external IP" in note


def test_policy_local_without_local_endpoints_is_dropped_by_the_chain_xlb_of_a_real_1_20() -> None:
    routes = recorded("iptables-save").table.routes.values()
    assert {each.refusal for each in routes if each.label == "default/lbl" and each.kind is not Kind.CLUSTER_IP} == {
        Refusal.DROP
    }
