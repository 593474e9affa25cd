"""The verbs beside kube-proxy's ipvs mode: loaded by ipset, ipvsadm and iptables, read from the kernel by netlink.

What is loaded is laid out by the clauses of 1.36 (`tests.kube_proxy_ipvs`), and what a real kube-proxy 1.20.2 had.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from proxy import cli
from proxy.config.settings import Settings
from proxy.foreign import verify
from proxy.foreign.sources import from_node
from proxy.render import render
from proxy.sources.manifest_loading import load
from rules.dataplane import UnavailableError
from rules.foreign.detect import readings
from rules.foreign.gathering import Reading
from rules.forwarding import Family, ForwardingTable, Kind, NodeFacts, Protocol, Route, parse_address
from rules.ipvs.services import Ipvs
from tests.builders import at, backends, networks
from tests.kube_proxy_ipvs import lay_out
from tests.netns.isolation import own_network_namespace

pytestmark = pytest.mark.vm

TESTS = Path(__file__).parents[1]
OBJECTS = str(TESTS / "data" / "kube-proxy-v1.36.2" / "objects.yaml")
OLDER = TESTS / "recordings" / "kube-proxy-v1.20.2-ipvs"
OWN = {
    Family.IPV4: [parse_address(each) for each in ("192.168.50.11", "10.0.0.7")],
    Family.IPV6: [parse_address("fd00:50::11")],
}
FLAGS = ("--hostname-override", "node1", "--bind-address", "192.168.50.11")
CONFIGURED = ("--cluster-cidr", "10.244.0.0/16,fd00:244::/32")


def run(*command: str, text: str = "") -> str:
    done = subprocess.run(command, input=text.encode(), check=False, capture_output=True)
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout.decode()


def wanted() -> dict[Family, ForwardingTable]:
    """What the objects of the recordings come to; of IPv4 also a load balancer that does not admit the node."""
    settings = Settings(
        mode="ipvs",
        hostname_override="node1",
        bind_address="192.168.50.11",
        cluster_cidrs=networks("10.244.0.0/16", "fd00:244::/32"),
    )
    return {table.family: table for table in render(load(OBJECTS), settings, "node1").tables}


GUARDED = ForwardingTable(
    family=Family.IPV4,
    node=NodeFacts(bound=True),
    routes={
        at("203.0.113.77:80"): Route(
            kind=Kind.LOAD_BALANCER, backends=backends("10.244.1.11"), source_ranges=networks("198.51.100.0/24")
        ),
        at("10.96.9.9:53", Protocol.UDP): Route(kind=Kind.CLUSTER_IP, backends=backends("10.244.1.11"), affinity=60),
        at("*:30132", Protocol.SCTP): Route(kind=Kind.NODE_PORT, backends=backends("10.244.1.11")),
    },
)


class Loaded(NamedTuple):
    """What a kernel is given."""

    ipvsadm: str
    ipset: str
    iptables: str
    ip6tables: str
    addresses: str

    @property
    def all(self) -> bytes:
        return "".join(f"{each}\n" for each in self).encode()


def laid_out(*tables: ForwardingTable) -> Loaded:
    """Tables as the texts that make them; IPv6 has none without one of its own."""
    made = {table.family: lay_out(table, OWN[table.family]) for table in tables}
    four, six = made[Family.IPV4], made.get(Family.IPV6)
    addresses = json.loads(four.addresses)
    if six is not None:
        for mine, other in zip(addresses, json.loads(six.addresses), strict=True):
            mine["addr_info"] += other["addr_info"]
    return Loaded(
        four.ipvsadm + (six.ipvsadm if six else ""),
        four.ipset + (six.ipset if six else ""),
        four.iptables,
        six.iptables if six else "",
        json.dumps(addresses),
    )


def recorded() -> Loaded:
    names = ("ipvsadm-save", "ipset-save", "iptables-save", "ip6tables-save", "addresses.json")
    return Loaded(*((OLDER / name).read_text() for name in names))


def put(loaded: Loaded) -> None:
    """Load all of it, and the addresses of eth0 and kube-ipvs0."""
    for interface in json.loads(loaded.addresses):
        name = interface["ifname"]
        if name not in {"eth0", "kube-ipvs0"}:
            continue
        run("ip", "link", "add", name, "type", "dummy")
        if name == "eth0":
            run("ip", "link", "set", name, "up")
        for each in interface["addr_info"]:
            if not each["local"].startswith("fe80"):
                length = 32 if each["family"] == "inet" else 128
                more = ["nodad"] if length == 128 else []
                run("ip", "address", "add", f"{each['local']}/{length}", "dev", name, *more)
    run("ip", "route", "add", "10.244.0.0/16", "dev", "eth0")
    # The sizes that newer kernels print are not for others to set.
    run("ipset", "restore", text=re.sub(r" bucketsize \d+| initval \S+", "", loaded.ipset))
    run("ipvsadm", "-R", text=loaded.ipvsadm)
    run("iptables-restore", text=loaded.iptables)
    if loaded.ip6tables:
        run("ip6tables-restore", text=loaded.ip6tables)


def printed() -> bytes:
    """What the programs say is there."""
    texts = [run("ipset", "save"), run("ipvsadm", "-Sn"), run("iptables-save", "-c"), run("ip6tables-save")]
    return "\n".join([*texts, run("ip", "-j", "address")]).encode()


@pytest.fixture
def namespace(root: None) -> Iterator[None]:
    with own_network_namespace():
        try:
            with Ipvs():
                pass
        except UnavailableError as error:
            pytest.skip(str(error))
        run("ip", "link", "set", "lo", "up")
        run("sysctl", "-qw", "net.ipv4.vs.conntrack=1", "net.ipv4.ip_forward=1")
        yield


def sluice(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments), name="sluice")
    told = capsys.readouterr()
    return code, told.out, told.err


def known(reading: Reading) -> Reading:
    """Without the addresses that kernels make up (IPv6 link-local ones)."""
    return msgspec.structs.replace(reading, own=None)


@pytest.mark.parametrize("what", ["objects", "guarded", "recorded"])
def test_the_kernel_says_what_was_loaded(namespace: None, what: str) -> None:
    loaded = {
        "objects": lambda: laid_out(*wanted().values()),
        "guarded": lambda: laid_out(GUARDED),
        "recorded": recorded,
    }[what]()
    put(loaded)
    found = {each.reading.table.family: each for each in from_node()}
    assert {each.dataplane for each in found.values()} == {"ipvs"}
    from_kernel = {family: known(each.reading) for family, each in found.items()}
    assert not any(each.table.damage for each in from_kernel.values())
    assert from_kernel == {each.table.family: known(each) for each in readings(loaded.all)}
    assert from_kernel == {each.table.family: known(each) for each in readings(printed())}


def test_one_family_can_be_read_alone(namespace: None) -> None:
    put(laid_out(*wanted().values()))
    (found,) = from_node([Family.IPV6])
    assert found.reading.table.family is Family.IPV6


def test_the_verbs_go_by_the_servers_of_the_node(
    namespace: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verify, "LAG", 0.0)
    put(laid_out(*wanted().values()))
    code, out, err = sluice(capsys, "dump", "-o", "json")
    assert code == 0
    assert "sluice has no rules here, and kube-proxy has" in err
    assert [each["dataplane"] for each in json.loads(out)["tables"]] == ["kube-proxy's ipvs rules"] * 2

    asked = ("explain", "--live", "--of", "kube-proxy", "-f", OBJECTS, *FLAGS)
    code, out, err = sluice(capsys, *asked, "default/np")
    assert code == 0, out + err
    assert out.startswith("According to kube-proxy's ipvs rules on this node:")
    assert "NOT what is wanted" not in out
    code, out, err = sluice(
        capsys, "explain", "--live", "--run-directory", "/nonexistent", "10.96.30.4:80", "--from", "node"
    )
    assert code == 0, out + err
    backend = re.findall(r"^ +\d+ % +(\S+)", out, re.MULTILINE)
    assert backend == ["10.244.1.11:8080", "10.244.2.11:8080"]

    compared = ("verify", "--of", "kube-proxy", "-f", OBJECTS, *FLAGS)
    for flags in ((), CONFIGURED):
        code, out, err = sluice(capsys, *compared, *flags)
        assert code == 0, out + err
        assert f"IPv4 in kube-proxy's ipvs rules: equal to what {OBJECTS} wants" in out

    archive = str(tmp_path / "bundle.tar.gz")
    code, out, err = sluice(capsys, "bundle", "-o", archive, "--run-directory", "/nonexistent")
    assert code == 0, err
    code, of_bundle, err = sluice(capsys, "dump", "-f", archive, "--of", "kube-proxy", "-o", "json")
    assert code == 0, err
    _, of_node, _ = sluice(capsys, "dump", "--of", "kube-proxy", "-o", "json")
    assert json.loads(of_bundle) == json.loads(of_node)

    run("ipvsadm", "-d", "-t", "192.168.50.11:31080", "-r", "10.244.2.11:8080")
    run("ipvsadm", "-d", "-t", "10.0.0.7:31080", "-r", "10.244.2.11:8080")
    code, out, _ = sluice(capsys, *compared)
    assert code == 1
    assert "  default/np  NodePort *:31080/TCP\n    - backend: 10.244.2.11:8080" in out
    assert "default/web" not in out
    code, out, _ = sluice(capsys, *asked, "default/np")
    assert "backend: wanted 10.244.2.11:8080, the kernel has none" in out
    run("iptables", "-t", "nat", "-F", "KUBE-LOAD-BALANCER")
    code, out, _ = sluice(capsys, *compared)
    assert "KUBE-LOAD-BALANCER of table nat has no rule by which it masquerades" in out


def test_a_connection_goes_where_explain_says(namespace: None, capsys: pytest.CaptureFixture[str]) -> None:
    put(laid_out(*wanted().values()))
    run("ip", "link", "set", "kube-ipvs0", "up")
    code, out, err = sluice(capsys, "explain", "--live", "--of", "kube-proxy", "10.96.30.2:53/udp", "--from", "node")
    assert code == 0, out + err
    said = set(re.findall(r"^ +\d+ % +(\S+)", out, re.MULTILINE))
    assert said == {"10.244.1.11:8080", "10.244.2.12:8080"}
    met = set()
    for _ in said:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.sendto(b"?", ("10.96.30.2", 53))
    for line in run("ipvsadm", "-Lnc").splitlines():
        words = line.split()
        if len(words) >= 6 and words[0] == "UDP" and words[4] == "10.96.30.2:53":
            met.add(words[5])
    assert met == said
    code, out, err = sluice(capsys, "conntrack", "--of", "kube-proxy", "-o", "json")
    assert code == 0, err
    flows = [each for each in json.loads(out)["flows"] if each["frontend"] == "10.96.30.2:53"]
    assert {each["backend"] for each in flows} == said


def test_trace_tells_of_connections(namespace: None, capsys: pytest.CaptureFixture[str]) -> None:
    put(laid_out(*wanted().values()))
    run("ip", "link", "set", "kube-ipvs0", "up")
    stopped = threading.Event()

    def send() -> None:
        while not stopped.wait(0.5):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.sendto(b"?", ("10.96.30.2", 53))

    thread = threading.Thread(target=send)
    thread.start()  # it is in the namespace of the thread that starts it
    try:
        code, out, err = sluice(capsys, "trace", "--of", "kube-proxy", "--seconds", "60", "-n", "1", "-o", "json")
    finally:
        stopped.set()
        thread.join()
    assert code == 0, out + err
    assert "10.96.30.2:53" in out


def test_flushed_rules_are_damage(namespace: None, capsys: pytest.CaptureFixture[str]) -> None:
    put(laid_out(*wanted().values()))
    for program in ("iptables", "ip6tables"):
        run(f"{program}-restore", text="*nat\nCOMMIT\n*filter\nCOMMIT\n")
    code, out, err = sluice(capsys, "dump", "--of", "kube-proxy")
    assert code == 0, err
    assert "no rule that leads to KUBE-SERVICES" in out
    assert "10.96.30.4:80/TCP" in out


def test_without_ipvs_no_module_is_asked_for(namespace: None, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = sluice(capsys, "dump", "--of", "kube-proxy")
    assert (code, err) == (0, "sluice dump: kube-proxy has no rules in this network namespace\n")
