"""The verbs beside kube-proxy: its recorded rules, loaded into a kernel, read from there, edited, and read again."""

from __future__ import annotations

import io
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import ryaml

from proxy import cli
from proxy.config.settings import Settings
from proxy.foreign import sources, verify
from proxy.foreign.sources import from_node
from rules.dataplane import UnavailableError
from rules.foreign.detect import readings
from rules.forwarding import Family, parse_address
from rules.ipvs.services import Ipvs
from rules.netlink.ipset import Element, HeldSet, Ipsets, SetType
from tests.netns.isolation import own_network_namespace

pytestmark = pytest.mark.netns

RECORDING = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
OBJECTS = str(RECORDING / "objects.yaml")
API_SERVER = [
    {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": "kubernetes"},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"name": "https", "port": 443, "targetPort": 7443}]},
    },
    {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "namespace": "default",
            "name": "kubernetes",
            "labels": {"kubernetes.io/service-name": "kubernetes"},
        },
        "addressType": "IPv4",
        "ports": [{"name": "https", "port": 7443}],
        "endpoints": [{"addresses": ["172.31.255.1"]}],
    },
]
FLAGS = ("--hostname-override", "node1", "--bind-address", "192.168.50.11")
CONFIGURED = ("--cluster-cidr", "10.244.0.0/16,fd00:244::/32", "--service-cidrs", "10.96.0.0/16,fd00:10:96::/112")


def run(*command: str, text: str = "") -> None:
    subprocess.run(command, input=text.encode(), check=True, capture_output=True)


def saved(name: str) -> str:
    """A recording without its counters, which are objects of the kernel that kube-proxy makes beforehand (IPT-31)."""
    return re.sub(r" -m nfacct --nfacct-name  \S+", "", (RECORDING / name).read_text())


def load_iptables(backend: str, prefix: str) -> None:
    for program, suffix in (("iptables", "iptables-save"), ("ip6tables", "ip6tables-save")):
        run(f"{program}-{backend}-restore", text=saved(f"{prefix}.{suffix}"))


class Source(NamedTuple):
    """One way in which a node may hold kube-proxy's rules."""

    name: str
    mode: str

    def load(self) -> None:
        if self.name == "nftables":
            run("nft", "-f", str(RECORDING / "nftables.nft"))
        else:
            load_iptables(self.name.removeprefix("iptables-"), "iptables" if self.name.endswith("nft") else self.name)

    def edit(self) -> None:
        """Take a backend out of default/np, as somebody might who means well."""
        if self.name == "nftables":
            chain = "service-L54OOY4A-default/np/tcp/"
            run("nft", "flush", "chain", "ip", "kube-proxy", chain)
            rule = "meta l4proto tcp dnat ip to numgen random mod 1 map { 0 : 10.244.1.11 . 8080 }"
            run("nft", "-f", "-", text=f"add rule ip kube-proxy {chain} {rule}\n")
        else:
            run(f"iptables-{self.name.removeprefix('iptables-')}", "-t", "nat", "-D", "KUBE-SVC-LDATH6LIB7VCFHLW", "3")


SOURCES = [Source("nftables", "nftables"), Source("iptables-nft", "iptables"), Source("iptables-legacy", "iptables")]


@pytest.fixture(params=SOURCES, ids=lambda source: source.name)
def source(request: pytest.FixtureRequest) -> Iterator[Source]:
    with own_network_namespace():
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "far0")
        run("ip", "link", "set", "eth0", "up")
        run("ip", "address", "add", "192.168.50.11/24", "dev", "eth0")
        run("ip", "address", "add", "fd00:50::11/64", "dev", "eth0", "nodad")
        run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        for pods, others, router in (
            ("10.244.1.0/24", "10.244.2.0/24", "192.168.50.12"),
            ("fd00:244:1::/64", "fd00:244:2::/64", "fd00:50::12"),
        ):
            run("ip", "route", "add", pods, "dev", "eth0")
            run("ip", "route", "add", others, "via", router)
        request.param.load()
        yield request.param


@pytest.fixture
def objects(tmp_path: Path) -> str:
    """The recording's objects with the Service that the API server made by itself."""
    document: Any = ryaml.loads((RECORDING / "objects.yaml").read_text())  # type: ignore[attr-defined]  # as in its stub
    document["items"] += API_SERVER
    file = tmp_path / "objects.json"
    file.write_text(json.dumps(document))
    return str(file)


