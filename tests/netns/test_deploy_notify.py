"""What the running agent tells systemd, and when."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.agent import DEADLINE
from tests.netns.isolation import own_network_namespace

CONFIG = """
kind: KubeProxyConfiguration
apiVersion: kubeproxy.config.k8s.io/v1alpha1
mode: nftables
conntrack: {maxPerCore: 0}
---
kind: SluiceConfiguration
apiVersion: sluice.internal/v1alpha1
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web, namespace: default}
spec: {clusterIP: 10.96.0.10, ports: [{port: 80}]}
"""


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(DEADLINE)
        yield listener


def heard(systemd: socket.socket, wanted: str) -> list[str]:
    """All lines up to the wanted one."""
    lines: list[str] = []
    while wanted not in lines:
        lines += systemd.recv(4096).decode().split("\n")
    return lines


def test_ready_after_the_first_sync_then_alive_reloading_and_stopping(root, systemd, tmp_path):
    """Ready means that rules are there: what is started after the unit may use Services."""
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    (manifests / "web.yaml").write_text(SERVICE)
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG + f"manifests: {manifests}\nrunDirectory: {tmp_path / 'run'}\n")
    environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
    environment.pop("WATCHDOG_PID", None)
    with own_network_namespace():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        command = [sys.executable, "-m", "proxy", "run", "--config", str(config), "--hostname-override", "node1"]
        with (tmp_path / "log").open("wb") as log:
            agent = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            before = heard(systemd, "READY=1")
            assert before[0] == "STATUS=waiting for the first sync"
            assert (
                "10.96.0.10"
                in subprocess.run(
                    ["nft", "list", "table", "ip", "sluice"], check=True, capture_output=True, text=True
                ).stdout
            )
            assert heard(systemd, "WATCHDOG=1")
            agent.send_signal(signal.SIGHUP)
            assert "READY=1" not in heard(systemd, "RELOADING=1")
            heard(systemd, "READY=1")
            config.write_text("mode: [")
            agent.send_signal(signal.SIGHUP)
            heard(systemd, "RELOADING=1")
            heard(systemd, "READY=1")  # a file that cannot be used ends the reload too
            agent.terminate()
            heard(systemd, "STOPPING=1")
            assert agent.wait(DEADLINE) == 0
        finally:
            agent.kill()
            agent.wait()
