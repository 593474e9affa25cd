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
