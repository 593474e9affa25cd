"""Sluice in the real kube-proxy's place and back, where KUBE_PROXY_BIN says where one is (`make kube-proxy`).

It is started as kubeadm starts it, beside what a kubelet of its time writes.  No connection fails meanwhile.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from proxy.demo.world import World
from rules.dataplane import UnavailableError
from rules.iptables.programs import BACKENDS, Backend
from rules.ipvs.services import Ipvs
from tests.kube_proxy.program import PATH, Kind, KubeProxy, version
from tests.netns.agent import Agent
from tests.netns.api_feed import ApiFeed
from tests.netns.asking import eventually, said
from tests.netns.streams import streaming
from tests.netns.taking_over import (
    KUBELETS,
    STREAMS,
    Theirs,
    cleaned,
    cleanup,
    kubelet,
    listings,
    objects,
    ours_there,
    served,
    sluice,
    worlds,
)
from tests.scenarios.schema import Manifest

pytestmark = [
    pytest.mark.xdist_group("takeover"),
    pytest.mark.skipif(not PATH, reason="KUBE_PROXY_BIN does not say where a kube-proxy is"),
]


@pytest.fixture(scope="module")
def takeover_world(root: None) -> Iterator[World]:
    with worlds() as world:
        yield world


@pytest.fixture
def clean(takeover_world: World) -> Iterator[World]:
    """The world, with the endpoints listening and no rules of anybody."""
    with cleaned(takeover_world) as world:
        yield world


@pytest.fixture
def ipvs(clean: World) -> None:
    """Skips where the kernel has no IPVS."""
    try:
        clean.namespaces["node1"].inside(lambda: Ipvs().close())
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("iptables-nft", "nftables"),
        ("iptables-nft", "iptables"),
        ("iptables-legacy", "nftables"),
        ("iptables-legacy", "iptables"),
        ("nftables", "nftables"),
    ],
)
def test_the_agent_changes_places_with_the_real_program(kind: str, mode: str, clean: World, tmp_path: Path) -> None:
    """IPT-32, NFT-23, with one that runs: the order is its end, our start, the end of its rules; and back."""
    found = version()
    if kind == "nftables" and not found.knows_nftables:
        pytest.skip(f"the kube-proxy of KUBE_PROXY_BIN is {found}, which has no mode nftables")
    streams = STREAMS if found.serves_terminating else STREAMS[:-1]
    back_streams = [each for each in streams if found.spares_udp or each.protocol != "UDP"]
    theirs = Theirs(clean, kind)
    mode_of_theirs = Kind(kind.partition("-")[0], "legacy" if kind.endswith("legacy") else "nft")
    with ApiFeed(clean, tmp_path, older=found.reads_v1beta1) as feed:
        agent = Agent(clean, tmp_path, mode, feed)
        feed.publish(objects())
        kube_proxy = KubeProxy(clean, tmp_path, mode_of_theirs, feed.config["clientConnection"])
        if kind != "nftables":
            kubelet(clean, mode_of_theirs.backend)
        running = kube_proxy.start()
        try:
            assert served(clean)
            with streaming(clean, streams) as there:
                running.end()
                agent.configure({})
                agent.apply(objects())
                eventually(lambda: not theirs.there(), "the end of kube-proxy's rules")
            assert kind == "nftables" or all(name in "".join(listings(clean)) for name in KUBELETS)
            assert ours_there(clean)
            with streaming(clean, back_streams) as back:
                agent.stop()
                running = kube_proxy.start()
                done = cleanup(clean)
            assert done.returncode == 0, done.stderr
        finally:
            running.end()
            agent.stop()
    assert theirs.there()
    assert not ours_there(clean)
    assert not there.wrong(), f"of {there.made} connections"
    assert not back.wrong(), f"of {back.made} connections"


def left_of_ipvs(world: World) -> set[str]:
    """What of kube-proxy's mode ipvs is there outside of iptables."""
    sets = {f"set {name}" for name in said(world, "ipset", "list", "-name").split() if name.startswith("KUBE-")}
    device = {"kube-ipvs0"} if "kube-ipvs0:" in said(world, "ip", "link", "show") else set()
    return sets | device


