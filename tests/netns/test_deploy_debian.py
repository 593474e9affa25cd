"""The Debian package, installed into a Debian: what it brings, that it works there, and what its removal leaves.

SLUICE_DEB names the package (`make deb`), SLUICE_DEBIAN a root made by debootstrap in which python3, iptables, nftables
and procps are installed.  The root is not changed: everything happens in an overlay above it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.asking import eventually
from tests.netns.isolation import own_network_namespace

EXAMPLES = Path(__file__).parents[2] / "examples"
PACKAGE = os.environ.get("SLUICE_DEB", "")
DEBIAN = os.environ.get("SLUICE_DEBIAN", "")

pytestmark = [
    pytest.mark.netns,
    pytest.mark.xdist_group("deploy"),
    pytest.mark.skipif(not (PACKAGE and DEBIAN), reason="SLUICE_DEB and SLUICE_DEBIAN say what is to be tried"),
]


class Machine:
    """A Debian, in a network namespace of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def command(self, text: str) -> list[str]:
        # A namespace of mounts of its own: /proc and /sys end with the command.
        mounts = 'cd "$0"; mount -t proc proc proc; mount -t sysfs sys sys; mkdir -p run; exec chroot . sh -ec "$1"'
        return [
            "unshare",
            "--mount",
            "sh",
            "-c",
            mounts,
            str(self.root),
            f"export PATH=/usr/sbin:/usr/bin:/sbin:/bin; {text}",
        ]

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(text), capture_output=True, text=True, check=False, env={})

    def said(self, text: str) -> str:
        done = self.run(text)
        assert done.returncode == 0, f"{text}: {done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def machine(root: None, tmp_path: Path) -> Iterator[Machine]:
    for name in ("upper", "work", "root"):
        (tmp_path / name).mkdir()
    options = f"lowerdir={DEBIAN},upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    with own_network_namespace():
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(tmp_path / "root")], check=True)
        try:
            shutil.copy(PACKAGE, tmp_path / "root/sluice.deb")
            machine = Machine(tmp_path / "root")
            machine.said("dpkg -i /sluice.deb")
            yield machine
        finally:
            subprocess.run(["umount", str(tmp_path / "root")], check=True)


def serve(machine: Machine, mode: str) -> None:
    """Let the installed agent write the rules of the examples, as the unit starts it, and end."""
    config = machine.root / "etc/sluice/config.yaml"
    config.write_text(config.read_text().replace("mode: nftables", f"mode: {mode}"))
    shutil.copytree(EXAMPLES, machine.root / "etc/sluice/manifests", dirs_exist_ok=True)
    agent = subprocess.Popen(
        machine.command("exec sluice run --config /etc/sluice/config.yaml --hostname-override node1"),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={},
    )  # fmt: skip
    try:
        eventually(lambda: "kubia" in machine.run("sluice dump").stdout, "a rule of the examples")
    finally:
        agent.terminate()
        _, log = agent.communicate(timeout=60)
        assert agent.returncode == 0, log


def ours(machine: Machine) -> list[str]:
    """What the kernel holds of ours, by the programs of the system."""
    listed = machine.said(
        "nft list tables; for each in iptables ip6tables; do $each-nft-save; $each-legacy-save; done 2>&1"
    )
    return [line for line in listed.splitlines() if "sluice" in line.lower() and not line.startswith("#")]


def test_it_works_where_it_is_installed(machine):
    version = Path(PACKAGE).name.split("_")[1]
    assert machine.said("sluice version") == f"sluice {version}\n"
    assert machine.said("/opt/sluice/bin/kube-proxy --version") == f"sluice {version}\n"
    rendered = machine.said("sluice render -f /usr/share/doc/sluice-proxy/examples --hostname-override node1")
    assert "kubia" in rendered
    assert machine.said("sluice config --check --config /etc/sluice/config.yaml 2>&1") is not None


def test_its_files_are_where_debian_looks_for_them(machine):
    listed = set(machine.said("dpkg -L sluice-proxy").split())
    assert listed >= {
        "/usr/sbin/sluice",
        "/usr/lib/systemd/system/sluice.service",
        "/etc/sluice/config.yaml",
        "/etc/sluice/manifests",
        "/usr/share/man/man8/sluice.8.gz",
        "/usr/share/bash-completion/completions/sluice",
        "/usr/share/doc/sluice-proxy/copyright",
    }
    assert machine.said("dpkg-query -W -f '${Conffiles}' sluice-proxy").split()[0] == "/etc/sluice/config.yaml"
    assert machine.said("dpkg --verify sluice-proxy") == ""
    assert machine.said("grep -rlI /stage/ /opt/sluice || true") == ""


def test_its_python_takes_nothing_from_the_system_or_elsewhere(machine):
    machine.said("cd / && /opt/sluice/bin/python -c 'import proxy, rules, aiohttp, pyroute2'")
    refused = machine.run("/usr/bin/python3 -c 'import rules'")
    assert "ModuleNotFoundError" in refused.stderr


def test_it_is_built_byte_for_byte_again(tmp_path):
    """From the wheel beside it, in another directory and at another time."""
    package = Path(PACKAGE)
    [wheel] = package.parent.glob("sluice_proxy-*.whl")
    build = Path(__file__).parents[2] / "deploy/debian/build"
    subprocess.run([build, wheel, tmp_path], check=True, env={**os.environ, "PYTHON": sys.executable})
    assert (tmp_path / package.name).read_bytes() == package.read_bytes()


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_removal_leaves_configuration_and_rules_and_purge_takes_both(mode, machine):
    serve(machine, mode)
    held = ours(machine)
    assert held
    assert "rules stay" in machine.said("dpkg -r sluice-proxy 2>&1")
    assert ours(machine) == held
    assert (machine.root / "etc/sluice/config.yaml").exists()
    assert not (machine.root / "opt/sluice").exists()
    if mode == "iptables":
        machine.said("iptables-nft -N NEIGHBOUR; iptables-nft -A FORWARD -j NEIGHBOUR")
    machine.said("dpkg --purge sluice-proxy 2>&1")
    assert ours(machine) == []
    assert not (machine.root / "etc/sluice").exists()
    if mode == "iptables":
        assert "-A FORWARD -j NEIGHBOUR" in machine.said("iptables-nft -S")


def test_a_configuration_that_was_edited_outlives_a_reinstallation(machine):
    config = machine.root / "etc/sluice/config.yaml"
    config.write_text(config.read_text() + "# edited here\n")
    machine.said("dpkg -i --force-confold /sluice.deb")
    assert config.read_text().endswith("# edited here\n")
