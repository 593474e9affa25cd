"""The words of `sluice explain`: whole answers, as people get them.

Each file of tests/data/explain was read and approved by a person.  No test writes them: when words change on purpose,
run the command (the options are here), read what it says, and put it there.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from proxy import cli
from proxy.config.settings import Settings
from proxy.explain import verb
from proxy.explain.gather import Where
from proxy.explain.passing import Condition, ForeignRule
from proxy.explain.surroundings import ForeignChain
from rules.forwarding import Family, parse_address
from tests.fakes.held import NODE, means

DATA = Path(__file__).parents[1] / "data" / "explain"
OPTIONS = ("--proxy-mode=nftables", "--hostname-override=node1", "--cluster-cidr=10.244.0.0/16")

ANSWERS = {
    "service-that-works": (0, "default/web:http"),
    "pod-that-reaches-itself": (0, "10.96.0.41:80", "--from=10.244.1.11"),
    "zones": (0, "default/zonal"),
    "udp-node-port": (0, "192.168.50.11:30053/UDP", "--from=outside"),
    "policies-local-none-here": (1, "default/away"),
    "policy-local-from-the-node": (0, "192.168.50.11:30003", "--from=node"),
    "no-slices": (1, "default/nobody"),
    "no-such-target-port": (1, "default/misnamed"),
    "slices-without-ports": (1, "default/portless"),
    "empty-slices": (1, "default/scaled-down"),
    "no-selector-and-no-slices": (1, "default/forgotten"),
    "policy-local-none-ready-here": (1, "default/sick-here"),
    "none-ready": (1, "10.96.0.46:80", "--from=10.244.1.12"),
    "slices-of-the-other-family": (1, "default/handmade"),
    "source-range-blocks": (1, "203.0.113.47:80", "--from=203.0.113.200"),
    "source-range-blocks-a-pod": (1, "203.0.113.47:80", "--from=10.244.1.11"),
    "source-range-somebody": (0, "203.0.113.47:80"),
    "older-service-has-it": (1, "default/late"),
    "closed-port": (1, "10.96.0.41:8080"),
    "other-protocol": (1, "10.96.0.41:53"),
    "unallocated": (1, "10.96.7.7:80"),
    "node-port-address-not-covered": (1, "192.168.51.11:30001", "--node-addresses=192.168.50.11,192.168.51.11"),
    "node-port-on-loopback": (1, "127.0.0.1:30001", "--from=node"),
    "no-frontend": (1, "198.51.100.7:443"),
    "headless": (1, "default/headless"),
    "external-name": (1, "default/elsewhere"),
    "no-such-service": (1, "default/nothing"),
    "no-such-port": (1, "default/web:8080"),
}

FORWARD = ForeignChain("ip", "filter", "FORWARD", forwards=True, drops=True)
ONE_DROPPED = ForeignRule(5, "drop", (Condition("destination", ("10.244.1.11/32",)), Condition("port", ("80",))))
SOME_REFUSED = ForeignRule(6, "reject", (Condition("source", ("10.244.1.0/25",)), Condition("other", ("mark",))))
SERVICES = ForeignChain("ip", "nat", "KUBE-SERVICES", forwards=False, drops=False)
NODES = {
    "node-that-is-in-order": (0, NODE),
    "node-that-does-not-forward": (1, msgspec.structs.replace(NODE, forwarding={Family.IPV4: False})),
    "forward-policy-drop": (
        0,
        msgspec.structs.replace(NODE, chains=(FORWARD, FORWARD._replace(legacy=True), FORWARD._replace(family="ip6"))),
    ),
    "rules-of-others": (
        0,
        msgspec.structs.replace(NODE, chains=(FORWARD._replace(drops=False, rules=(ONE_DROPPED, SOME_REFUSED)),)),
    ),
    "no-way-to-a-pod": (
        0,
        msgspec.structs.replace(NODE, unreachable={parse_address("10.244.2.11"): "there is no route"}),
    ),
    "legacy-iptables-unread": (0, msgspec.structs.replace(NODE, legacy_tables=("filter",))),
    "other-proxy": (
        0,
        msgspec.structs.replace(
            NODE,
            chains=(SERVICES, SERVICES._replace(name="KUBE-NODEPORTS"), SERVICES._replace(legacy=True)),
            ipvs=True,
        ),
    ),
    "conntrack-full": (1, msgspec.structs.replace(NODE, conntrack=(1000, 1000))),
    "strict-rp-filter": (0, msgspec.structs.replace(NODE, strict_rp_filter=("eth0", "eth1"))),
}
"""What is beside the rules of the node that is asked about `10.96.0.41:80`, from a pod of it."""


@pytest.mark.parametrize("name", ANSWERS)
def test_the_words(name, capsys, monkeypatch):
    monkeypatch.chdir(DATA)
    code, *arguments = ANSWERS[name]
    assert cli.main(["explain", *arguments, "-f", "cluster.yaml", *OPTIONS]) == code
    assert capsys.readouterr().out == (DATA / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", NODES)
def test_the_words_about_the_node(name, capsys):
    code, node = NODES[name]
    where = Where(live=True, run_directory="/nonexistent")
    assert verb.main("10.96.0.41:80", "10.244.1.12", where, Settings(), means=means(node)) == code
    assert capsys.readouterr().out == (DATA / f"{name}.txt").read_text()


def test_every_file_is_an_answer():
    assert {path.stem for path in DATA.glob("*.txt")} == {*ANSWERS, *NODES}
