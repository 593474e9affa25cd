"""Sluice in kube-proxy's place and back: recorded rules of kube-proxy in node1's kernel, and the agent beside them.

No connection fails meanwhile.  The real program does the same where KUBE_PROXY_BIN says where it is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
import ryaml

from proxy.demo.world import World
from rules.forwarding import Family
from rules.iptables.programs import BACKENDS, available
from tests.netns.agent import DEADLINE, Agent, ManifestFeed
from tests.netns.api_feed import ApiFeed
from tests.netns.asking import answering, eventually, nft, said
from tests.netns.runner import backends
from tests.netns.streams import Stream, streaming
from tests.scenarios.schema import Manifest

# One world for all of them.
pytestmark = pytest.mark.xdist_group("takeover")

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
    Stream("hairpin", "p1", "10.96.30.13", 80, frozenset({"p1"})),
)
"""Through the recording's Services; the affinity of clients is kube-proxy's own, and is chosen anew."""
REAL = os.environ.get("KUBE_PROXY_BIN", "")
KUBELETS = ("KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-IPTABLES-HINT")


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
            rules += "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"
            self._restore(f"{program}-{backend}-restore", rules)

    def _restore(self, program: str, rules: str) -> None:
        def inside() -> None:
            subprocess.run([program, "--noflush"], input=rules.encode(), check=True, capture_output=True)

        self.world.namespaces["node1"].inside(inside)

    def there(self) -> bool:
        """Whether anything of kube-proxy's is left, in any kind."""
        chains = re.findall(r"^:(KUBE-\S+)|(?:-j|-g) (KUBE-\S+)", "\n".join(listings(self.world)), re.MULTILINE)
        names = {name for pair in chains for name in pair if name}
        return "kube-proxy" in nft(self.world, "list", "tables") or bool(names.difference(KUBELETS))


def listings(world: World) -> list[str]:
    """What iptables-save prints of node1, by each program."""
    return [said(world, f"{name}-{kind}-save") for kind in BACKENDS for name in ("iptables", "ip6tables")]


def ours_there(world: World) -> bool:
    return "sluice" in nft(world, "list", "tables") or any("SLUICE-" in each for each in listings(world))


