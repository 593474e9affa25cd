"""Taking kube-proxy's place on node1 of a world: its recorded rules, streams of connections, what is there of whom."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ryaml

from proxy.demo.world import World
from rules.forwarding import Family
from rules.iptables.programs import BACKENDS, Backend, available
from tests.netns.asking import answering, nft, said
from tests.netns.runner import backends
from tests.netns.streams import Stream
from tests.scenarios.schema import Manifest

RECORDING = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
STREAMS = (
    Stream("ClusterIP", "p4", "10.96.30.1", 80, frozenset({"p1", "p2", "q1"})),
    Stream("ClusterIP from the node", "node1", "10.96.30.1", 443, frozenset({"p1", "p2", "q1"})),
    Stream("ClusterIP by UDP", "p4", "10.96.30.2", 53, frozenset({"p1", "q2"}), "UDP"),
    Stream("ClusterIP by UDP and IPv6", "p4", "fd00:10:96::3002", 53, frozenset({"p1"}), "UDP"),
    Stream("ClusterIP by IPv6", "p4", "fd00:10:96::3014", 80, frozenset({"p1", "q1"})),
    Stream("node port", "c", "192.168.50.11", 31080, frozenset({"p1", "q1"})),
    Stream("policy Local, node port", "c", "192.168.50.11", 31081, frozenset({"p1"})),
    Stream("load balancer, source ranges", "c", "203.0.113.30", 80, frozenset({"p2", "q2"})),
    Stream("policy Local, from a pod", "p4", "203.0.113.31", 443, frozenset({"q1"})),
    Stream("affinity", "p4", "10.96.30.8", 80, frozenset({"p1", "p2"})),
    Stream("external IP", "p4", "192.0.2.30", 80, frozenset({"p3"})),
    Stream("hairpin", "p1", "fd00:10:96::3002", 53, frozenset({"p1"}), "UDP"),
    Stream("hairpin of a pod that ends", "p1", "10.96.30.13", 80, frozenset({"p1"})),
)
"""Through the recording's Services; the affinity of clients is kube-proxy's own, and is chosen anew.

The last is for a kube-proxy from 1.26 on.
"""
KUBELETS = ("KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT", "KUBE-MARK-DROP")
_OF_KUBELET = """*mangle
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-IPTABLES-HINT - [0:0]
COMMIT
*nat
:KUBE-MARK-DROP - [0:0]
-A KUBE-MARK-DROP -j MARK --set-xmark 0x8000/0x8000
COMMIT
"""
_FIREWALL_OF_KUBELET = """*filter
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL -m mark --mark 0x8000/0x8000 -j DROP
-A KUBE-FIREWALL ! -s 127.0.0.0/8 -d 127.0.0.0/8 -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
COMMIT
"""


def objects() -> list[Manifest]:
    """What the recorded kube-proxy served."""
    items: list[Manifest] = ryaml.loads((RECORDING / "objects.yaml").read_text())["items"]  # type: ignore[attr-defined]
    return items


class Theirs(NamedTuple):
    """A kind of kube-proxy's rules in node1 of a world."""

    world: World
    kind: str

    def load(self) -> None:
        """Put the recorded rules, and the kubelet's, beside what is there."""
        if self.kind == "nftables":
            nft(self.world, "-f", str(RECORDING / "nftables.nft"))
            return
        backend = self.kind.removeprefix("iptables-")
        prefix = "iptables" if backend == "nft" else "iptables-legacy"
        for program, suffix in (("iptables", "iptables-save"), ("ip6tables", "ip6tables-save")):
            # Its counters are objects of the kernel, which kube-proxy makes beforehand (IPT-31).
            rules = re.sub(r" -m nfacct --nfacct-name  \S+", "", (RECORDING / f"{prefix}.{suffix}").read_text())
            _restore(self.world, f"{program}-{backend}-restore", rules + _OF_KUBELET, "--noflush")

    def there(self) -> bool:
        """Whether anything of kube-proxy's is left, in any kind."""
        chains = re.findall(r"^:(KUBE-\S+)|(?:-j|-g) (KUBE-\S+)", "\n".join(listings(self.world)), re.MULTILINE)
        names = {name for pair in chains for name in pair if name}
        return "kube-proxy" in nft(self.world, "list", "tables") or bool(names.difference(KUBELETS))


def _restore(world: World, program: str, rules: str, *options: str) -> None:
    def inside() -> None:
        subprocess.run([program, *options], input=rules.encode(), check=True, capture_output=True)

    world.namespaces["node1"].inside(inside)


def kubelet(world: World, backend: Backend) -> None:
    """Have node1's kernel hold what a kubelet before 1.28 writes, on which a kube-proxy of that time relies."""
    _restore(world, f"iptables-{backend}-restore", _OF_KUBELET + _FIREWALL_OF_KUBELET, "--noflush")
    _restore(world, f"ip6tables-{backend}-restore", _OF_KUBELET, "--noflush")


def listings(world: World) -> list[str]:
    """What iptables-save prints of node1, by each program."""
    return [said(world, f"{name}-{kind}-save") for kind in BACKENDS for name in ("iptables", "ip6tables")]


def ours_there(world: World) -> bool:
    return "sluice" in nft(world, "list", "tables") or any("SLUICE-" in each for each in listings(world))


def cleanup(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`sluice cleanup` on node1."""
    return sluice(world, "cleanup", *arguments)


def sluice(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A verb on node1."""
    command = [sys.executable, "-m", "proxy", *arguments]
    return world.namespaces["node1"].inside(
        lambda: subprocess.run(command, capture_output=True, text=True, check=False)
    )


def served(world: World) -> bool:
    return answering(world, "p4", "10.96.30.1", 80) == {"p1", "p2", "q1"}


@contextlib.contextmanager
def worlds() -> Iterator[World]:
    """A world, where both kinds of iptables are there."""
    if missing := set(BACKENDS) - available(Family.IPV4).keys():
        pytest.skip(f"iptables-{missing.pop()} is not installed")
    with World(prefix="sluice-over") as world:
        yield world


@contextlib.contextmanager
def cleaned(world: World) -> Iterator[World]:
    """The world, with the endpoints listening and no rules of anybody; and without any afterwards."""
    world.probes.open(backends(objects()))
    yield world
    world.probes.shut()
    done = cleanup(world, "--of", "all")
    assert done.returncode == 0, done.stderr
    for kind in BACKENDS:
        for program in ("iptables", "ip6tables"):
            _restore(world, f"{program}-{kind}-restore", "*mangle\nCOMMIT\n*nat\nCOMMIT\n*filter\nCOMMIT\n")
