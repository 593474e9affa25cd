"""Sluice in kube-proxy's place and back: recorded rules of kube-proxy in node1's kernel, and the agent beside them.

No connection fails meanwhile.  test_takeover_real.py does the same with the real program.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.demo.world import World
from tests.netns.agent import DEADLINE, Agent, ManifestFeed
from tests.netns.api_feed import ApiFeed
from tests.netns.asking import eventually, nft, said
from tests.netns.streams import streaming
from tests.netns.taking_over import (
    KUBELETS,
    STREAMS,
    Theirs,
    cleaned,
    cleanup,
    listings,
    objects,
    ours_there,
    served,
    sluice,
    worlds,
)

# One world for all of them.
pytestmark = pytest.mark.xdist_group("takeover")


@pytest.fixture(scope="module")
def takeover_world(root: None) -> Iterator[World]:
    with worlds() as world:
        yield world


@pytest.fixture
def clean(takeover_world: World) -> Iterator[World]:
    """The world, with the endpoints listening and no rules of anybody."""
    with cleaned(takeover_world) as world:
        yield world


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
        eventually(lambda: not theirs.there(), "the end of its rules, which nobody keeps up to date")
        assert agent.log.read_text().count("rules of kube-proxy stay") == len(agent.families)
        assert served(clean)
        theirs.load()
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
    assert sorted(line for line in rules if not re.search("KUBE-(FIREWALL|MARK-DROP)", line)) == [
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


@pytest.mark.parametrize("kind", ["nftables", "iptables-legacy"])
def test_explain_tells_beside_the_api_servers_objects_where_kube_proxys_rules_lag(
    kind: str, clean: World, tmp_path: Path
) -> None:
    Theirs(clean, kind).load()
    before = objects()
    [moved] = [each for each in before if each["metadata"]["name"].startswith("np-")]
    after = [each if each is not moved else {**each, "endpoints": each["endpoints"][:1]} for each in before]
    with ApiFeed(clean, tmp_path) as feed:
        kubeconfig = ("--kubeconfig", feed.config["clientConnection"]["kubeconfig"])

        def explained(*options: str, target: str = "192.168.50.11:31080") -> subprocess.CompletedProcess[str]:
            return sluice(clean, "explain", *options, *kubeconfig, "--hostname-override", "node1", target)

        feed.publish(before)
        done = explained()
        assert (done.returncode, "NOT what" in done.stdout) == (0, False), done.stderr
        feed.publish(after)
        done = explained()
        assert done.returncode == 0, done.stderr
        assert "What the kernel holds is NOT what is wanted here:" in done.stdout
        assert "*:31080/TCP: backend: wanted none, the kernel has 10.244.2.11:8080\n" in done.stdout
        served = {**moved["metadata"], "name": "void-1", "labels": {"kubernetes.io/service-name": "void"}}
        feed.publish([*before, {**moved, "metadata": served}])
        done = explained(target="default/void")
        assert done.returncode == 1, done.stderr
        assert "kube-proxy is late, has ended, or somebody has changed its rules" in done.stdout
        assert "sluice verify --of kube-proxy" in done.stdout
        done = explained("--watch")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "--watch: an API server is not listed again and again" in done.stderr
