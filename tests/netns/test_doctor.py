"""`sluice doctor` beside a running agent, on a network namespace of its own that falls sick."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy import cli
from tests.netns.isolation import own_network_namespace
from tests.netns.test_verify import Agent

pytestmark = pytest.mark.netns

HEALTHY: list[dict[str, Any]] = [
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.1", "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]},
    },
    {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 80}],
        "endpoints": [{"addresses": ["10.244.1.11"], "conditions": {"ready": True}}],
    },
    {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "ServiceCIDR",
        "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": ["10.96.0.0/16", "fd00:10:96::/112"]},
    },
]


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def agent(root: None, tmp_path: Path) -> Iterator[Agent]:
    manifests = tmp_path / "healthy.json"
    manifests.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": HEALTHY}))
    with own_network_namespace(), contextlib.ExitStack() as stack:
        run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=0")
        run("ip", "link", "add", "pods", "type", "veth", "peer", "name", "pods-end")
        run("ip", "link", "set", "pods", "up")
        run("ip", "link", "set", "pods-end", "up")
        run("ip", "route", "add", "10.244.0.0/16", "dev", "pods")
        agent = Agent(tmp_path, "report", manifests)
        stack.callback(agent.stop)
        yield agent


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and the findings by kind."""
    capsys.readouterr()
    code = cli.main(["doctor", "-o", "json", *arguments])
    found = json.loads(capsys.readouterr().out)["findings"]
    return code, {each["kind"]: each for each in found if each["severity"] != "note"}


