"""`sluice bundle`: what is in it, what must not be, and the verbs that read one."""

from __future__ import annotations

import io
import json
import re
import stat
import tarfile
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ryaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy import agent_socket, cli, flows, modes
from proxy.agent_socket import NoAgentError, TableHead, WantedTable
from proxy.bundle import making as bundle
from proxy.bundle import reading as bundle_reading
from proxy.bundle.making import without_secrets
from proxy.bundle.reading import BundleError, Manifest
from proxy.objects import EndpointSlice, Service
from proxy.report import SourceReport, Trouble
from rules.dataplane import Capabilities, Raw, RawItem, UnavailableError
from rules.forwarding import Family, ForwardingTable, parse_address
from rules.netlink.conntrack import Flow
from tests.builders import at
from tests.fakes.held import HELD, NODE
from tests.unit.test_status import HEALTHY

PLANTED = (
    "s3cr3t-bearer-value",
    "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJ4In0.c2lnbmF0dXJl",
    "MIIEvQIBADANBgkq-planted-key",
    "LS0tLS1CRUdJTiBSU0EgUFJJVkFURSBLRVktLS0tLQ==",
    "hunter2-password",
    "planted-in-an-annotation",
    "planted-on-the-command-line",
)
OBJECTS: list[dict[str, Any]] = [
    {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node1", "annotations": {"whatever": PLANTED[5]}},
    },
    {
        "apiVersion": Service.API_VERSION,
        "kind": Service.KIND,
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {
            "clusterIP": "10.96.0.41",
            "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "nodePort": 30001}],
            "type": "NodePort",
        },
    },
    {
        "apiVersion": EndpointSlice.API_VERSION,
        "kind": EndpointSlice.KIND,
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 80}],
        "endpoints": [{"addresses": ["10.244.1.11"]}, {"addresses": ["10.244.2.11"]}],
    },
]
LOST = msgspec.structs.replace(
    HELD, routes={frontend: route for frontend, route in HELD.routes.items() if frontend.is_node_port}
)


FLOW = flows.Found(
    Family.IPV4,
    "default/web:http",
    Flow(
        parse_address("10.244.1.13"), parse_address("10.96.0.41"), 17, 40000, 80,
        parse_address("10.244.1.11"), parse_address("10.244.1.13"), 80, 40000, 0, b"",
    ),
    stale=False,
)  # fmt: skip


class Held:
    """A dataplane of nftables that holds a table."""

    capabilities = Capabilities()

    def __init__(self, table: ForwardingTable | None) -> None:
        self._table = table

    def raw(self) -> Raw | None:
        if self._table is None:
            return None
        items = [RawItem(0, "map cluster-ip"), RawItem(1, "10.96.0.41 . tcp . 80", (at("10.96.0.41:80"),))]
        return Raw(self._table, items) if self._table is HELD else Raw(self._table, items[:1])

    family = Family.IPV4

    def read(self) -> ForwardingTable | None:
        return self._table

    def check(self) -> None:
        """Nothing is lacking."""

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[ForwardingTable | None]:
    """What the kernel of a node holds on which an agent runs; to be changed by tests."""
    tables: list[ForwardingTable | None] = [HELD]

    def opened(_name: str, family: Family) -> Any:
        if family is Family.IPV6:
            raise UnavailableError("no IPv6 here")
        return Held(tables[0])

    def wanted(family: Family, _directory: str) -> WantedTable:
        head = TableHead(
            family=family,
            node=HELD.node,
            dataplane="nftables",
            capabilities=Capabilities(),
            syncs=3,
            pending=False,
            network_namespace=7,
        )
        return WantedTable(HELD, head)

    source = SourceReport(description=f"https://admin:{PLANTED[4]}@10.0.0.1:6443")
    monkeypatch.setattr(agent_socket, "status", lambda _: msgspec.structs.replace(HEALTHY, source=source))
    monkeypatch.setattr(agent_socket, "table", wanted)
    monkeypatch.setattr(agent_socket, "objects", lambda *_: json.loads(json.dumps(OBJECTS)))
    monkeypatch.setattr(modes, "present", lambda: ("nftables",))
    monkeypatch.setattr(modes, "open_dataplane", opened)
    monkeypatch.setattr(bundle, "look", lambda *_: NODE)
    monkeypatch.setattr(bundle, "available", lambda _: {})
    report = flows.Report("the agent", [FLOW, FLOW._replace(stale=True)])
    monkeypatch.setattr(flows, "look", lambda **_: report)
    monkeypatch.setattr(bundle.shutil, "which", lambda *_, **__: None)  # type: ignore[attr-defined]
    return tables


