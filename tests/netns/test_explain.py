"""`sluice explain` on a node: answers from the kernel alone, beside what is wanted, and beside the running agent."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxy import cli
from proxy.config.load import load as configure
from proxy.demo.probes import Probe
from proxy.explain.surroundings import ForeignChain, look
from proxy.render import render
from proxy.sources.manifest_loading import load
from rules.forwarding import Family, parse_address
from rules.nftables.dataplane import NftablesDataplane
from tests.netns.agent import Agent
from tests.netns.asking import eventually, said
from tests.netns.isolation import own_network_namespace
from tests.netns.runner import ANSWER, DROP, backends
from tests.scenarios.schema import CLUSTER, DIRECTORY, manifests
from tests.scenarios.schema import load as load_scenario

FILE = Path(__file__).parents[1] / "data" / "explain" / "cluster.yaml"
OPTIONS = [("proxy-mode", "nftables"), ("hostname-override", "node1"), ("cluster-cidr", "10.244.0.0/16")]
NOWHERE = "--run-directory=/nonexistent"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def node(root: None) -> Iterator[None]:
    """A network namespace that looks like node1 of the manifests, with their rules and no agent."""
    tables = render(load(FILE), configure(OPTIONS).settings, "node1").tables
    with own_network_namespace(), contextlib.ExitStack() as stack:
        run("ip", "link", "set", "lo", "up")
        run("ip", "address", "add", "192.168.50.11/32", "dev", "lo")
        run("ip", "link", "add", "pods", "type", "veth", "peer", "name", "pods-end")
        run("ip", "link", "set", "pods", "up")
        run("ip", "link", "set", "pods-end", "up")
        run("ip", "route", "add", "10.244.0.0/16", "dev", "pods")
        run("ip", "-6", "route", "add", "fd00:244::/32", "dev", "pods")
        run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        for table in tables:
            dataplane = stack.enter_context(contextlib.closing(NftablesDataplane(table.family)))
            dataplane.sync(table)
        yield


class Told:
    """What a command said."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = cli.main(["explain", "-o", "json", *arguments])
        captured = capsys.readouterr()
        self.errors = captured.err
        self.data: dict[str, Any] = json.loads(captured.out) if captured.out else {}

    @property
    def answer(self) -> dict[str, Any]:
        [answer] = self.data["answers"]
        return answer

    @property
    def outcome(self) -> Any:
        """The backends and whether they see the client; or what becomes of the packet and why."""
        outcome = self.answer["outcome"]
        if outcome["is"] != "reaches":
            return outcome["is"], outcome["why"]
        return {each["backend"]: each["masqueraded"] for each in outcome["backends"]}


def wanted(capsys: pytest.CaptureFixture[str], *arguments: str) -> Told:
    options = [f"--{name}={text}" for name, text in OPTIONS]
    return Told(capsys, *arguments, "-f", str(FILE), *options)


def live(capsys: pytest.CaptureFixture[str], *arguments: str) -> Told:
    return Told(capsys, *arguments, "--live", NOWHERE)


def both(capsys: pytest.CaptureFixture[str], *arguments: str) -> Told:
    options = [f"--{name}={text}" for name, text in OPTIONS]
    return Told(capsys, *arguments, "--live", "-f", str(FILE), *options)


