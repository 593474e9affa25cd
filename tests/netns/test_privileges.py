"""The privileges of an agent: everything once by `--init-only`, then NET_ADMIN and NET_RAW alone; and `--cleanup`."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.modes import open_dataplane
from proxy.sysctls import ROUTE_LOCALNET
from rules.forwarding import Family
from tests.netns.agent import DEADLINE
from tests.netns.isolation import own_network_namespace
from tests.scenarios.schema import CLUSTER

PROGRAM = str(Path(sys.executable).with_name("kube-proxy"))
OOM_SCORE = Path("/proc/self/oom_score_adj").read_text().strip()
# What the machine that the tests run on would notice is left as it is.
COMMON = [
    "--conntrack-max-per-core=0",
    "--conntrack-min=0",
    f"--oom-score-adj={OOM_SCORE}",
    "--hostname-override=node1",
]
ASKED = ["--conntrack-udp-timeout=77s", "--conntrack-tcp-timeout-established=7777s"]
READ_ONLY = 'mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys && exec "$@"'


def bounded(capabilities: str) -> list[str]:
    """What makes a command run with these capabilities alone, and /proc/sys that it cannot write."""
    held = f"-all,{capabilities}"
    caps = [f"--bounding-set={held}", f"--inh-caps={held}", f"--ambient-caps={held}", "--no-new-privs"]
    return ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh", "setpriv", *caps]


@pytest.fixture
def alone(root: None) -> Iterator[None]:
    """A network namespace of the test's own."""
    with own_network_namespace():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        Path("/proc/sys", ROUTE_LOCALNET).write_text("0\n")  # a new namespace has the machine's value
        yield


def sysctl(name: str) -> str:
    return Path("/proc/sys", name).read_text().strip()


def wait_for(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not re.search(pattern, log.read_text()):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, f"no {pattern} in:\n{log.read_text()}"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("mode", "capabilities"),
    [
        ("nftables", "+net_admin,+net_raw"),
        ("iptables", "+net_admin,+net_raw"),
        ("", "+net_admin,+net_raw"),
        ("userspace", "+net_admin,+net_raw,+net_bind_service"),
    ],
)
def test_what_takes_privileges_is_done_once_and_the_agent_needs_two_capabilities(mode, capabilities, alone, tmp_path):
    """CFG-53, CT-8, CFG-52: nothing is left to set for the agent, and `--cleanup` removes all that it wrote."""
    flags = [f"--proxy-mode={mode}", *COMMON, *ASKED]
    done = subprocess.run([PROGRAM, *flags, "--init-only"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    timeouts = [sysctl(f"net/netfilter/nf_conntrack_{name}") for name in ("udp_timeout", "tcp_timeout_established")]
    assert timeouts == ["77", "7777"]
    assert sysctl(ROUTE_LOCALNET) == ("1" if mode in {"", "iptables"} else "0")

    log = tmp_path / "log"
    source = [f"--manifests={CLUSTER}", f"--run-directory={tmp_path}/run"]
    with log.open("wb") as file:
        process = subprocess.Popen([*bounded(capabilities), PROGRAM, *flags, *source], stdout=file, stderr=file)
    try:
        for family in Family:
            wait_for(f"synced .*family={family.label}", log, process)
        [line] = re.findall(r"^CapEff:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
        assert int(line, 16).bit_count() == capabilities.count("+")
    finally:
        process.terminate()
        assert process.wait(DEADLINE) == 0
    text = log.read_text()
    assert "Traceback" not in text
    assert "not set up as configured" not in text
    assert " error " not in text

    ended = subprocess.run([PROGRAM, "--cleanup"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    [started] = re.findall(r"starting .*?mode=(\w+)", text)
    assert ended.stdout.splitlines() == [f"removed what {started} held for {family.label}" for family in Family]
    for family in Family:
        dataplane = open_dataplane(started, family)
        try:
            assert dataplane.read() is None
        finally:
            dataplane.close()