def cleanup(world: World, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`sluice cleanup` on node1."""
    command = [sys.executable, "-m", "proxy", "cleanup", *arguments]
    return world.namespaces["node1"].inside(
        lambda: subprocess.run(command, capture_output=True, text=True, check=False)
    )


@pytest.fixture(scope="module")
def takeover_world(root: None) -> Iterator[World]:
    if missing := set(BACKENDS) - available(Family.IPV4).keys():
        pytest.skip(f"iptables-{missing.pop()} is not installed")
    with World(prefix="sluice-over") as world:
        yield world


@pytest.fixture
def clean(takeover_world: World) -> Iterator[World]:
    """The world, with the endpoints listening and no rules of anybody; and without any afterwards."""
    takeover_world.probes.open(backends(objects()))
    yield takeover_world
    takeover_world.probes.shut()
    done = cleanup(takeover_world, "--of", "all")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("nftables", "nftables"),
        ("iptables-nft", "nftables"),
        ("iptables-legacy", "iptables"),
        ("nftables", "iptables"),
    ],
)
def test_the_agent_takes_kube_proxys_place_and_gives_it_back_and_no_connection_fails(
    kind: str, mode: str, clean: World, tmp_path: Path
) -> None:
    """IPT-32, NFT-23, B-161, CFG-52."""
    theirs = Theirs(clean, kind)
    theirs.load()
    agent = Agent(clean, tmp_path, mode)
    try:
        with streaming(clean, STREAMS) as there:
            agent.configure({})
            agent.apply(objects())
            eventually(lambda: not theirs.there(), f"the end of kube-proxy's {kind} rules")
        assert ours_there(clean)
        assert kind == "nftables" or all(name in "".join(listings(clean)) for name in KUBELETS)
        with streaming(clean, STREAMS) as back:
            agent.stop()
            theirs.load()
            done = cleanup(clean)
        assert done.returncode == 0, done.stderr
    finally:
        agent.stop()
    assert theirs.there()
    assert not ours_there(clean)
    assert not there.wrong(), f"of {there.made} connections"
    assert not back.wrong(), f"of {back.made} connections"


def test_rules_of_a_kube_proxy_that_runs_stay_and_the_agent_says_so(clean: World, tmp_path: Path) -> None:
    theirs = Theirs(clean, "nftables")
    theirs.load()
    program = tmp_path / "kube-proxy"
    shutil.copy(shutil.which("sleep") or "", program)
    running = clean.start("node1", [str(program), "600"])
    agent = Agent(clean, tmp_path, "nftables")
    try:
        eventually(lambda: Path(f"/proc/{running.pid}/comm").read_text() == "kube-proxy\n", "its name")
        agent.configure({})
        agent.apply(objects())
        wanted = f"kube-proxy runs in this network namespace (process {running.pid})"
        eventually(lambda: wanted in agent.log.read_text(), "the agent's word")
        assert theirs.there()
        done = cleanup(clean, "--of", "kube-proxy")
        assert done.returncode == 2
        assert f"{wanted}: stop it first" in done.stderr
        running.kill()
        running.wait(timeout=DEADLINE)
        # Beside the agent, which is no obstacle to it.
        done = cleanup(clean, "--of", "kube-proxy")
        assert done.returncode == 0, done.stderr
        assert "removed kube-proxy's nftables rules for IPv4: the table ip kube-proxy\n" in done.stdout
        assert not theirs.there()
        assert served(clean)
    finally:
        running.kill()
        agent.stop()


def test_rules_of_kube_proxy_stay_where_the_configuration_says_so(clean: World, tmp_path: Path) -> None:
    theirs = Theirs(clean, "nftables")
    theirs.load()
    feed = ManifestFeed(tmp_path / "manifests")
    feed.arguments.append("--remove-kube-proxy-rules=false")
    agent = Agent(clean, tmp_path, "nftables", feed)
    # What another mode of ours has left goes at the same moment, right before kube-proxy's rules would.
    said(clean, "iptables-nft", "-t", "nat", "-N", "SLUICE-OLD")
    try:
        agent.configure({})
        agent.apply(objects())
        eventually(lambda: "removed what another mode had left" in agent.log.read_text(), "the moment after the sync")
    finally:
        agent.stop()
    assert "table ip kube-proxy" in nft(clean, "list", "tables")
    assert "table ip6 kube-proxy" in nft(clean, "list", "tables")


@pytest.mark.skipif(not REAL, reason="KUBE_PROXY_BIN does not say where a kube-proxy is")
@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_the_agent_changes_places_with_the_real_program(mode: str, clean: World, tmp_path: Path) -> None:
    theirs = Theirs(clean, mode)
    with ApiFeed(clean, tmp_path) as feed:
        agent = Agent(clean, tmp_path, mode, feed)
        feed.publish(objects())
        config = ryaml.loads((RECORDING / "config.yaml").read_text()) | feed.config | {"mode": mode}  # type: ignore[attr-defined]
        file = tmp_path / "kube-proxy.conf"
        file.write_bytes(msgspec.json.encode(config))

        def start() -> subprocess.Popen[bytes]:
            with (tmp_path / "kube-proxy.log").open("ab") as log:
                running = clean.start("node1", [REAL, "--config", str(file)], stdout=log, stderr=subprocess.STDOUT)
            eventually(lambda: theirs.there() and served(clean), "kube-proxy's rules")
            return running

        def end(running: subprocess.Popen[bytes]) -> None:
            running.terminate()
            running.wait(timeout=DEADLINE)

        try:
            running = start()
            with streaming(clean, STREAMS) as there:
                end(running)
                agent.configure({})
                agent.apply(objects())
                eventually(lambda: not theirs.there(), "the end of kube-proxy's rules")
            with streaming(clean, STREAMS) as back:
                agent.stop()
                running = start()
                done = cleanup(clean)
            assert done.returncode == 0, done.stderr
            end(running)
        finally:
            agent.stop()
    assert not ours_there(clean)
    assert not there.wrong(), f"of {there.made} connections"
    assert not back.wrong(), f"of {back.made} connections"


def served(world: World) -> bool:
    return answering(world, "p4", "10.96.30.1", 80) == {"p1", "p2", "q1"}


def test_what_is_half_removed_edited_or_doubled_goes_too_and_nothing_else(clean: World) -> None:
    for kind in ("nftables", "iptables-nft", "iptables-legacy"):
        Theirs(clean, kind).load()
    legacy = "iptables-legacy"
    mine = [
        (legacy, "-t", "nat", "-D", "PREROUTING", "1"),
        (legacy, "-t", "nat", "-F", "KUBE-SERVICES"),
        (legacy, "-t", "nat", "-A", "KUBE-POSTROUTING", "-j", "RETURN"),
        (legacy, "-A", "FORWARD", "-m", "comment", "--comment", "is -j KUBE-SERVICES", "-j", "ACCEPT"),
        (legacy, "-A", "FORWARD", "-s", "192.0.2.1", "-j", "KUBE-FORWARD"),
        (legacy, "-N", "KUBE-ROUTER-INPUT"),
        (legacy, "-A", "INPUT", "-j", "KUBE-ROUTER-INPUT"),
        ("iptables-nft", "-t", "nat", "-N", "CNI-HOSTPORT"),
        ("iptables-nft", "-t", "nat", "-A", "CNI-HOSTPORT", "-j", "KUBE-MARK-MASQ"),
        ("nft", "delete", "chain", "ip", "kube-proxy", "nat-output"),
        ("nft", "add", "table", "inet", "kube-proxy"),
    ]
    for command in mine:
        said(clean, *command)
    done = cleanup(clean, "--of", "kube-proxy")
    assert (done.returncode, done.stderr) == (0, "")
    assert "the chain KUBE-MARK-MASQ of the table nat stays: CNI-HOSTPORT leads there\n" in done.stdout
    held = "\n".join(listings(clean))
    chains = set(re.findall(r"^:(KUBE-\S+)", held, re.MULTILINE))
    assert chains == {*KUBELETS, "KUBE-ROUTER-INPUT", "KUBE-MARK-MASQ"}
    rules = [line for line in held.splitlines() if line.startswith("-A ")]
    assert sorted(line for line in rules if "KUBE-FIREWALL" not in line) == [
        "-A CNI-HOSTPORT -j KUBE-MARK-MASQ",
        '-A FORWARD -m comment --comment "is -j KUBE-SERVICES" -j ACCEPT',
        "-A INPUT -j KUBE-ROUTER-INPUT",
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
    ]
    assert "inet kube-proxy" in nft(clean, "list", "tables")
    nft(clean, "delete", "table", "inet", "kube-proxy")
    for line in ("-D FORWARD 1", "-D INPUT -j KUBE-ROUTER-INPUT", "-X KUBE-ROUTER-INPUT"):
        said(clean, legacy, *line.split())
    for line in ("-F CNI-HOSTPORT", "-X CNI-HOSTPORT"):
        said(clean, "iptables-nft", "-t", "nat", *line.split())
