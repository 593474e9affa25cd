"""`sluice trace` beside kube-proxy: real connections through its recorded rules, loaded into a kernel."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxy import cli
from tests.netns.agent import DEADLINE
from tests.netns.asking import eventually
from tests.netns.isolation import own_network_namespace
from tests.netns.test_foreign import Source, run, source  # noqa: F401  # a fixture

pytestmark = pytest.mark.netns

BACKENDS = {f"{address}:8080" for address in ("10.244.1.11", "10.244.1.12", "10.244.2.11")}


def traced(directory: Path, *connections: tuple[str, int], options: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What a trace says of connections of the node itself, which nobody answers."""
    run("ip", "link", "set", "far0", "up")
    run("ip", "route", "replace", "default", "via", "192.168.50.1")
    run("ip", "neighbour", "replace", "192.168.50.1", "lladdr", "02:00:00:00:00:01", "dev", "eth0")
    output, errors = directory / "out", directory / "err"
    command = [sys.executable, "-m", "proxy", "trace", "-o", "json", "--seconds", "60", *options]
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
    try:
        eventually(lambda: process.poll() is not None or "at work" in errors.read_text(), "the trace")
        for place in connections:
            with socket.socket() as client, contextlib.suppress(OSError):
                client.settimeout(0.3)
                client.connect(place)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=DEADLINE) == 0, errors.read_text()
    finally:
        process.kill()
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("options", [(), ("--of", "kube-proxy")])
def test_connections_go_where_kube_proxys_rules_send_them(
    source: Source,  # noqa: F811  # the fixture
    options: tuple[str, ...],
    tmp_path: Path,
) -> None:
    web, void = traced(tmp_path, ("10.96.30.1", 80), ("10.96.30.3", 80), options=options)
    assert web["service"] == "default/web:http"
    assert web["outcome"]["backend"] in BACKENDS
    assert web["outcome"]["backend"] == web["after"]["destination"]
    assert any(chain.startswith(("KUBE-SVC-", "service-")) for chain in web["chains"])
    assert (void["service"], void["outcome"]["is"]) == ("default/void", "rejected")
    where = {"nftables": r"of table ip kube-proxy", "iptables-nft": r"chain KUBE-SERVICES of table ip filter"}
    assert re.search(where.get(source.name, "chain KUBE-SERVICES of legacy table ip filter"), void["outcome"]["by"])
    assert [web["expected"], void["expected"]] == [True, True]


def test_flows_through_kube_proxys_rules_have_their_services(
    source: Source,  # noqa: F811  # the fixture
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    traced(tmp_path, ("10.96.30.1", 80))
    assert cli.main(["conntrack", "-o", "json", f"--run-directory={tmp_path}"], name="sluice") == 0
    [flow] = json.loads(capfd.readouterr().out)["flows"]
    assert (flow["service"], flow["backend"] in BACKENDS) == ("default/web:http", True)
    assert (flow["stale"], flow["draining"], flow["answered"]) == (False, False, False)


def test_without_rules_of_kube_proxy_it_says_so(root: None, capfd: pytest.CaptureFixture[str]) -> None:
    with own_network_namespace():
        assert cli.main(["trace", "--of", "kube-proxy", "--seconds", "0.1"], name="sluice") == 2
    assert capfd.readouterr().err == "sluice trace: kube-proxy has no rules in this network namespace\n"