@pytest.mark.parametrize("mode", ["nftables", "ipvs"])
def test_the_real_programs_mode_ipvs_gives_its_place_and_leaves_nothing_on_request(
    mode: str, clean: World, ipvs: None, tmp_path: Path
) -> None:
    """IPVS-30: its rules go as soon as ours are in place; servers, device and sets when somebody says so."""
    theirs = Theirs(clean, "ipvs")
    found = version()
    # Before the fallback to endpoints of other nodes (IPVS-20) nobody reached those under policy Local from this one.
    streams = STREAMS if found.serves_terminating else [each for each in STREAMS[:-1] if "from a pod" not in each.about]
    # The node's own connections have their source on kube-ipvs0: those that are open end with it.
    of_others = [each for each in streams if each.host != "node1"]
    back_streams = [each for each in streams if found.spares_udp or each.protocol != "UDP"]
    with ApiFeed(clean, tmp_path, older=found.reads_v1beta1) as feed:
        agent = Agent(clean, tmp_path, mode, feed)
        feed.publish(objects())
        kube_proxy = KubeProxy(clean, tmp_path, Kind("ipvs"), feed.config["clientConnection"])
        kubelet(clean, "nft")
        running = kube_proxy.start()
        stranger = "192.168.50.11:9999"
        said(clean, "ipvsadm", "-A", "-t", stranger, "-s", "rr")
        try:
            assert served(clean)
            with streaming(clean, streams) as there:
                running.end()
                agent.configure({})
                agent.apply(objects())
                eventually(lambda: not theirs.there(), "the end of kube-proxy's rules")
            assert "kube-ipvs0" in left_of_ipvs(clean)
            with streaming(clean, of_others) as removal:
                done = cleanup(clean, "--of", "kube-proxy")
            assert (done.returncode, done.stderr) == (0, "")
            assert "removed the device kube-ipvs0 of kube-proxy's mode ipvs\n" in done.stdout
            assert re.search(r"^of ipvs for IPv4, 1 virtual server of others stay: ", done.stdout, re.MULTILINE)
            assert not left_of_ipvs(clean)
            servers = re.findall(r"^-A -[tu] (\S+)", said(clean, "ipvsadm", "-Sn"), re.MULTILINE)
            assert servers == [stranger] if mode == "nftables" else stranger in servers
            assert served(clean)
            assert not removal.wrong(), f"of {removal.made} connections"
            # There is no way back from our mode ipvs in one step: its virtual servers are kube-proxy's too.
            if mode == "nftables":
                with streaming(clean, back_streams) as back:
                    agent.stop()
                    running = kube_proxy.start()
                    done = cleanup(clean)
                assert done.returncode == 0, done.stderr
                assert not ours_there(clean)
                assert not back.wrong(), f"of {back.made} connections"
        finally:
            running.end()
            agent.stop()
            said(clean, "ipvsadm", "--clear")
    # Our mode ipvs closes a Service's other ports before it opens its own, which shows where the addresses are there.
    assert mode == "ipvs" or not there.wrong(), f"of {there.made} connections"


NODE = ("--hostname-override", "node1")


def without_what_is_newer(items: list[Manifest]) -> list[Manifest]:
    """Objects that a kube-proxy of 1.20 serves as one of today.

    It knows no internalTrafficPolicy, no zones' hints, no endpoints that end but serve, and lets nobody in at a
    health-check node port.
    """
    kept = [each for each in items if each["metadata"]["name"].partition("-")[0] not in {"itp", "zoned", "drain"}]
    for each in kept:
        each.get("spec", {}).pop("healthCheckNodePort", None)
    return kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_verbs_beside_the_real_program_say_what_it_holds_and_where_it_lags(
    backend: Backend, clean: World, tmp_path: Path
) -> None:
    """Wanted is what the API server says, or a file with what it said."""

    before = without_what_is_newer(objects())
    [moved] = [each for each in before if each["metadata"]["name"].startswith("np-")]
    after = [each if each is not moved else {**each, "endpoints": each["endpoints"][:1]} for each in before]
    file = tmp_path / "objects.json"
    file.write_bytes(msgspec.json.encode({"apiVersion": "v1", "kind": "List", "items": after}))
    asked = ("explain", "--live", "--of", "kube-proxy", *NODE, "192.168.50.11:31080")
    with ApiFeed(clean, tmp_path, older=version().reads_v1beta1) as feed:
        client = feed.config["clientConnection"]
        server = ("--kubeconfig", client["kubeconfig"])
        verify = ("verify", "--of", "kube-proxy", *server, *NODE)
        feed.publish(before)
        kubelet(clean, backend)
        with KubeProxy(clean, tmp_path, Kind("iptables", backend), client).running() as running:
            held = sluice(clean, "dump", "--of", "kube-proxy")
            assert held.returncode == 0
            assert f"IPv4 in kube-proxy's iptables-{backend} rules: 19 frontends\n" in held.stdout
            assert "DAMAGE" not in held.stdout
            done = sluice(clean, *verify)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "listed" not in done.stdout + done.stderr
            assert json.loads(sluice(clean, *verify, "-o", "json").stdout)["equal"]
            assert f"IPv4 in kube-proxy's iptables-{backend} rules: equal to what https://" in done.stdout
            assert f"IPv6 in kube-proxy's iptables-{backend} rules: equal to what https://" in done.stdout
            done = cleanup(clean, "--of", "kube-proxy")
            assert done.returncode == 2
            assert f"kube-proxy runs in this network namespace (process {running.process.pid}): stop it" in done.stderr
            running.process.send_signal(signal.SIGSTOP)
            feed.publish(after)
            done = sluice(clean, *verify)
            assert done.returncode == 1
            assert "  default/np  NodePort *:31080/TCP\n    + backend: 10.244.2.11:8080\n" in done.stdout
            assert "default/web" not in done.stdout
            for wanted in (("-f", str(file)), server):
                done = sluice(clean, *asked, *wanted)
                assert done.returncode == 0, done.stderr
                assert "What the kernel holds is NOT what is wanted here:" in done.stdout
                assert "*:31080/TCP: backend: wanted none, the kernel has 10.244.2.11:8080\n" in done.stdout
            running.process.send_signal(signal.SIGCONT)
            eventually(lambda: sluice(clean, *verify).returncode == 0, "kube-proxy's rules as they are wanted")
            done = sluice(clean, *asked, *server)
            assert (done.returncode, "NOT what" in done.stdout) == (0, False)
