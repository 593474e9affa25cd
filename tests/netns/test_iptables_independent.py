"""python-iptables reads the legacy IPv4 tables too, and comes to the same rules and the same forwarding as we do.

It is read in a process of its own and installed by `make install-iptables`; docs/iptables.md says why it never writes.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings

from rules.forwarding import (
    Family,
    ForwardingTable,
    Frontend,
    Kind,
    NodeFacts,
    Prefix,
    Route,
    SourcePrefix,
    format_address,
    parse_prefix,
)
from rules.iptables.dataplane import IptablesDataplane
from rules.iptables.programs import available
from rules.iptables.spelling import respell
from rules.iptables.text import PREFIX, TABLES, parse
from tests.iptables_tables import tables
from tests.netns.isolation import own_network_namespace

PODS = parse_prefix("10.244.0.0/16")
NODE = "192.168.50.11"
SOURCES = ("10.244.9.9", NODE, "192.0.2.9")
"""A local pod, the node, and somebody elsewhere."""
FACTS = NodeFacts(detector=SourcePrefix(PODS), loopback_node_ports=True)

Rules = dict[str, list[dict[str, Any]]]


@pytest.fixture
def dataplane(root: None) -> Iterator[IptablesDataplane]:
    if importlib.util.find_spec("iptc") is None:
        pytest.skip("python-iptables is not installed (it is compiled: make install-iptables)")
    if "legacy" not in available(Family.IPV4):
        pytest.skip("iptables-legacy is not installed")
    with own_network_namespace():
        yield IptablesDataplane(Family.IPV4, "legacy")


def independently() -> dict[str, Rules]:
    """What python-iptables reads."""
    program = Path(__file__).with_name("iptc_dump.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    found: dict[str, Rules] = msgspec.json.decode(done.stdout)
    return found


# --- the same rules ----------------------------------------------------------------------------------------------


def line(rule: dict[str, Any]) -> str:
    """A rule as text, in our spelling and without its comment."""
    words = []
    for option, value in (("-s", rule["source"]), ("-d", rule["destination"]), ("-i", rule["interface"])):
        if value:
            words += [*(["!"] if value.startswith("!") else []), option, value.removeprefix("!")]
    if rule["protocol"] != "ip":
        words += ["-p", rule["protocol"]]
    for name, parameters in rule["matches"]:
        if name != "comment":
            words += ["-m", name, *options(parameters)]
    if rule["target"]:  # one without counts, and does nothing
        words += ["-g" if rule["goto"] else "-j", rule["target"], *options(rule["parameters"])]
    return respell(" ".join(words))


def options(parameters: dict[str, list[str]]) -> Iterator[str]:
    for name, values in parameters.items():
        negated = values[:1] == ["!"]
        yield from ["!"] if negated else []
        yield from [f"--{name}", *values[negated:]]


def comment(rule: dict[str, Any]) -> str:
    return next((parameters["comment"][0] for name, parameters in rule["matches"] if name == "comment"), "")


# --- the same forwarding -------------------------------------------------------------------------------------------


class Packet(NamedTuple):
    """The first one of a connection from elsewhere on the network, or from a pod or the node."""

    source: str
    destination: str
    protocol: str
    port: int


class End(NamedTuple):
    """What may become of a packet in the nat table."""

    translated: str
    """To where; empty: it is left alone."""
    marked: bool


def ends(rules: Rules, packet: Packet, chain: str = "PREROUTING", *, marked: bool = False) -> set[End]:
    """Everything that may become of a packet; chances and remembered clients may fall either way."""
    return {
        End("", after) if end is None or end == "ACCEPT" else End(end, after)
        for end, after in _walk(rules, packet, chain, marked=marked)
    }


def _walk(rules: Rules, packet: Packet, chain: str, *, marked: bool) -> Iterator[tuple[str | None, bool]]:
    """The verdicts that a chain may come to, None where it leaves the packet to who called it; and the mark then."""
    states = {marked}
    for rule in rules[chain]:
        matches = _matches(rule, packet)
        if matches is False:
            continue
        after = set() if matches else set(states)
        for state in states:
            target = rule["target"]
            if target in rules:
                for verdict, then in _walk(rules, packet, target, marked=state):
                    if verdict is None and not rule["goto"]:
                        after.add(then)
                    else:
                        yield verdict, then
            elif target == "RETURN":
                yield None, state
            elif target == "MARK":
                after.add(True)
            else:
                yield rule["parameters"].get("to-destination", [target])[0], state
        states = after
    for state in states:
        yield None, state


def _matches(rule: dict[str, Any], packet: Packet) -> bool | None:
    """Whether a rule matches; None: it may."""
    if not (_inside(packet.source, rule["source"]) and _inside(packet.destination, rule["destination"])):
        return False
    if rule["protocol"] not in ("ip", packet.protocol) or rule["interface"]:
        return False
    sure = True
    for name, parameters in rule["matches"]:
        match name:
            case "tcp" | "udp" | "sctp":
                first, _, last = parameters["dport"][0].partition(":")
                if not int(first) <= packet.port <= int(last or first):
                    return False
            case "addrtype":
                [(which, [kind])] = parameters.items()
                address = packet.source if which == "src-type" else packet.destination
                if (kind == "LOCAL") != (address == NODE):
                    return False
            case "statistic" | "recent":
                sure = sure and (name == "recent" and "set" in parameters)
            case "comment":
                pass
            case _:
                raise AssertionError(f"nothing is known of the match {name} in the nat table")
    return True if sure else None


def _inside(address: str, network: str) -> bool:
    negated = network.startswith("!")
    return (ipaddress.ip_address(address) in ipaddress.ip_network(network.removeprefix("!"))) != negated


def wanted(facts: NodeFacts, route: Route, source: str) -> set[End]:
    """What a route does with a source (`rules.forwarding`)."""
    packed = ipaddress.ip_address(source).packed
    if route.source_ranges and not any(packed in each for each in route.source_ranges):
        return {End("", marked=False)}
    pod, node = packed in PODS, source == NODE
    backends, masquerade = route.backends, True
    if route.kind is Kind.CLUSTER_IP:
        masquerade = facts.masquerade_all or not pod
    elif route.local_backends is not None:
        masquerade = node and not pod
        backends = route.backends if pod or node else route.local_backends
    if not backends:
        return {End("", marked=False)}
    return {End(str(each), masquerade) for each in backends}


def packet_to(frontend: Frontend, source: str) -> Packet:
    destination = NODE if frontend.is_node_port else format_address(frontend.address)
    return Packet(source, destination, frontend.protocol.name.lower(), frontend.port)


def first_of(prefix: Prefix) -> str:
    return format_address(prefix.address)


def test_python_iptables_reads_the_rules_that_we_read(dataplane: IptablesDataplane) -> None:
    @settings(max_examples=10)
    @given(tables(Family.IPV4))
    def check(table: ForwardingTable) -> None:
        dataplane.sync(table)
        found = independently()
        saved = parse(dataplane._programs.saved())
        for name in TABLES:
            ours = {chain: rules for chain, rules in found[name].items() if chain.startswith(PREFIX)}
            assert {chain: [line(rule) for rule in rules] for chain, rules in ours.items()} == {
                chain: [rule.text for rule in rules] for chain, rules in saved.chains[name].items()
            }
            for chain, rules in ours.items():
                assert [comment(rule) for rule in rules] == [rule.comment for rule in saved.chains[name][chain]]

    check()


def test_its_rules_forward_every_packet_as_the_table_says_that_we_read(dataplane: IptablesDataplane) -> None:
    @settings(max_examples=10)
    @given(tables(Family.IPV4, with_node=False))
    def check(made: ForwardingTable) -> None:
        dataplane.sync(msgspec.structs.replace(made, node=FACTS))
        table = dataplane.read()
        assert table is not None
        assert table.routes == made.routes
        rules = independently()["nat"]
        for frontend, route in table.routes.items():
            for source in (*SOURCES, *map(first_of, route.source_ranges)):
                assert ends(rules, packet_to(frontend, source)) == wanted(FACTS, route, source), (frontend, source)

    check()
