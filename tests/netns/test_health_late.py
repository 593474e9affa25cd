"""A kernel that takes no rules: the running agent's health says so in time, and again when it is over."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.asking import eventually
from tests.netns.isolation import own_network_namespace
from tests.scenarios.schema import CLUSTER

PROGRAM = str(Path(sys.executable).with_name("kube-proxy"))
FLAGS = [
    *("--proxy-mode=nftables", "--hostname-override=node1", "--conntrack-max-per-core=0"),
    # So periods are called in every mode but ipvs (CFG-2).
    "--iptables-sync-period=500ms",
    "--iptables-min-sync-period=1ms",
]


@pytest.fixture
def owner(root: None) -> Iterator[subprocess.Popen[str]]:
    """Another program in a network namespace of the test's own, to which our table belongs, for as long as it runs."""
    with own_network_namespace():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        program = subprocess.Popen(["nft", "--interactive"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert program.stdin is not None
        program.stdin.write("add table ip sluice { flags owner; }\n")
        program.stdin.flush()
        try:
            eventually(listed, "the table of another")
            yield program
        finally:
            program.kill()
            program.wait()
            program.stdin.close()
            assert program.stdout is not None
            program.stdout.close()


def listed() -> bool:
    return "table ip sluice" in subprocess.check_output(["nft", "list", "tables"], text=True)


def asked(path: str) -> tuple[int, Any] | None:
    connection = http.client.HTTPConnection("127.0.0.1", 10256, timeout=10)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    except ConnectionRefusedError:
        return None
    finally:
        connection.close()


def status(path: str) -> int | None:
    found = asked(path)
    return found[0] if found else None


def test_a_change_that_is_not_applied_in_time_is_told_by_family_until_it_is(owner, tmp_path):
    """HC-2 to HC-4, HC-6, SYN-6, SYN-9, MET-16."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [PROGRAM, *FLAGS, f"--manifests={CLUSTER}", f"--run-directory={tmp_path}/run"]
        agent = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        eventually(lambda: status("/livez") == 503, "a health that tells")
        assert status("/healthz") == 503
        late = asked("/livez")
        assert late is not None
        families = {family: each["healthy"] for family, each in late[1]["status"].items()}
        assert (late[1]["healthy"], families) == (False, {"IPv4": False, "IPv6": True})
        assert agent.poll() is None
        owner.kill()
        eventually(lambda: status("/livez") == 200, "the end of it")
        assert status("/healthz") == 200
    finally:
        agent.terminate()
        code = agent.wait(30)
    text = log.read_text()
    assert code == 0, text
    assert "Traceback" not in text, text
