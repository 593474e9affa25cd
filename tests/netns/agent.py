"""The agent under test: a real process on node1, fed with manifests, and what the kernel there holds.

`apply` returns once the kernel holds what was published.  It knows by a marker: a Service and a slice of the harness
that stand in the same manifest file and whose port is the number of the publication.  When the marker's route, read
back from the kernel, has the newest number, everything that was published with it has been applied.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec

from proxy import agent_socket
from proxy.demo.world import World
from proxy.modes import open_dataplane
from proxy.userspace.anyip import needed, read_routes
from rules.dataplane import Capabilities
from rules.diff import fit
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, parse_address
from rules.forwarding import Protocol as Transport
from tests.netns.patience import TIME_SCALE
from tests.scenarios.schema import Manifest, merge

DEADLINE = 20.0 * TIME_SCALE
"""Seconds after which the agent counts as stuck; nothing waits that long unless something is broken."""

_MARKER = {Family.IPV4: ("198.18.0.1", "198.18.0.2"), Family.IPV6: ("2001:db8:ffff::1", "2001:db8:ffff::2")}
_NAMESPACE = "sluice-scenarios"


class Feed(Protocol):
    """How objects reach the agent."""

    arguments: list[str]
    config: dict[str, Any]
    """What the configuration must say for it."""

    def publish(self, objects: Iterable[Manifest]) -> None:
        """These are all objects; the agent learns of all changes at once."""


class ManifestFeed:
    """A manifest directory with one file in it, replaced as a whole."""

    def __init__(self, directory: Path) -> None:
        self.arguments = ["--manifests", str(directory)]
        self.config: dict[str, Any] = {}
        self._file = directory / "objects.yaml"
        directory.mkdir()

    def publish(self, objects: Iterable[Manifest]) -> None:
        new = self._file.with_name(".objects.new")
        # JSON is YAML.
        new.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": list(objects)}))
        new.replace(self._file)


class Agent:
    """`sluice run` on node1 of a world."""

    def __init__(self, world: World, directory: Path, mode: str = "nftables", feed: Feed | None = None) -> None:
        self.world = world
        self.mode = mode
        self.families = (Family.IPV4, Family.IPV6) if world.ipv6 else (Family.IPV4,)
        self.log = directory / "agent.log"
        self.run_directory = directory / "run"
        self.code: Path | None = None
        """Where the program is that runs; None: in this checkout."""
        self._directory = directory
        self._feed: Feed = feed or ManifestFeed(directory / "manifests")
        self._config: dict[str, Any] | None = None
        self._process: subprocess.Popen[Any] | None = None
        self._generation = 0

    def configure(self, fragment: dict[str, Any]) -> None:
        """Run with the standard configuration and a fragment merged into it; restart only if it is another."""
        config = merge(merge(_standard_config(self.mode), self._feed.config), fragment)
        # Without a mode the meaning is that of iptables, on the dataplane that is preferred: here, on the one in test.
        config["mode"] = config["mode"] or ("" if self.mode == "nftables" else self.mode)
        if config != self._config or self._process is None or self._process.poll() is not None:
            self.stop()
            self._config = config
            self.start()

    def start(self) -> None:
        """Start the agent with the configuration that it had."""
        (self._directory / "config.yaml").write_bytes(msgspec.json.encode(self._config))
        with self.log.open("ab") as log:
            options = {"stderr": subprocess.STDOUT, "cwd": self.code}
            self._process = self.world.start("node1", self.command(), stdout=log, **options)

    def command(self) -> list[str]:
        """The agent's command line."""
        file = self._directory / "config.yaml"
        own = ["--config", str(file), "--run-directory", str(self.run_directory)]
        return [sys.executable, "-m", "proxy", "run", *own, *self._feed.arguments]

    @property
    def pid(self) -> int:
        """The agent's process, which must run."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End the agent without giving it a chance to do anything."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """Stop the agent, if it runs; the rules stay."""
        if self._process is not None:
            self._process.terminate()
            code = self._process.wait(timeout=DEADLINE)
            self._process = None
            assert code in (0, -15), f"the agent ended with {code} on SIGTERM:\n{self.tail()}"

    def publish(self, objects: Iterable[Manifest]) -> None:
        """Hand objects to the agent, with the next marker, and don't wait."""
        self._generation = self._generation % 65535 + 1
        self._feed.publish([*objects, *_marker(self._generation, self.families)])

    def apply(self, objects: Iterable[Manifest]) -> None:
        """Hand objects to the agent and wait until the kernel holds them."""
        self.publish(objects)
        self.wait()

    def wait(self) -> None:
        """Wait until the kernel holds what was published last."""
        for family in self.families:
            address, backend = (parse_address(text) for text in _MARKER[family])
            frontend = Frontend(address, Transport.TCP, self._generation)
            wanted = frozenset({Backend(backend, self._generation)})

            def marked(table: ForwardingTable | None, frontend: Frontend = frontend, wanted: Any = wanted) -> bool:
                route = table.routes.get(frontend) if table else None
                return route is not None and route.backends == wanted

            self._until(family, marked, f"the kernel never got publication {self._generation}")

    def settle(self) -> None:
        """Wait until addresses are the node's that should be, and no others: in userspace mode routes come later.

        Those that a connection still uses go when it ends, so there must be none that stays open.
        """
        if self.mode != "userspace":
            return
        for family in self.families:
            wanted, head = agent_socket.table(family, str(self.run_directory))
            held = fit(wanted, head.capabilities)

            def routed(_: object, held: ForwardingTable = held) -> bool:
                routes = self.world.namespaces["node1"].inside(lambda: read_routes(held.family))
                addresses = {frontend.address for frontend in held.routes}
                return routes.ours == needed(addresses, held.node.service_cidrs, routes.others)

            self._until(family, routed, "addresses that no Service has are the node's, or others are not")

    def expect_empty(self, objects: Iterable[Manifest]) -> None:
        """Publish objects that are no Services, and wait until nothing of any Service is left.

        Raises:
            AssertionError: something is.
        """
        self._feed.publish(objects)

        def empty(table: ForwardingTable | None) -> bool:
            return table is not None and not (table.routes or table.hairpins or table.damage)

        for family in self.families:
            self._until(family, empty, "the table is not empty after everything was removed")

    def read(self, family: Family) -> ForwardingTable | None:
        """What node1's kernel holds."""

        def inside() -> ForwardingTable | None:
            dataplane = open_dataplane(self.mode, family)
            try:
                return dataplane.read()
            finally:
                dataplane.close()

        return self.world.namespaces["node1"].inside(inside)

    @property
    def capabilities(self) -> Capabilities:
        """What the mode's dataplane can do."""

        def inside() -> Capabilities:
            dataplane = open_dataplane(self.mode, self.families[0])
            try:
                return dataplane.capabilities
            finally:
                dataplane.close()

        return self.world.namespaces["node1"].inside(inside)

    def sweep(self) -> None:
        """Stop the agent, and remove what it would have left in the kernel and as processes."""
        self.stop()

        def inside() -> None:
            for family in self.families:
                dataplane = open_dataplane(self.mode, family)
                try:
                    dataplane.cleanup()
                finally:
                    dataplane.close()

        self.world.namespaces["node1"].inside(inside)

    def tail(self) -> str:
        """The end of the agent's log."""
        return "\n".join(self.log.read_text().splitlines()[-30:]) if self.log.exists() else ""

    def _until(self, family: Family, holds: Callable[[ForwardingTable | None], bool], what: str) -> None:
        deadline = time.monotonic() + DEADLINE
        pause = 0.002
        while not holds(table := self.read(family)):
            if self._process is None or self._process.poll() is not None:
                what = f"the agent does not run; {what}"
                deadline = 0.0
            assert time.monotonic() < deadline, f"{family.label}: {what}\nkernel: {table}\nlog:\n{self.tail()}"
            time.sleep(pause)
            pause = min(pause * 2, 0.1 * TIME_SCALE)


