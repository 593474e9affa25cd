"""The agent on a node of the lab: its unit, its configuration, its manifests, and what the kernel holds of it."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Iterable
from typing import Any

import msgspec
from ryaml import loads_all  # type: ignore[attr-defined]  # its stubs don't export them

from rules.dataplane import Capabilities
from tests.netns.patience import TIME_SCALE
from tests.scenarios.schema import Manifest, merge
from vagrant.probing.machines import LAB, LabError, Machine

PATIENCE = 60.0 * TIME_SCALE
"""Seconds after which the agent counts as stuck."""
MANIFESTS = "/etc/sluice/manifests"
CONFIG = "/etc/sluice/config.yaml"
RESTART = "systemctl reset-failed sluice && systemctl restart sluice"
"""Starts are counted by the minute, and those of somebody who probes are not meant."""

RULES = """
nft list ruleset 2>/dev/null | sed -E 's/ ?counter packets [0-9]+ bytes [0-9]+//; s/ ?expires [0-9a-z]+//g'
echo; iptables-legacy-save 2>/dev/null | grep '^-A'
ip6tables-legacy-save 2>/dev/null | grep '^-A'
sed -E 's/([0-9]+ +)[0-9]+ +[0-9]+ *$/\\1/' /proc/net/ip_vs 2>/dev/null
ip -o addr show dev kube-ipvs0 2>/dev/null
ipset save 2>/dev/null
ip route show table all type local dev lo 2>/dev/null
pgrep -af 'proxy[.]userspace[.]worker' 2>/dev/null
true
"""
"""What carries the packets in some mode, without what traffic changes of it: rules, virtual servers, workers."""


class LabAgent:
    """`sluice.service` on a node."""

    def __init__(self, machine: Machine, mode: str) -> None:
        self.machine = machine
        self.mode = mode
        self._config: bytes | None = None
        self._generation = 0

    # --- the unit ------------------------------------------------------------------------------------------------

    def property(self, name: str) -> str:
        """A property of the unit, as systemd has it."""
        return self.machine.run("systemctl", "show", "--value", "-p", name, "sluice").strip()

    def restart(self) -> None:
        """Restart the unit; systemd returns once the first sync of the new process is done."""
        self.machine.run("sh", "-c", shlex.quote(RESTART), timeout=PATIENCE)

    def until_active(self) -> None:
        """Wait until the unit runs and is ready.

        Raises:
            LabError: it is not within the time; the message has the end of its log.
        """
        deadline = time.monotonic() + PATIENCE
        while (state := self.property("ActiveState")) != "active":
            if time.monotonic() > deadline:
                raise LabError(f"{self.machine.name}: the unit is {state}; its log ends with: {self.tail(3)}")
            time.sleep(0.5)

    def tail(self, lines: int = 15) -> str:
        """The end of the unit's log."""
        return self.machine.run("journalctl", "-u", "sluice", "-n", str(lines), "-o", "cat", "--no-pager").strip()

    def rules(self, after: str = "") -> str:
        """A number for what carries the packets, right after a command: the same number, the same rules."""
        text = self.machine.run("sh", "-s", data=f"{after}\n{RULES}".encode())
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    # --- configuration and manifests -----------------------------------------------------------------------------

    def configure(self, fragment: dict[str, Any]) -> bool:
        """Run with the lab's configuration and a fragment merged into it; True if the agent was restarted for it."""
        text = (LAB / "guest" / "config.yaml").read_text()
        standard, own = loads_all(text.replace("@NODE@", self.machine.name).replace("@MODE@", self.mode))
        config = merge(standard, fragment)
        # Without a mode the meaning is that of iptables, on the dataplane that is preferred: here, on the one in test.
        config["mode"] = config["mode"] or ("" if self.mode == "nftables" else self.mode)
        # JSON is YAML.
        data = b"\n---\n".join(msgspec.json.format(msgspec.json.encode(each)) for each in (config, own)) + b"\n"
        if self._config is None:
            self._config = self.machine.run("cat", CONFIG).encode()
        if data == self._config:
            return False
        self._config = None
        # In one command: a file that is there is one that the agent was started with.
        script = f"cat > {CONFIG}.new && mv {CONFIG}.new {CONFIG} && {RESTART}"
        self.machine.run("sh", "-c", shlex.quote(script), data=data, timeout=PATIENCE)
        self._config = data
        return True

    def publish(self, objects: Iterable[Manifest]) -> None:
        """These are all objects; don't wait."""
        self._generation = self._generation % 60000 + 1
        items = [*objects, _marker(self._generation)]
        data = msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": items})
        # Other files go first, which the agent may see: no probe is under way.
        script = f'cd {MANIFESTS} && cat > .new && find . -name "*.yaml" -delete && mv .new objects.yaml'
        self.machine.run("sh", "-c", shlex.quote(script), data=data)

    def settle(self, *, marked: bool = True) -> Capabilities:
        """Wait until what was published has been applied; what the dataplane can do, as far as probes must know.

        `marked` False: wait for whatever the manifests hold, which is without a marker.
        """
        words = ("python3", "-I", "-S", "/opt/lab/settled.py", str(self._generation if marked else 0), str(PATIENCE))
        # No more of the answer is looked at: the agent need not be of this very checkout.
        status = msgspec.json.decode(self.machine.run(*words, timeout=PATIENCE + 60))
        can = status["families"][0]["capabilities"]
        unbound = can.get("unbound", self.mode != "ipvs")
        return Capabilities(source_address=can["source_address"], sctp=can["sctp"], unbound=unbound)

    def apply(self, objects: Iterable[Manifest]) -> Capabilities:
        """Publish, and wait until it has been applied."""
        self.publish(objects)
        return self.settle()

    def restore(self) -> None:
        """The manifests that the machine was provisioned with, and the configuration, in this mode."""
        self.machine.run("sh", "-c", f"'rm -f {MANIFESTS}/* && cp /opt/lab/manifests/*.yaml {MANIFESTS}/'")
        self.configure({})

    def verify(self) -> str:
        """What `sluice verify` says of the kernel: empty when it holds what is wanted."""
        try:
            self.machine.run("sluice", "verify", timeout=PATIENCE)
        except LabError as error:
            return str(error)
        return ""

    def version(self) -> str:
        return self.machine.run("sluice", "version", timeout=PATIENCE).strip()

    def pid(self) -> int:
        return int(self.property("MainPID"))

    def boot(self, timeout: float = 300.0) -> str:
        """Which boot of the machine this is."""
        return self.machine.run("cat", "/proc/sys/kernel/random/boot_id", timeout=timeout).strip()


def _marker(generation: int) -> Manifest:
    """A Service without endpoints that nobody asks for; `settled.py` knows it."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "marker", "namespace": "sluice-lab"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "198.18.0.1",
            "clusterIPs": ["198.18.0.1"],
            "ipFamilies": ["IPv4"],
            "ports": [{"port": generation, "protocol": "TCP"}],
        },
    }
