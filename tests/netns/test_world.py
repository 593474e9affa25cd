"""The world and its probes, without the agent: small rules by `nft` stand for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP

from proxy.demo import namespaces, plan
from proxy.demo.probes import Outcome, Probe, Server
from proxy.demo.world import World
from tests.netns.scapy_probes import capture, probe_sctp

RULES = """
table ip world-test {
  chain nat-prerouting {
    type nat hook prerouting priority dstnat
    ip daddr 10.96.0.1 meta l4proto { tcp, udp, sctp } th dport 80 dnat to 10.244.1.11:8080
    ip daddr 10.96.0.4 meta l4proto { tcp, udp, sctp } th dport 80 meta mark set 1 dnat to 10.244.2.11:8080
  }
  chain nat-postrouting { type nat hook postrouting priority srcnat; meta mark 1 masquerade fully-random; }
  chain forward {
    type filter hook forward priority filter
    ip daddr 10.96.0.2 reject
    ip daddr 10.96.0.3 drop
  }
}
table ip6 world-test {
  chain forward {
    type filter hook forward priority filter
    ip6 daddr fd00:10:96::2 reject
    ip6 daddr fd00:10:96::3 drop
  }
}
"""


@pytest.fixture(scope="module")
def ruled(root):
    """A world of its own whose node1 has RULES; every host answers on port 8080."""
    if shutil.which("nft") is None:
        pytest.skip("the nft program is not installed")
    with World(prefix="sluice-rules") as world:
        world.probes.open(Server(host, protocol, "", 8080) for host in plan.HOSTS for protocol in ("TCP", "UDP"))
        nft = world.start("node1", ["nft", "-f", "-"], stdin=subprocess.PIPE)
        nft.communicate(RULES.encode())
        assert nft.returncode == 0
        yield world


def one(world: World, host: str, address: str, port: int = 80, **options) -> Outcome:
    [[outcome]] = world.probes.probe(Probe(host=host, address=address, port=port, **options))
    return outcome


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_every_host_reaches_every_address_and_is_seen_as_itself(ruled, protocol):
    pairs = [
        (host, address)
        for host in plan.HOSTS
        for address in plan.HOST_OF
        if ruled.ipv6 or ":" not in address
    ]  # fmt: skip
    probes = [Probe(host=host, address=address, port=8080, protocol=protocol) for host, address in pairs]
    for (host, address), [outcome] in zip(pairs, ruled.probes.probe(*probes), strict=True):
        assert (outcome.kind, outcome.host, outcome.address) == ("answered", plan.HOST_OF[address], address), host
        assert outcome.peer == outcome.local
        assert plan.HOST_OF[outcome.peer[0]] == host


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_translated_connection_is_answered_by_the_backend_with_the_source_kept(ruled, protocol):
    for client in ("p2", "q1", "c", "x"):
        outcome = one(ruled, client, "10.96.0.1", protocol=protocol)
        assert (outcome.host, outcome.address, outcome.port) == ("p1", "10.244.1.11", 8080)
        assert outcome.peer == outcome.local


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
def test_a_masqueraded_connection_shows_the_nodes_own_address(ruled, protocol):
    for client in ("p2", "c", "x"):
        outcome = one(ruled, client, "10.96.0.4", protocol=protocol)
        assert (outcome.host, outcome.peer[0]) == ("q1", "192.168.50.11")


@pytest.mark.parametrize("protocol", ["TCP", "UDP"])
@pytest.mark.parametrize("prefix", ["10.96.0.", "fd00:10:96::"])
def test_refused_dropped_and_untouched_are_told_apart(ruled, protocol, prefix):
    if ":" in prefix and not ruled.ipv6:
        pytest.skip("the kernel is without IPv6")
    for client in ("p2", "c"):
        refused = one(ruled, client, f"{prefix}2", protocol=protocol)
        assert refused.refused
        assert plan.HOST_OF[refused.sender] == "node1"
        assert one(ruled, client, f"{prefix}3", protocol=protocol, timeout=0.5).kind == "silent"
        untouched = one(ruled, client, f"{prefix}5", 8080, protocol=protocol)
        assert (untouched.host, untouched.address) == ("upstream", f"{prefix}5")
        closed = one(ruled, client, f"{prefix}5", 9, protocol=protocol)
        if protocol == "TCP":
            assert closed.kind == "reset"
        else:
            assert closed.sender not in plan.NODE1.addresses


def test_many_silent_connections_take_the_time_of_one(ruled):
    probe = Probe(host="c", address="10.96.0.3", port=80, count=100, timeout=0.5)
    [outcomes] = ruled.probes.probe(probe)
    assert {outcome.kind for outcome in outcomes} == {"silent"}
    assert max(outcome.began for outcome in outcomes) - min(outcome.began for outcome in outcomes) < 0.5


def test_a_probe_comes_from_the_address_and_port_it_was_told(ruled):
    outcome = one(ruled, "node1", "10.244.1.11", 8080, source="192.168.51.11", source_port=40001)
    assert outcome.peer == outcome.local == ("192.168.51.11", 40001)


def test_a_server_that_was_shut_answers_no_more(ruled):
    server = Server("p4", "TCP", "10.244.1.14", 9090)
    ruled.probes.open([server])
    assert one(ruled, "p1", "10.244.1.14", 9090).kind == "answered"
    ruled.probes.shut([server])
    assert one(ruled, "p1", "10.244.1.14", 9090).kind == "reset"


def test_a_stream_of_connections_tells_when_each_began(ruled):
    ruled.probes.start("s", Probe(host="c", address="10.96.0.1", port=80), interval=0.005)
    assert one(ruled, "c", "10.96.0.3", timeout=0.1).kind == "silent"  # meanwhile
    outcomes = ruled.probes.stop("s")
    assert len(outcomes) > 3
    assert {outcome.kind for outcome in outcomes} == {"answered"}
    begins = [outcome.began for outcome in outcomes]
    assert begins == sorted(begins)
    assert begins[-1] < time.monotonic()


def test_sctp_arrives_translated_refused_dropped_or_untouched(ruled):
    def sctp(host: str, address: str) -> Outcome:
        [outcome] = probe_sctp(ruled, Probe(host=host, address=address, port=80, timeout=0.5))
        return outcome

    kept = sctp("c", "10.96.0.1")
    assert (kept.host, kept.address, kept.port, kept.peer == kept.local) == ("p1", "10.244.1.11", 8080, True)
    masqueraded = sctp("p2", "10.96.0.4")
    assert (masqueraded.host, masqueraded.port, masqueraded.peer[0]) == ("q1", 8080, "192.168.50.11")
    assert sctp("p2", "10.96.0.2").refused
    assert sctp("p2", "10.96.0.3").kind == "silent"
    untouched = sctp("p2", "10.96.0.5")
    assert (untouched.host, untouched.address, untouched.port) == ("upstream", "10.96.0.5", 80)


def test_a_capture_shows_the_translated_syn_at_the_pods_interface(ruled):
    with capture(ruled, "p1") as seen:
        outcome = one(ruled, "c", "10.96.0.1")
        packet = seen.until(TCP, dport=8080, sport=outcome.local[1])
    assert packet[TCP].flags == "S"
    assert (packet[IP].src, packet[IP].dst) == ("192.168.50.100", "10.244.1.11")


# --- coming and going ---------------------------------------------------------------------------------------------


def names(prefix: str, pid: int) -> list[str]:
    return [path.name for path in namespaces.RUN.glob(f"{prefix}-{pid}-*")]


def test_a_world_without_ipv6_has_none(root):
    with World(prefix="sluice-v4", ipv6=False) as world:
        world.probes.open([Server("p1", "TCP", "", 80)])
        assert one(world, "c", "10.244.1.11").host == "p1"
        assert one(world, "c", "fd00:244:1::11").kind == "failed"


def links() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def test_nothing_is_left_behind_after_an_error(root):
    before = links()
    started = []

    def fail() -> None:
        with World(prefix="sluice-gone") as world:
            started.append(world.start("p1", ["sleep", "1000"]))
            assert len(names("sluice-gone", os.getpid())) == len(plan.HOSTS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names("sluice-gone", os.getpid()) == []
    assert started[0].poll() == -signal.SIGTERM
    assert links() == before


def runs(pid: int) -> bool:
    """Whether a process is there and not just waiting for somebody to take notice of its end."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


SCRIPT = """
import signal, sys
from proxy.demo.world import World
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
with World(prefix="sluice-child") as world:
    print(world.start("p1", ["sleep", "1000"]).pid, flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_signal(root, number):
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    with child:
        sleeper = int(child.stdout.readline())
        assert names("sluice-child", child.pid)
        child.send_signal(number)
    if number == signal.SIGKILL:
        # Its processes end by themselves; its names go with the next world.
        namespaces.remove_stale("sluice-child")
    deadline = time.monotonic() + 20
    while runs(sleeper) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not runs(sleeper)
    assert names("sluice-child", child.pid) == []