def _standard_config(mode: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": mode,
        "hostnameOverride": "node1",
        "clusterCIDR": "10.244.0.0/16,fd00:244::/32",
        # Changes act at once (0s would mean the default), and the node's connection tracking limits stay as they are.
        # Modes without a section of their own go by that of iptables.
        (mode if mode in {"nftables", "ipvs"} else "iptables"): {"minSyncPeriod": "1ms", "syncPeriod": "30s"},
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    }


def _marker(generation: int, families: Iterable[Family]) -> list[Manifest]:
    ips = [_MARKER[family][0] for family in families]
    metadata = {"name": "marker", "namespace": _NAMESPACE}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata,
        "spec": {
            "type": "ClusterIP",
            "clusterIP": ips[0],
            "clusterIPs": ips,
            "ipFamilies": [family.label for family in families],
            "ports": [{"port": generation, "protocol": "TCP"}],
        },
    }
    slices = [
        {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {
                "name": f"marker-{family.label.lower()}",
                "namespace": _NAMESPACE,
                "labels": {"kubernetes.io/service-name": "marker"},
            },
            "addressType": family.label,
            "endpoints": [{"addresses": [_MARKER[family][1]], "conditions": {"ready": True}}],
            "ports": [{"name": "", "port": generation, "protocol": "TCP"}],
        }
        for family in families
    ]
    return [service, *slices]