def test_from_a_healthy_node_to_a_sick_one(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    here = f"--run-directory={agent.run_directory}"
    assert cli.main(["doctor", here]) == 0
    assert capsys.readouterr().out == "nothing is wrong: 1 frontend looked at\n"

    run("nft", "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
    run("nft", "add table ip kube-proxy; add chain ip kube-proxy services")
    run("sysctl", "-q", "-w", "net.ipv4.ip_forward=0", "net.ipv4.conf.all.rp_filter=1")
    run("nft", "delete element ip sluice cluster-ip { 10.96.0.1 . tcp . 80 }")
    code, found = told(capsys, here)
    assert code == 1
    # The agent may have seen the drift as well by now, and left it, as it was told.
    assert set(found) - {"drift-left"} == {"ip-forward", "drift", "forward-drop", "other-proxy"}
    assert next(iter(found)) == "ip-forward"
    assert found["forward-drop"]["next"] == "nft list chain ip filter FORWARD"

    code, found = told(capsys, "-f", str(agent.manifests), *agent.flags)
    assert code == 1
    assert set(found) == {"ip-forward", "drift", "forward-drop", "other-proxy"}


def test_an_agent_that_is_gone(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.stop()
    code, found = told(capsys, f"--run-directory={agent.run_directory}")
    assert (code, set(found)) == (1, {"agent-absent"})


def test_a_bundle_of_a_sick_node_answers_as_the_node_did(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    run("nft", "delete element ip sluice cluster-ip { 10.96.0.1 . tcp . 80 }")
    path = str(agent.manifests.parent / "bundle.tar.gz")
    here = f"--run-directory={agent.run_directory}"
    assert cli.main(["bundle", "-o", path, here]) == 0
    capsys.readouterr()
    for verb in (["dump", "-o", "json"], ["verify"], ["explain", "default/web:http", "-o", "json"]):
        live = [] if verb[0] == "dump" else [here]
        code = cli.main([*verb, *live])
        on_the_node = capsys.readouterr().out
        assert cli.main([*verb, "-f", path]) == code
        replayed = capsys.readouterr().out
        if verb[0] == "explain":
            assert _told(replayed) == _told(on_the_node)
        elif verb[0] == "verify":
            assert [line for line in replayed.splitlines() if "10.96.0.1:80" in line] == [
                line for line in on_the_node.splitlines() if "10.96.0.1:80" in line
            ]
        else:
            assert json.loads(replayed) == json.loads(on_the_node)


def test_a_bundle_answers_anywhere_in_another_checkout_and_without_root(agent: Agent, tmp_path: Path) -> None:
    run("nft", "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")
    run("nft", "delete element ip sluice cluster-ip { 10.96.0.1 . tcp . 80 }")
    path = tmp_path / "bundle.tar.gz"
    assert cli.main(["bundle", "-o", str(path), f"--run-directory={agent.run_directory}"]) == 0
    here = Path(__file__).parents[2]
    with tempfile.TemporaryDirectory(dir="/var/tmp") as elsewhere:
        checkout = Path(elsewhere)
        checkout.chmod(0o755)
        for package in ("proxy", "rules"):
            shutil.copytree(here / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
        copy = checkout / "b.tar.gz"
        shutil.copy(path, copy)
        copy.chmod(0o644)
        said = {}
        for verb in ("dump", "verify", "doctor", "status", "conntrack", "explain default/web:http"):
            command = [sys.executable, "-m", "proxy", *verb.split(), "-f", str(copy)]
            done = subprocess.run(
                ["unshare", "-n", "setpriv", "--reuid=65534", "--clear-groups", "--", *command],
                capture_output=True,
                text=True,
                check=False,
                cwd=checkout,
                env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"},
            )
            said[verb] = done.returncode, done.stdout
            assert "internal error" not in done.stderr
    assert {verb: code for verb, (code, _) in said.items()} == {
        "dump": 0, "verify": 1, "doctor": 1, "status": said["status"][0], "conntrack": 0, "explain default/web:http": 1,
    }  # fmt: skip
    assert said["status"][0] in (0, 1)
    assert "10.96.0.1:80/TCP" in said["verify"][1]
    assert "the policy of the chain FORWARD in the table ip filter is DROP" in said["doctor"][1]
    assert f"sluice verify -f {copy}" in said["doctor"][1]


def _told(answers: str) -> list[Any]:
    return [(each["outcome"], each["disagreements"]) for each in json.loads(answers)["answers"]]


# --- rules of others -------------------------------------------------------------------------------------------------

OTHERS = {
    "nft-sets": [
        "nft",
        """table inet guard { set pods { type ipv4_addr; flags interval; elements = { 10.244.1.8/29, 10.9.0.0/16 }; };
        chain f { type filter hook forward priority 10; ct state { established, related } accept;
        ip daddr @pods tcp dport { 80, 443 } reject; }; }""",
    ],
    "nft": [
        "nft",
        """table inet guard { chain pods { ip daddr 10.244.1.11 tcp dport 80 drop; }; chain f {
        type filter hook forward priority 10; ct state established accept; jump pods; }; }""",
    ],
    "iptables-nft": [
        "iptables-nft -N PODS",
        "iptables-nft -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "iptables-nft -A FORWARD -m comment --comment pods -j PODS",
        "iptables-nft -A PODS -d 10.244.1.11 -p tcp -m multiport --dports 80,443 -j DROP",
    ],
    "iptables-legacy": [
        "iptables-legacy -N PODS",
        "iptables-legacy -A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        "iptables-legacy -A FORWARD -m comment --comment pods -j PODS",
        "iptables-legacy -A PODS -d 10.244.1.11/32 -o pods -p tcp --dport 80 -j DROP",
    ],
}
CHAINS = {"nft-sets": "f", "nft": "pods", "iptables-nft": "PODS", "iptables-legacy": "PODS"}


def program(kind: str) -> None:
    """Put a rule into the kernel that keeps packets from the backend, as that program does."""
    commands = OTHERS[kind]
    if shutil.which(commands[0].split()[0]) is None:
        pytest.skip(f"{kind} is not installed")
    if kind.startswith("nft"):
        run(*commands)
        return
    for command in commands:
        run(*command.split())


@pytest.mark.parametrize("kind", OTHERS)
def test_a_rule_of_somebody_else_that_drops_what_goes_to_a_backend(agent: Agent, capsys: Any, kind: str) -> None:
    program(kind)
    code, found = told(capsys, f"--run-directory={agent.run_directory}")
    assert (code, set(found)) == (1, {"forward-rule"})
    dropping = found["forward-rule"]
    assert (dropping["severity"], dropping["subject"]) == ("critical", "node")
    assert f"of the chain {CHAINS[kind]} in the table" in dropping["what"]
    assert "what goes to 10.244.1.11:80 (" in dropping["what"]
    assert "Service default/web" in dropping["what"]
    shown = subprocess.run(dropping["next"].split(), capture_output=True, text=True, check=True).stdout
    assert "@pods" in shown or "10.244.1.11" in shown
    assert cli.main(["explain", "10.96.0.1:80", "-o", "json", f"--run-directory={agent.run_directory}"]) == 1
    [answer] = json.loads(capsys.readouterr().out)["answers"]
    assert [(each["kind"], each["certain"]) for each in answer["causes"]] == [("forward-rule", True)]


def test_a_node_without_a_way_to_its_pods(agent: Agent, capsys: Any) -> None:
    here = f"--run-directory={agent.run_directory}"
    run("ip", "route", "del", "10.244.0.0/16")
    code, found = told(capsys, here)
    assert (code, set(found)) == (1, {"no-route"})
    assert "no way to 10.244.1.11: there is no route" in found["no-route"]["what"]
    run("ip", "route", "add", "blackhole", "10.244.0.0/16")
    _, found = told(capsys, here)
    assert "no way to 10.244.1.11: the route is blackhole" in found["no-route"]["what"]
    path = str(agent.manifests.parent / "lost.tar.gz")
    assert cli.main(["bundle", "-o", path, here]) == 0
    with own_network_namespace():
        code, found = told(capsys, "-f", path)
    assert (code, set(found)) == (1, {"no-route"})


def test_next_to_kube_proxy_without_an_agent_its_rules_are_looked_at(root: None, tmp_path: Path, capsys: Any) -> None:
    recorded = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2" / "nftables.nft"
    with own_network_namespace():
        run("sysctl", "-q", "-w", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        run("nft", "-f", str(recorded))
        capsys.readouterr()
        assert cli.main(["doctor", "-o", "json", f"--run-directory={tmp_path}"]) == 1
        found = json.loads(capsys.readouterr().out)["findings"]
    kinds = {each["kind"]: each["severity"] for each in found}
    assert kinds["agent-absent"] == "note"
    assert kinds["no-route"] == "critical"
    assert {"no-endpoints", "policy-local"} <= kinds.keys()
    assert not {"no-rules", "other-proxy"} & kinds.keys()
    assert ("Service default/void", "no-endpoints") in {(each["subject"], each["kind"]) for each in found}