def sluice(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments), name="sluice")
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_kernel_says_what_was_loaded(source: Source) -> None:
    found = {each.reading.table.family: each for each in from_node()}
    assert {each.dataplane for each in found.values()} == {source.name}
    names = ("nftables.nft",) if source.mode == "nftables" else ("iptables.iptables-save", "iptables.ip6tables-save")
    recorded = {each.table.family: each for name in names for each in readings((RECORDING / name).read_bytes())}
    assert {family: each.reading for family, each in found.items()} == recorded


def test_one_family_can_be_read_alone(source: Source) -> None:
    (found,) = from_node([Family.IPV6])
    assert found.reading.table.family is Family.IPV6


def test_dump_shows_the_services_of_the_node(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = sluice(capsys, "dump", "--of", "kube-proxy", "--service", "default/np")
    assert (code, err) == (0, "")
    assert f"kube-proxy's {source.name} rules" in out
    assert "*:31080/TCP" in out
    code, out, err = sluice(capsys, "dump", "-o", "json")
    assert code == 0
    assert "sluice has no rules here" in err, "nobody said whose rules, and there are but kube-proxy's"
    assert {len(each["routes"]) for each in json.loads(out)["tables"]} == {23, 3}


def test_explain_goes_by_the_rules_of_the_node(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = sluice(capsys, "explain", "--live", "default/npl", "--run-directory", "/nonexistent")
    assert code == 0
    assert out.startswith(f"According to kube-proxy's {source.name} rules on this node:")
    assert "another service proxy" not in out
    run("ip", "route", "del", "10.244.2.0/24")
    for target in ("default/np", "10.96.30.4:80"):
        _, out, _ = sluice(capsys, "explain", "--live", "--of", "kube-proxy", target)
        assert "the node has no way to 10.244.2.11:8080: there is no route" in out
    code, out, _ = sluice(
        capsys,
        "explain",
        "--live",
        "--of",
        "kube-proxy",
        "-f",
        OBJECTS,
        *FLAGS,
        "203.0.113.31:443",
        "--from",
        "outside",
    )
    assert code == 1
    assert "NOT what is wanted" not in out, "the manifests come to the same"
    assert "they are on node2" in out
    source.edit()
    code, out, _ = sluice(capsys, "explain", "--live", "--of", "kube-proxy", "-f", OBJECTS, *FLAGS, "default/np")
    assert "backend: wanted 10.244.2.11:8080, the kernel has none" in out


@pytest.mark.parametrize("configured", [True, False])
def test_verify_names_the_rule_that_somebody_edited(
    source: Source,
    configured: bool,
    objects: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "LAG", 0.0)
    arguments = ("verify", "--of", "kube-proxy", "-f", objects, *FLAGS, *(CONFIGURED if configured else ()))
    code, out, err = sluice(capsys, *arguments)
    assert code == 0, out + err
    assert f"IPv4 in kube-proxy's {source.name} rules: equal to what {objects} wants, 23 frontends" in out
    source.edit()
    code, out, _ = sluice(capsys, *arguments)
    assert code == 1
    assert "  default/np  NodePort *:31080/TCP\n    - backend: 10.244.2.11:8080" in out
    assert "default/web" not in out
    if source.mode == "iptables":
        # Of two picks the first is left, which takes one half of the connections.
        assert "KUBE-SVC-LDATH6LIB7VCFHLW does not share its connections evenly" in out


def test_saved_rules_are_verified_without_the_node(
    source: Source, objects: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if source.mode == "nftables":
        texts = [["nft", "-j", "list", "ruleset"]]
    else:
        backend = source.name.removeprefix("iptables-")
        texts = [[f"iptables-{backend}-save", "-c"], [f"ip6tables-{backend}-save", "-c"]]
    files = []
    for number, command in enumerate(texts):
        file = tmp_path / f"rules{number}"
        file.write_bytes(subprocess.run(command, check=True, capture_output=True).stdout)
        files += ["-f", str(file)]
    with own_network_namespace():
        code, out, err = sluice(capsys, "verify", *files, "-f", objects, *FLAGS)
        assert (code, err) == (0, ""), out + err
        assert out.count("equal to what") == 2


def test_a_proxy_that_is_late_is_told_from_one_that_is_wrong(
    source: Source, objects: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first reading is one of before, and the next ones are of now."""
    now = from_node()
    (np,) = (frontend for frontend in now[0].reading.table.routes if frontend.port == 31080)
    routes = {frontend: route for frontend, route in now[0].reading.table.routes.items() if frontend != np}
    table = msgspec.structs.replace(now[0].reading.table, routes=routes)
    before = now[0]._replace(reading=msgspec.structs.replace(now[0].reading, table=table))
    readings_ = iter([[before, *now[1:]]])
    asked = verify.Asked(sources.Files(objects, ()), configured=False)
    settings = Settings(hostname_override="node1", bind_address="192.168.50.11")
    out = io.StringIO()
    assert verify.main(asked, settings, "text", out=out, read=lambda: next(readings_, now)) == 0
    assert "kube-proxy was late: its rules differed, and no longer do" in capsys.readouterr().err
    assert "IPv4" in out.getvalue()


def test_two_kinds_of_rules_at_once_are_both_told(capsys: pytest.CaptureFixture[str]) -> None:
    with own_network_namespace():
        for each in SOURCES:
            each.load()
        code, out, _ = sluice(capsys, "dump", "--of", "kube-proxy")
        assert code == 0
        for each in SOURCES:
            assert f"kube-proxy's {each.name} rules" in out


def test_without_the_program_nobody_says_that_there_are_no_rules(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with own_network_namespace():
        SOURCES[0].load()
        monkeypatch.setattr(sources.shutil, "which", lambda *_, **__: None)
        code, _, err = sluice(capsys, "dump", "--of", "kube-proxy")
    assert (code, "install nftables" in err) == (2, True)


def test_without_any_rules_the_verbs_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    with own_network_namespace():
        for arguments in (("dump",), ("verify", "-f", OBJECTS), ("explain", "default/np")):
            code, _, err = sluice(capsys, *arguments, "--of", "kube-proxy")
            assert "kube-proxy has no rules in this network namespace" in err, arguments
            assert code == {"dump": 0, "verify": 1, "explain": 2}[arguments[0]]


# --- ipvs mode, as far as a kernel without IPVS goes; with one: test_foreign_ipvs.py -------------------------------


IPVS = RECORDING.parents[1] / "recordings" / "kube-proxy-v1.20.2-ipvs"


@pytest.fixture
def half_of_ipvs() -> Iterator[None]:
    """The sets and rules of ipvs mode in a namespace, and not its servers."""
    with own_network_namespace():
        run("ip", "link", "set", "lo", "up")
        sets = (IPVS / "ipset-save").read_text()
        # The sizes that newer kernels print are not for others to set.
        run("ipset", "restore", text=re.sub(r" bucketsize \d+| initval \S+", "", sets))
        run("iptables-nft-restore", text=(IPVS / "iptables-save").read_text())
        yield


def test_sets_of_any_size_are_read(half_of_ipvs: None) -> None:
    """kube-proxy's have room for 65,536 elements, which ours never have."""
    with Ipsets() as ipsets:
        assert ipsets.held("KUBE-LOAD-BALANCER-SOURCE-CIDR") == HeldSet(None, {}, 1)
        found = ipsets.any_set("KUBE-LOAD-BALANCER-SOURCE-CIDR")
        assert ipsets.any_set("KUBE-NO-SUCH-SET") is None
        ports = ipsets.any_set("KUBE-NODE-PORT-TCP")
    assert found is not None
    spec, elements = found
    assert (spec.type, spec.family) == (SetType.IP_PORT_NET, Family.IPV4)
    vip = parse_address("203.0.113.30")
    assert elements == {Element(vip, 6, 80, parse_address(network), 24) for network in ("192.168.50.0", "198.51.100.0")}
    assert ports is not None
    assert {each.port for each in ports[1]} == {31080, 31081, 31082, 31083}


def test_a_kernel_without_ipvs_is_one_line(half_of_ipvs: None, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with Ipvs():
            pytest.skip("this kernel has IPVS")
    except UnavailableError:
        pass
    code, out, err = sluice(capsys, "dump", "--of", "kube-proxy")
    assert (code, out) == (2, "")
    assert "kube-proxy runs in ipvs mode, and its virtual servers cannot be read: this kernel has no IPVS" in err
    assert err.count("\n") == 1