GUARDED, ZONAL = "203.0.113.47:80", "10.96.0.42:80"
EDITS = {
    "a frontend goes": (
        "delete element ip sluice cluster-ip { 10.96.0.47 . tcp . 80 }",
        ["10.96.0.47:80"],
        {"10.244.1.11:80": False},
        ("dropped", "unallocated"),
    ),
    "a backend is another": (
        "flush map ip sluice endpoints-tcp; add element ip sluice endpoints-tcp { 0:4000 . 0 : 10.9.9.9 . 99 }",
        ["10.96.0.47:80"],
        {"10.244.1.11:80": False},
        {"10.9.9.9:99": False},
    ),
    "a backend goes": (
        "flush map ip sluice slots; add element ip sluice slots { 0:8000 : 10.244.1.11 . 8080 }",
        ["10.96.0.41:80"],
        {"10.244.1.11:8080": False, "10.244.2.11:8080": False},
        {"10.244.1.11:8080": False},
    ),
    "a refusal goes": (
        "delete element ip sluice drop-frontends { 10.96.0.43 . tcp . 80 }",
        ["10.96.0.43:80"],
        ("dropped", "no-local-endpoints"),
        ("dropped", "unallocated"),
    ),
    "a source range goes": (
        "delete element ip sluice source-ranges-25 { 203.0.113.47 . tcp . 80 . 203.0.113.0 }",
        [GUARDED, "--from=203.0.113.9"],
        {"10.244.1.11:80": True},
        ("dropped", "source-ranges"),
    ),
    "a hairpin goes": (
        "delete element ip sluice local-endpoint-pairs { 10.244.1.11 . 10.244.1.11 . tcp . 8080 }",
        [ZONAL, "--from=10.244.1.11"],
        {"10.244.1.11:8080": True},
        {"10.244.1.11:8080": False},
    ),
    "a node port goes": (
        "delete element ip sluice node-port { tcp . 30001 }",
        ["192.168.50.11:30001"],
        {"10.244.1.11:8080": True, "10.244.2.11:8080": True},
        ("untouched", "no-frontend"),
    ),
    "the node-port address goes": (
        "delete element ip sluice node-port-addresses { 192.168.50.11 }",
        ["192.168.50.11:30001"],
        {"10.244.1.11:8080": True, "10.244.2.11:8080": True},
        ("untouched", "node-port-address"),
    ),
    "the service CIDR goes": (
        "delete element ip sluice service-cidrs { 10.96.0.0/16 }",
        ["10.96.7.7:80"],
        ("dropped", "unallocated"),
        ("untouched", "no-frontend"),
    ),
    "the whole table goes": (
        "delete table ip sluice",
        ["10.96.0.47:80"],
        {"10.244.1.11:80": False},
        ("untouched", "no-frontend"),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_in_the_kernel_changes_the_live_answer_and_not_the_wanted_one(node, capsys, edit):
    change, arguments, before, after = EDITS[edit]
    assert live(capsys, *arguments).outcome == wanted(capsys, *arguments).outcome == before
    compared = both(capsys, *arguments)
    assert (compared.outcome, compared.answer["disagreements"]) == (before, [])
    run("nft", change)
    told = live(capsys, *arguments)
    assert told.outcome == after
    assert told.data["source"] == "kernel"
    assert wanted(capsys, *arguments).outcome == before
    compared = both(capsys, *arguments)
    assert compared.outcome == after
    assert compared.answer["disagreements"]


def test_what_the_kernel_lacks_is_said_first(node, capsys):
    run("nft", "delete element ip sluice cluster-ip { 10.96.0.47 . tcp . 80 }")
    options = [f"--{name}={text}" for name, text in OPTIONS]
    assert cli.main(["explain", "10.96.0.47:80", "--live", "-f", str(FILE), *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:5] == [
        "10.96.0.47:80/TCP, from a local pod",
        "  What the kernel holds is NOT what is wanted here:",
        "    ! 10.96.0.47:80/TCP is wanted, and the kernel does not have it",
    ]


def test_a_service_by_its_name_from_the_kernels_labels(node, capsys):
    told = live(capsys, "default/web:http")
    assert [(each["frontend"], each["kind"]) for each in told.data["answers"]] == [
        ("10.96.0.41:80/TCP", "ClusterIP"),
        ("192.0.2.10:80/TCP", "ExternalIP"),
        ("203.0.113.30:80/TCP", "LoadBalancer"),
        ("192.168.50.11:30001/TCP", "NodePort"),
    ]
    assert told.code == 0
    assert [each["frontend"] for each in live(capsys, "default/web:53").data["answers"]][:1] == ["10.96.0.41:53/UDP"]
    assert live(capsys, "default/nothing").code == 1


def test_without_rules_it_says_so(root, capsys):
    with own_network_namespace():
        told = live(capsys, "10.96.0.41:80")
    assert (told.code, told.outcome) == (1, ("untouched", "no-frontend"))
    assert [cause["kind"] for cause in told.answer["causes"]] == ["no-rules"]


def test_where_nodes_do_not_forward_nothing_works(node, capsys):
    run("sysctl", "-q", "-w", "net.ipv4.ip_forward=0")
    told = live(capsys, "10.96.0.47:80")
    assert (told.code, told.answer["works"], told.outcome) == (1, False, {"10.244.1.11:80": False})
    assert [(cause["kind"], cause["certain"]) for cause in told.answer["causes"]] == [("ip-forward", True)]
    assert live(capsys, "10.96.0.47:80", "--from=node").code == 0


def test_what_else_may_be_in_the_way_is_told(node, capsys):
    run("nft", "table ip filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }")
    run("nft", "table ip nat { chain KUBE-SERVICES { }; chain KUBE-FIREWALL { }; }; table ip6 kube-proxy { }")
    run("sysctl", "-q", "-w", "net.ipv4.conf.lo.rp_filter=0", "net.ipv4.conf.all.rp_filter=1")
    run("ip", "link", "add", "out", "type", "veth", "peer", "name", "in")
    told = live(capsys, "10.96.0.47:80")
    assert (told.code, told.answer["works"]) == (1, False)
    found = {cause["kind"]: cause for cause in told.answer["causes"]}
    assert [kind for kind, cause in found.items() if cause["certain"]] == ["forward-drop"]
    assert found.keys() == {"forward-drop", "other-proxy", "rp-filter"}
    assert found["forward-drop"]["next"] == "nft list chain ip filter FORWARD"
    assert "KUBE-SERVICES in the table ip nat" in found["other-proxy"]["words"]


@pytest.mark.parametrize("kind", ["nft", "legacy"])
def test_what_iptables_of_either_kind_has_in_the_way_is_told_with_the_command_that_shows_it(kind, node, capsys):
    if shutil.which(f"iptables-{kind}") is None:
        pytest.skip(f"iptables-{kind} is not installed")
    run(
        f"iptables-{kind}",
        "-A",
        "FORWARD",
        "-p",
        "tcp",
        "--dport",
        "1",
        "-m",
        "comment",
        "--comment",
        "x",
        "-j",
        "DROP",
    )
    run(f"iptables-{kind}", "-t", "nat", "-N", "KUBE-SERVICES")
    run(f"ip6tables-{kind}", "-P", "FORWARD", "DROP")
    told = live(capsys, "10.96.0.47:80")
    assert [cause["kind"] for cause in told.answer["causes"]] == ["other-proxy"]
    assert "KUBE-SERVICES" in told.answer["causes"][0]["words"]
    run(f"iptables-{kind}", "-P", "FORWARD", "DROP")
    [dropping] = [each for each in live(capsys, "10.96.0.47:80").answer["causes"] if each["kind"] == "forward-drop"]
    shown = subprocess.run(dropping["next"].split(), capture_output=True, text=True, check=True).stdout
    assert "drop" in shown.lower()
    run(f"iptables-{kind}", "-N", "SLUICE-FORWARD")
    run(f"iptables-{kind}", "-I", "FORWARD", "-j", "SLUICE-FORWARD")
    # It accepts what is masqueraded, and no more (IPT-15).
    masqueraded = live(capsys, "10.96.0.47:80", "--from=192.0.2.9")
    assert masqueraded.outcome == {"10.244.1.11:80": True}
    assert [each["kind"] for each in masqueraded.answer["causes"]] == ["other-proxy"]
    kept = live(capsys, "10.96.0.47:80", "--from=10.244.1.12").answer
    assert [(each["kind"], each["certain"]) for each in kept["causes"]][1:] == [("forward-drop", True)]


def test_tables_of_legacy_iptables_are_not_made_by_looking_at_them(node, capsys):
    live(capsys, "10.96.0.47:80")
    for name in ("ip_tables_names", "ip6_tables_names"):
        names = Path("/proc/thread-self/net", name)
        assert not names.exists() or names.read_text() == ""


def test_a_forward_chain_of_the_other_family_is_in_nobodys_way(node, capsys):
    run("nft", "table ip6 filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }")
    assert live(capsys, "10.96.0.47:80").answer["causes"] == []


def test_the_surroundings_of_a_bare_namespace(root):
    with own_network_namespace():
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "out", "type", "veth", "peer", "name", "in")
        run("ip", "link", "set", "out", "up")
        run("ip", "address", "add", "10.1.2.3/24", "dev", "out")
        run("ip", "link", "set", "in", "up")
        run("nft", "table inet mine { chain f { type filter hook forward priority 0; policy drop; }; }")
        found = look(parse_address("10.1.2.9"), parse_address("10.9.9.9"))
    assert parse_address("10.1.2.3") in found.addresses
    assert found.node_ips[Family.IPV4] == parse_address("10.1.2.3")
    way = found.ways[parse_address("10.1.2.9")]
    assert (way.interface, way.source) == ("out", parse_address("10.1.2.3"))
    assert parse_address("10.9.9.9") not in found.ways
    assert found.forward_drops == (ForeignChain("inet", "mine", "f", forwards=True, drops=True, rules=()),)
    assert found.other_proxies == ()


# --- beside the agent ------------------------------------------------------------------------------------------------


def explain(agent: Agent, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """What a command on node1 says."""
    own = ["--run-directory", str(agent.run_directory), "-o", "json"]
    command = [sys.executable, "-m", "proxy", "explain", *arguments, *own]
    done = agent.world.namespaces["node1"].inside(
        lambda: subprocess.run(command, capture_output=True, text=True, check=False)
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else {}, done.stderr


def test_the_agent_tells_what_it_wants_and_why(agent):
    agent.configure({})
    objects = manifests(CLUSTER) + load_scenario(DIRECTORY / "external-policy-local.yaml").objects
    agent.apply(objects)
    service = next(each for each in objects if each["kind"] == "Service")
    name = f"{service['metadata'].get('namespace', 'default')}/{service['metadata']['name']}"

    def settled() -> bool:
        code, data, _ = explain(agent, name)
        return code == 0 and not data["problems"]

    eventually(settled)
    code, data, errors = explain(agent, "192.168.50.11:30001", "--from=192.168.50.100")
    [answer] = data["answers"]
    assert (code, data["source"], errors) == (0, "agent", "")
    assert [each["backend"] for each in answer["outcome"]["backends"]] == ["10.244.1.11:8080"]
    assert [(each["endpoint"], each["clause"]) for each in answer["unused"]] == [("10.244.2.11:8080", "SEL-4")]
    assert answer["disagreements"] == []
    code, data, _ = explain(agent, "192.168.50.11:30001", "--from=192.168.50.100", "--live")
    assert (code, data["source"], data["answers"][0]["outcome"]) == (0, "kernel", answer["outcome"])


OBSTACLES = {
    "a policy": (["iptables-nft -P FORWARD DROP"], {"forward-drop"}),
    "a policy, and what was translated is accepted": (
        ["iptables-nft -P FORWARD DROP", "iptables-nft -A FORWARD -m conntrack --ctstate DNAT,ESTABLISHED -j ACCEPT"],
        set(),
    ),
    "a rule about the pod": (["iptables-nft -A FORWARD -d 10.244.1.11 -p tcp --dport 8080 -j DROP"], {"forward-rule"}),
    "a rule about the pod by legacy iptables": (
        ["iptables-legacy -A FORWARD -d 10.244.1.11 -p tcp --dport 8080 -j REJECT"],
        {"forward-rule"},
    ),
    "a rule about another port": (["iptables-nft -A FORWARD -d 10.244.1.11 -p tcp --dport 80 -j DROP"], set()),
    "a rule about another client": (["iptables-nft -A FORWARD -s 10.9.0.0/16 -j DROP"], set()),
    "a rule about the client": (["iptables-nft -A FORWARD -s 10.244.1.13 -j DROP"], {"forward-rule"}),
    "a rule about the interface": (["iptables-nft -A FORWARD -o pod-p1 -j DROP"], {"forward-rule"}),
    "a rule about what is old": (["iptables-nft -A FORWARD -m conntrack --ctstate INVALID -j DROP"], set()),
    "a rule of nftables with sets": (
        [
            "nft add table inet guard",
            "nft add chain inet guard f { type filter hook forward priority 5; }",
            "nft add rule inet guard f ct state { established, related } accept",
            "nft add rule inet guard f ip daddr { 10.244.1.0/28, 10.9.9.9 } tcp dport { 80, 8080 } drop",
        ],
        {"forward-rule"},
    ),
    "a policy, and what goes to pods is accepted": (
        ["iptables-nft -P FORWARD DROP", "iptables-nft -A FORWARD -d 10.244.1.11 -j ACCEPT"],
        {"forward-drop"},
    ),
    "a rule about answers": (["iptables-nft -t mangle -A FORWARD -s 10.244.1.11 -j DROP"], {"forward-rule"}),
    "a rule about answers from a port": (
        ["iptables-nft -t mangle -A FORWARD -p tcp --sport 8080 -m conntrack --ctstate ESTABLISHED -j DROP"],
        {"forward-rule"},
    ),
    "a rule about answers to others": (["iptables-nft -t mangle -A FORWARD -s 10.244.1.11 -d 10.9.9.9 -j DROP"], set()),
    "a route that is gone": (["ip route del 10.244.1.11"], {"no-route"}),
}
ACCEPTED_BY_MODE_IPTABLES = {"a policy, and what goes to pods is accepted"}
"""All answers are, as by kube-proxy (IPT-15)."""


ACCEPT = "iptables-nft -A INPUT -m conntrack --ctstate {} -j ACCEPT"
ELSEWHERE_IN_THE_WAY = {
    "input, a program of the node": ("input-rule", ["iptables-nft -A INPUT -p tcp --dport 9000 -j DROP"]),
    "input, by legacy iptables": ("input-rule", ["iptables-legacy -A INPUT -p tcp --dport 9000 -j DROP"]),
    "input, the frontend's port": ("input-rule", ["iptables-nft -A INPUT -p tcp --dport 81 -j REJECT"]),
    "input, by the loopback": ("input-rule", ["iptables-nft -A INPUT -i lo -p tcp --dport 9000 -j DROP"]),
    "input, a policy": ("input-drop", [ACCEPT.format("ESTABLISHED"), "iptables-nft -P INPUT DROP"]),
    "input, a policy, and what is translated is accepted": (
        "input-drop",
        [ACCEPT.format("DNAT,ESTABLISHED"), "iptables-nft -P INPUT DROP"],
    ),
    "output, a backend": ("output-rule", ["iptables-nft -A OUTPUT -p tcp --dport 8080 -j DROP"]),
    "output, a backend, by legacy iptables": (
        "output-rule",
        ["iptables-legacy -A OUTPUT -d 10.244.1.11 -p tcp --dport 8080 -j REJECT"],
    ),
    "output, the frontend's port": ("output-rule", ["iptables-nft -A OUTPUT -p tcp --dport 80 -j DROP"]),
    "output, the frontend before it is translated": (
        "output-rule",
        ["iptables-nft -t raw -A OUTPUT -d 10.96.7.1 -p tcp --dport 80 -j DROP"],
    ),
    "prerouting, before translation": (
        "prerouting-rule",
        ["iptables-nft -t raw -A PREROUTING -d 10.96.7.1 -j DROP"],
    ),
    "prerouting, before translation, by legacy iptables": (
        "prerouting-rule",
        ["iptables-legacy -t mangle -A PREROUTING -p tcp --dport 81 -j DROP"],
    ),
    "prerouting, behind translation": (
        "prerouting-rule",
        [
            "nft add table inet guard",
            "nft add chain inet guard p { type filter hook prerouting priority -50; }",
            "nft add rule inet guard p tcp dport { 8080, 9000 } drop",
        ],
    ),
    "ingress, of a device": (
        "ingress-rule",
        [
            "nft add table netdev guard",
            "nft add chain netdev guard i { type filter hook ingress device pod-p3 priority 0; }",
            "nft add rule netdev guard i ip daddr 10.96.7.0/24 drop",
        ],
    ),
    "ingress, of several devices": (
        "ingress-rule",
        [
            "nft add table inet guard",
            "nft add chain inet guard i { type filter hook ingress devices = { pod-p2, pod-p3 } priority 0; }",
            "nft add rule inet guard i tcp dport { 80, 81 } drop",
        ],
    ),
    "egress, of a device": (
        "egress-rule",
        [
            "nft add table netdev guard",
            "nft add chain netdev guard e { type filter hook egress device pod-p1 priority 0; }",
            "nft add rule netdev guard e ip daddr 10.244.1.11 tcp dport 8080 drop",
        ],
    ),
}
"""Of each the kind, and the commands; who is concerned, packets say."""


@pytest.mark.parametrize("obstacle", ELSEWHERE_IN_THE_WAY)
def test_what_explain_says_of_input_output_and_prerouting_is_what_packets_meet(agent, mode, obstacle):
    """Of a pod, an outsider and the node, each to a pod here and to a program of the node."""
    kind, commands = ELSEWHERE_IN_THE_WAY[obstacle]
    if any("legacy" in each for each in commands) and shutil.which("iptables-legacy") is None:
        pytest.skip("iptables-legacy is not installed")
    agent.configure({})
    world = agent.world
    objects = [
        *manifests(CLUSTER),
        *one_backend("near", "10.96.7.1", 80, "10.244.1.11", 8080),
        *one_backend("own", "10.96.7.2", 81, "192.168.50.11", 9000),
    ]
    world.probes.open(backends(objects))
    agent.apply(objects)
    agent.settle()
    clients = {"p3": "10.244.1.13", "c": "192.168.50.100", "node1": "node"}
    seen, told = {}, {}
    try:
        for command in commands:
            said(world, *command.split())
        for host, client in clients.items():
            for address, port in (("10.96.7.1", 80), ("10.96.7.2", 81)):
                probe = Probe(host=host, address=address, port=port, timeout=DROP)
                [[outcome]] = world.probes.probe(probe)
                seen[host, address] = outcome.kind == "answered"
                code, data, _ = explain(agent, f"{address}:{port}", f"--from={client}")
                [answer] = data["answers"]
                told[host, address] = code == 0
                kinds = {each["kind"] for each in answer["causes"] if each["certain"]}
                assert kinds == (set() if told[host, address] else {kind}), (host, address, answer["causes"])
        assert told == seen
        # Where something drops for somebody it must be found; what is accepted must work for all.
        assert all(seen.values()) == (mode != "userspace" and "accepted" in obstacle) or kind_spares(mode, obstacle)
    finally:
        for command in commands:
            if command.startswith("iptables"):
                said(world, *command.replace(" -A ", " -D ").replace("INPUT DROP", "INPUT ACCEPT").split())
        if "guard" in commands[0]:
            said(world, *commands[0].replace(" add ", " delete ").split())
        world.probes.shut()
        agent.expect_empty(manifests(CLUSTER))


def test_what_a_bridge_or_another_device_drops_is_told_as_what_may_be(agent):
    """Routes tell of neither whether packets come by them."""
    agent.configure({})
    world = agent.world
    objects = [*manifests(CLUSTER), *one_backend("near", "10.96.7.1", 80, "10.244.1.11", 8080)]
    commands = [
        "nft add table bridge guard",
        "nft add chain bridge guard i { type filter hook input priority 0; }",
        "nft add rule bridge guard i iifname veth7 ip daddr 10.96.7.1 tcp dport 80 drop",
        "nft add rule bridge guard i ip6 daddr fd00::1 drop",
        "nft add chain bridge guard o { type filter hook output priority 0; policy drop; }",
        "nft add table netdev guard",
        "nft add chain netdev guard i { type filter hook ingress device pod-p2 priority 0; }",
        "nft add rule netdev guard i ip daddr 10.96.7.1 drop",
    ]
    world.probes.open(backends(objects))
    agent.apply(objects)
    agent.settle()
    try:
        for command in commands:
            said(world, *command.split())
        [[outcome]] = world.probes.probe(Probe(host="p3", address="10.96.7.1", port=80, timeout=ANSWER))
        code, data, _ = explain(agent, "10.96.7.1:80", "--from=10.244.1.13")
        causes = data["answers"][0]["causes"]
        kinds = sorted(each["kind"] for each in causes)
        assert (outcome.kind, code) == ("answered", 0)
        assert kinds == ["egress-drop", "ingress-rule-perhaps", "ingress-rule-perhaps"]
        assert not any(each["certain"] for each in causes)
    finally:
        for family in ("bridge", "netdev"):
            said(world, "nft", "delete", "table", family, "guard")
        world.probes.shut()
        agent.expect_empty(manifests(CLUSTER))


def test_a_backend_that_is_the_node_itself_and_that_nobody_listens_at_is_told(agent):
    agent.configure({})
    world = agent.world
    objects = [*manifests(CLUSTER), *one_backend("own", "10.96.7.2", 81, "192.168.50.11", 9000)]
    agent.apply(objects)
    agent.settle()
    try:
        for listens in (False, True):
            if listens:
                world.probes.open(backends(objects))
            [[outcome]] = world.probes.probe(Probe(host="p3", address="10.96.7.2", port=81, timeout=ANSWER))
            code, data, _ = explain(agent, "10.96.7.2:81", "--from=10.244.1.13")
            kinds = [each["kind"] for each in data["answers"][0]["causes"]]
            assert (outcome.kind == "answered", code, kinds) == (
                listens,
                int(not listens),
                [] if listens else ["no-listener"],
            )
    finally:
        world.probes.shut()
        agent.expect_empty(manifests(CLUSTER))


def kind_spares(mode: str, obstacle: str) -> bool:
    """Whether nobody comes by the rule in a mode: ports are translated before it, or are not at all."""
    by_frontend = obstacle in ("input, the frontend's port", "output, the frontend's port")
    return by_frontend and mode != "userspace"


def one_backend(name: str, address: str, port: int, backend: str, to: int) -> list[dict[str, Any]]:
    """A Service and its slice."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": address, "ports": [{"port": port}]},
    }
    slices = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{name}-1", "namespace": "default", "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "", "port": to}],
        "endpoints": [{"addresses": [backend], "nodeName": "node1"}],
    }
    return [service, slices]


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_explain_says_of_obstacles_is_what_packets_meet(agent, mode, obstacle):
    if mode not in ("nftables", "iptables"):
        pytest.skip(f"in mode {mode} the node forwards no packet of a connection's beginning")
    commands, expected = OBSTACLES[obstacle]
    if mode == "iptables" and obstacle in ACCEPTED_BY_MODE_IPTABLES:
        expected = set()
    if any("legacy" in each for each in commands) and shutil.which("iptables-legacy") is None:
        pytest.skip("iptables-legacy is not installed")
    agent.configure({})
    world = agent.world
    objects = [*manifests(CLUSTER), *one_backend("near", "10.96.7.1", 80, "10.244.1.11", 8080)]
    world.probes.open(backends(objects))
    agent.apply(objects)
    try:
        for command in commands:
            said(world, *command.split())
        probe = Probe(host="p3", address="10.96.7.1", port=80, timeout=DROP)
        [[seen]] = world.probes.probe(probe)
        code, data, _ = explain(agent, "10.96.7.1:80", "--from=10.244.1.13")
        [answer] = data["answers"]
        certain = {each["kind"] for each in answer["causes"] if each["certain"]}
        assert (certain, code == 0) == (expected, seen.kind == "answered")
        assert not expected or seen.kind != "answered"
    finally:
        said(world, *["ip", "route", "replace", "10.244.1.11", "dev", "pod-p1", "src", "192.168.50.11"])
        for command in commands:
            if command.startswith("iptables"):
                said(world, *command.replace(" -A ", " -D ").replace("FORWARD DROP", "FORWARD ACCEPT").split())
        if "guard" in commands[0]:
            said(world, *commands[0].replace(" add ", " delete ").split())
        world.probes.shut()
        agent.expect_empty(manifests(CLUSTER))