def made(tmp_path: Path, configuration: Any = None) -> Path:
    path = tmp_path / "b.tar.gz"
    assert bundle.main(str(path), "/run/x", lambda: configuration or {}, now=0) == 0
    return path


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        return {each.name: archive.extractfile(each).read() for each in archive}  # type: ignore[union-attr]


def test_what_is_in_it_and_what_could_not_be_had(held, tmp_path):
    path = made(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = members(path)
    manifest = msgspec.json.decode(found["sluice-bundle/manifest.json"], type=Manifest)
    assert {f"sluice-bundle/{each.name}": each.bytes for each in manifest.files} == {
        name: len(data) for name, data in found.items() if not name.endswith("manifest.json")
    }
    assert {each.name for each in manifest.files} == {
        "configuration.json",
        "flows.json",
        "held.txt",
        "kernel.json",
        "objects.json",
        "rules-nftables-IPv4.txt",
        "status.json",
        "surroundings.json",
        "tables.json",
        "wanted.txt",
    }
    assert {each.name: each.why for each in manifest.missing} == {
        "held IPv6 in nftables": "no IPv6 here",
        "others-nftables.txt": "the program nft is not there",
        "log.txt": "there is no journalctl here; in a pod, kubectl logs has the log",
    }
    assert (manifest.node, manifest.taken) == ("node1", "1970-01-01T00:00:00Z")
    assert b"default/web:http" in found["sluice-bundle/rules-nftables-IPv4.txt"]


def test_no_secret_is_in_it(held, tmp_path, monkeypatch):
    log = (
        f"GET https://10.0.0.1 Authorization: Bearer {PLANTED[0]}\n"
        f"token {PLANTED[1]} expired\n"
        f"-----BEGIN RSA PRIVATE KEY-----\n{PLANTED[2]}\n-----END RSA PRIVATE KEY-----\n"
        f"client-key-data: {PLANTED[3]}\npassword={PLANTED[4]}\n"
    )

    class Done:
        stdout = log.encode()
        returncode = 0

    monkeypatch.setattr(bundle.shutil, "which", lambda *_, **__: "/bin/journalctl")
    monkeypatch.setattr(bundle.subprocess, "run", lambda *_, **__: Done)
    monkeypatch.setattr(bundle, "_words_of", lambda _: ["sluice", "run", "--auth-token", PLANTED[6], "--v=2"])
    configuration = {"clientConnection": {"kubeconfig": "/etc/kubeconfig", "token": PLANTED[0]}, "x": [PLANTED[1]]}
    found = b"".join(members(made(tmp_path, configuration)).values()).decode()
    for secret in PLANTED:
        assert secret not in found
    assert "/etc/kubeconfig" in found
    assert "--v=2" in found
    assert "GET https://10.0.0.1" in found


@pytest.mark.parametrize(
    "text",
    [
        "default/token-service",
        "10.96.0.1:80/TCP",
        "https://10.0.0.1:6443/api",
        "Services and EndpointSlices",
        "a basic x",
    ],
)
def test_what_is_no_secret_stays(text):
    assert without_secrets(text) == text


@given(st.text(alphabet="abcXYZ019-_.", min_size=12, max_size=40))
def test_whatever_a_bearer_token_looks_like(token):
    assert token not in without_secrets(f"Authorization: Bearer {token}")


def test_a_file_that_is_there_is_not_overwritten(held, tmp_path, capsys):
    path = tmp_path / "b.tar.gz"
    path.write_text("mine")
    assert bundle.main(str(path), "/run/x", dict) == 2
    assert path.read_text() == "mine"
    assert "File exists" in capsys.readouterr().err


def test_a_file_that_would_be_too_long_is_left_out_or_cut(held, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "LONGEST", 300)
    found = members(made(tmp_path))
    manifest = msgspec.json.decode(found["sluice-bundle/manifest.json"], type=Manifest)
    assert "objects.json" in {each.name for each in manifest.missing}
    assert [each.bytes for each in manifest.files if each.cut] == [300, 300]


def test_without_an_agent_it_has_the_kernel(held, tmp_path, monkeypatch, capsys):
    def nobody(_directory: str) -> Any:
        raise NoAgentError("no agent answers")

    monkeypatch.setattr(agent_socket, "status", nobody)
    path = made(tmp_path)
    assert "without status.json: no agent answers" in capsys.readouterr().err
    assert cli.main(["explain", "10.96.0.41:80", "-f", str(path)]) == 0
    assert cli.main(["verify", "-f", str(path)]) == 2


# --- the verbs that read one -----------------------------------------------------------------------------------------


def test_a_saved_table_is_the_same_table(held, tmp_path):
    read = bundle_reading.read(str(made(tmp_path)))
    assert [each.table for each in read.tables_of("wanted")] == [HELD]
    assert [each.table for each in read.tables_of("held")] == [HELD]


def test_dump_shows_what_the_kernel_held(held, tmp_path, capsys):
    path = str(made(tmp_path))
    capsys.readouterr()
    assert cli.main(["dump", "-f", path, "-o", "json", "--port", "30001"]) == 0
    [table] = json.loads(capsys.readouterr().out)["tables"]
    assert [each["port"] for each in table["routes"]] == [30001]
    assert cli.main(["dump", "-f", path, "--port", "1"]) == 1
    assert cli.main(["dump", "-f", path, "-o", "raw"]) == 2


def test_verify_compares_what_was_wanted_with_what_was_held(held, tmp_path, capsys):
    assert cli.main(["verify", "-f", str(made(tmp_path))]) == 0
    held[0] = LOST
    (tmp_path / "b.tar.gz").unlink()
    assert cli.main(["verify", "-f", str(made(tmp_path))]) == 1
    assert "10.96.0.41:80" in capsys.readouterr().out


def test_explain_goes_by_what_was_wanted_and_says_where_the_kernel_differed(held, tmp_path, capsys):
    held[0] = LOST
    path = str(made(tmp_path))
    capsys.readouterr()
    cli.main(["explain", "default/web:http", "-f", path, "-o", "json"])
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert {each["outcome"]["is"] for each in answers} == {"reaches"}
    assert any(each["disagreements"] for each in answers)


@pytest.mark.parametrize("verb", [["dump"], ["verify"], ["explain", "10.96.0.41:80"]])
def test_a_broken_archive_is_one_line(verb, held, tmp_path, capsys):
    whole = made(tmp_path).read_bytes()
    broken = tmp_path / "broken.tar.gz"
    broken.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    assert cli.main([*verb, "-f", str(broken)]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert "internal error" not in captured.err


def test_a_bundle_stands_alone(held, tmp_path, capsys):
    assert cli.main(["dump", "-f", str(made(tmp_path)), "-f", "other"]) == 2
    assert "takes nothing else" in capsys.readouterr().err


@given(st.dictionaries(st.sampled_from(["manifest.json", "tables.json", "status.json"]), st.binary(max_size=60)))
def test_no_archive_of_a_stranger_raises_anything_else(files):
    import tempfile  # noqa: PLC0415  # a fixture would be shared by all examples

    with tempfile.NamedTemporaryFile(suffix=".tar.gz") as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, data in files.items():
                info = tarfile.TarInfo(f"sluice-bundle/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        file.flush()
        with pytest.raises(BundleError, match=re.escape(file.name)):
            bundle_reading.read(file.name)


@pytest.mark.parametrize("data", [b"\x1f\x8b\x08", b"\x1f\x8b\x08\x0c\0\0\0\0\0\xff\x05"])
def test_a_header_of_gzip_that_has_no_end_is_refused(data, tmp_path):
    file = tmp_path / "bundle.tgz"
    file.write_bytes(data)
    with pytest.raises(BundleError, match="cannot be read: "):
        bundle_reading.read(str(file))


@pytest.mark.parametrize(("name", "size"), [("other", 1 << 20), ("manifest.json", 1 << 20), ("other", 0)])
def test_what_would_take_long_to_unpack_is_refused(name, size, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_reading, "LONGEST", 1 << 16)
    path = tmp_path / "b.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for _ in range(1 if size else 60):
            info = tarfile.TarInfo(f"sluice-bundle/{name}")
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    with pytest.raises(BundleError, match="more than in a bundle"):
        bundle_reading.read(str(path))


def test_a_doctor_reads_one_with_the_node_as_it_was(held, tmp_path, capsys, monkeypatch):
    held[0] = LOST
    around = msgspec.structs.replace(NODE, forwarding={Family.IPV4: False})
    monkeypatch.setattr(bundle, "look", lambda *_: around)
    path = str(made(tmp_path))
    capsys.readouterr()
    assert cli.main(["doctor", "-f", path, "-o", "json"]) == 1
    found = {each["kind"]: each for each in json.loads(capsys.readouterr().out)["findings"]}
    assert found["ip-forward"]["severity"] == "critical"
    assert found["drift"]["next"] == f"sluice verify -f {path}"


def test_a_doctor_without_an_agent_goes_by_the_kernel(held, tmp_path, capsys, monkeypatch):
    def nobody(_directory: str) -> Any:
        raise NoAgentError("no agent answers")

    monkeypatch.setattr(agent_socket, "status", nobody)
    path = str(made(tmp_path))
    capsys.readouterr()
    assert cli.main(["doctor", "-f", path]) in (1, 2)
    assert "error    agent: no agent answered on" in capsys.readouterr().out
    assert cli.main(["status", "-f", path]) == 2
    assert "no agent answered when it was made (no agent answers)" in capsys.readouterr().err


def test_status_says_what_the_agent_said(held, tmp_path, capsys):
    path = str(made(tmp_path))
    capsys.readouterr()
    assert cli.main(["status", "-f", path]) == 0
    assert capsys.readouterr().out.startswith("sluice ")


def test_flows_are_as_they_were(held, tmp_path, capsys):
    path = str(made(tmp_path))
    capsys.readouterr()
    assert cli.main(["conntrack", "-f", path, "-o", "json"]) == 0
    flows_ = json.loads(capsys.readouterr().out)["flows"]
    assert sorted(each["stale"] for each in flows_) == [False, True]
    assert {each["backend"] for each in flows_} == {"10.244.1.11:80"}
    assert cli.main(["conntrack", "-f", path, "-o", "json", "--stale", "--service", "default/web"]) == 0
    assert [each["stale"] for each in json.loads(capsys.readouterr().out)["flows"]] == [True]
    assert cli.main(["conntrack", "-f", path, "-o", "count"]) == 0
    assert "default/web:http  10.244.1.11:80  2      2           1" in capsys.readouterr().out
    assert cli.main(["conntrack", "-f", path, "--delete-stale"]) == 2


def test_very_many_flows_are_told_of_by_number(held, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bundle, "MOST_FLOWS", 1)
    path = str(made(tmp_path))
    assert cli.main(["conntrack", "-f", path, "-o", "json"]) == 2
    captured = capsys.readouterr()
    assert [each["stale"] for each in json.loads(captured.out[captured.out.index("{") :])["flows"]] == [True]
    assert "1 flows more were there" in captured.err


# --- another proxy's rules -------------------------------------------------------------------------------------------

RECORDED = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
SAVED = {Family.IPV4: "iptables.iptables-save", Family.IPV6: "iptables.ip6tables-save"}


class Saver:
    """Programs of iptables that print a file."""

    def __init__(self, name: str) -> None:
        self._name = name

    def saved(self) -> str:
        ours = "*mangle\n:SLUICE-X - [0:0]\n-A SLUICE-X -j RETURN\nCOMMIT\n"
        return (RECORDED / self._name).read_text() + ours


@pytest.fixture
def next_to_kube_proxy(held, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node on which kube-proxy runs, and an agent knows the objects."""
    objects = ryaml.loads((RECORDED / "objects.yaml").read_text())["items"]
    own = frozenset(map(parse_address, ("192.168.50.11", "fd00:50::11")))
    monkeypatch.setattr(bundle, "available", lambda family: {"nft": Saver(SAVED[family])})
    monkeypatch.setattr(bundle, "_nft_tables", lambda _: (RECORDED / "nftables.nft").read_text())
    monkeypatch.setattr(agent_socket, "objects", lambda *_: [each for each in objects if each["kind"] != "Namespace"])
    monkeypatch.setattr(bundle, "look", lambda *_: msgspec.structs.replace(NODE, addresses=own))


def test_a_doctor_goes_by_another_proxys_rules_where_there_are_no_others(
    next_to_kube_proxy, held, tmp_path, capsys, monkeypatch
):
    def nobody(_directory: str) -> Any:
        raise NoAgentError("no agent answers")

    held[0] = None
    monkeypatch.setattr(agent_socket, "status", nobody)
    path = str(made(tmp_path))
    capsys.readouterr()
    cli.main(["doctor", "-f", path, "-o", "json"])
    found = json.loads(capsys.readouterr().out)["findings"]
    kinds = {each["kind"] for each in found}
    assert {"no-endpoints", "agent-absent"} <= kinds
    assert not kinds & {"no-rules", "other-proxy"}
    assert next(each for each in found if each["kind"] == "agent-absent")["severity"] == "note"


def test_a_service_that_cannot_be_used_is_no_service_that_is_not_there(held, tmp_path, capsys, monkeypatch):
    trouble = Trouble(
        origin="service", subject="Service default/bad", reason="spec.ports[0].port: expected int <= 65535"
    )
    monkeypatch.setattr(agent_socket, "status", lambda _: msgspec.structs.replace(HEALTHY, troubles=(trouble,)))
    path = str(made(tmp_path))
    capsys.readouterr()
    assert cli.main(["explain", "default/bad", "-f", path]) == 1
    assert "Service default/bad is there, and cannot be used: spec.ports[0].port" in capsys.readouterr().out


def test_rules_of_others_are_in_it_and_ours_are_not_among_them(next_to_kube_proxy, tmp_path):
    found = members(made(tmp_path))
    others = {name: data for name, data in found.items() if name.startswith("sluice-bundle/others-")}
    assert sorted(name.removeprefix("sluice-bundle/") for name in others) == [
        "others-iptables-nft-IPv4.txt",
        "others-iptables-nft-IPv6.txt",
        "others-nftables.txt",
    ]
    assert not any(b"SLUICE-X" in data for data in others.values())


def test_a_dump_shows_another_proxys_rules(next_to_kube_proxy, tmp_path, capsys):
    path = str(made(tmp_path))
    capsys.readouterr()
    assert cli.main(["dump", "-f", path, "--of", "kube-proxy", "-o", "json"]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    shown = sorted((each["dataplane"], each["family"], bool(each["routes"])) for each in tables)
    assert shown == [
        ("kube-proxy's iptables-nft rules", "IPv4", True),
        ("kube-proxy's iptables-nft rules", "IPv6", True),
        ("kube-proxy's nftables rules", "IPv4", True),
        ("kube-proxy's nftables rules", "IPv6", True),
    ]


def test_verify_compares_another_proxys_rules_with_the_objects(next_to_kube_proxy, tmp_path, capsys):
    path = str(made(tmp_path))
    capsys.readouterr()
    # The Service default/kubernetes is the API server's own, and not among the objects that were recorded.
    assert cli.main(["verify", "-f", path, "--of", "kube-proxy", "-o", "json"]) == 1
    for family in json.loads(capsys.readouterr().out)["families"]:
        drifts = {each["frontend"] for each in family["frontends"]}
        assert drifts <= {"10.96.0.1:443/TCP"}


def test_explain_answers_from_another_proxys_rules(next_to_kube_proxy, tmp_path, capsys):
    path = str(made(tmp_path))
    capsys.readouterr()
    cli.main(["explain", "10.96.0.1:443", "-f", path, "--of", "kube-proxy"])
    assert capsys.readouterr().out.startswith("According to kube-proxy's ")


def test_without_an_agent_and_rules_of_ours_another_proxys_are_meant(next_to_kube_proxy, tmp_path, capsys, monkeypatch):
    def nobody(_directory: str) -> Any:
        raise NoAgentError("no agent answers")

    monkeypatch.setattr(agent_socket, "status", nobody)
    monkeypatch.setattr(modes, "present", lambda: ())
    path = str(made(tmp_path))
    capsys.readouterr()
    assert cli.main(["dump", "-f", path]) == 0
    assert "kube-proxy's nftables rules" in capsys.readouterr().out
    assert cli.main(["explain", "10.96.0.1:443", "-f", path, "-o", "json"]) == 0
    assert cli.main(["verify", "-f", path]) == 2
    assert "the objects are not in it" in capsys.readouterr().err
    assert cli.main(["dump", "-f", path, "--of", "sluice"]) == 0


def test_without_rules_of_another_proxy_it_says_so(held, tmp_path, capsys):
    path = str(made(tmp_path))
    for verb in (["dump"], ["verify"], ["explain", "10.96.0.1:443"]):
        capsys.readouterr()
        assert cli.main([*verb, "-f", path, "--of", "kube-proxy"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "no rules of kube-proxy are in it" in line


# --- strangers -------------------------------------------------------------------------------------------------------

_ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.text(max_size=8),
    st.sampled_from(["", "AAAA", "////", "IPv6", "*", "nftables", [], {}, [[]], [{}]]),
)


def _mutated(value: Any, draw: Any) -> Any:
    """A value of JSON with one part of it replaced."""
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: _mutated(value[key], draw)}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        place = draw(st.integers(0, len(value) - 1))
        return [*value[:place], _mutated(value[place], draw), *value[place + 1 :]]
    return draw(_ODD)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_a_mutated_bundle_is_answered_or_refused_in_a_line(next_to_kube_proxy, tmp_path, capsys, data):
    path = tmp_path / "b.tar.gz"
    if not path.exists():
        made(tmp_path)
    files = members(path)
    name = data.draw(st.sampled_from([each for each in sorted(files) if each.endswith(("s.json", "t.json"))]))
    files[name] = json.dumps(_mutated(json.loads(files[name]), data.draw)).encode()
    other = tmp_path / "other.tar.gz"
    with tarfile.open(other, "w:gz", compresslevel=1) as archive:
        for each, content in files.items():
            info = tarfile.TarInfo(each)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    capsys.readouterr()
    verb = data.draw(st.sampled_from(["dump", "verify", "doctor", "status", "conntrack", "explain default/web"]))
    of = data.draw(st.sampled_from([[], ["--of", "kube-proxy"]])) if verb[:2] in {"du", "ve", "ex"} else []
    code = cli.main([*verb.split(), "-f", str(other), *of])
    errors = capsys.readouterr().err
    assert code in (0, 1, 2)
    assert "internal error" not in errors


@pytest.mark.parametrize("verb", ["dump", "verify", "explain a/b", "doctor", "status", "conntrack"])
def test_an_archive_of_somebody_else_is_no_manifest_without_objects(verb, tmp_path, monkeypatch, capsys):
    """It is readable for its owner alone: who is not root is told that, and nothing else."""
    archive = tmp_path / "bundle.tar.gz"
    archive.write_bytes(b"")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(archive))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(bundle_reading.tarfile, "open", refuse)
    assert cli.main([*verb.split(), "-f", str(archive)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sluice {verb.split()[0]}: {archive}: ")
    assert "Permission denied" in line
    assert "Errno" not in line
