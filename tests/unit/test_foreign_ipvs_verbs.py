"""dump, explain and verify of kube-proxy's ipvs mode, from what a real one had: files, and a bundle."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from proxy import cli
from proxy.bundle.reading import OTHERS, TOP
from proxy.foreign.sources import Files, sort_files

OLDER = Path(__file__).parents[1] / "recordings" / "kube-proxy-v1.20.2-ipvs"
SERVERS, SETS, RULES, RULES6, ADDRESSES = (
    str(OLDER / name) for name in ("ipvsadm-save", "ipset-save", "iptables-save", "ip6tables-save", "addresses.json")
)
ALL = (SERVERS, SETS, RULES, RULES6, ADDRESSES)
OBJECTS = str(OLDER / "objects.yaml")
NODE1 = ("--hostname-override", "node1", "--bind-address", "192.168.50.11")


def sluice(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments), name="sluice")
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def given(*names: str) -> list[str]:
    return [word for name in names for word in ("-f", name)]


def test_files_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    assert sort_files([*ALL, OBJECTS]) == Files(OBJECTS, ALL)
    empty = tmp_path / "ipset-save"
    empty.write_text("create KUBE-CLUSTER-IP hash:ip,port family inet hashsize 1024 maxelem 65536\n")
    assert sort_files([str(empty)]).rules == (str(empty),)
    manifest = tmp_path / "notes.yaml"
    manifest.write_text("text: |\n  create KUBE-X hash:ip\n  -A -t 10.0.0.1:80 -s rr\n")
    assert sort_files([str(manifest)]).manifests == str(manifest)


def test_dump_puts_the_files_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = sluice(capsys, "dump", *given(*ALL), "-o", "json")
    assert code == 0
    assert err.count("\n") == 1, "both families' rules are of one older version"
    assert "sluice dump: these are rules of an older version" in err
    apart = json.loads(out)["tables"]
    assert [(each["family"], len(each["routes"])) for each in apart] == [("IPv4", 22), ("IPv6", 3)]
    assert not any(each["damage"] for each in apart)
    one = tmp_path / "all.txt"
    one.write_text("\n".join(Path(name).read_text() for name in ALL))
    _, out, _ = sluice(capsys, "dump", *given(str(one)), "-o", "json")
    assert [each["routes"] for each in json.loads(out)["tables"]] == [each["routes"] for each in apart]
    code, out, _ = sluice(capsys, "dump", *given(*ALL), "--address", "192.0.2.30")
    assert code == 0
    assert "ExternalIP" in out


def test_services_have_no_names_and_dump_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = sluice(capsys, "dump", *given(*ALL), "--service", "default/np")
    assert code == 1
    assert "in ipvs mode nothing has the names of Services: ask by --address or --port" in err


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((RULES,), f"sluice dump: {RULES}: kube-proxy runs in ipvs mode there: give what `ipvsadm -Sn` prints"),
        ((SERVERS,), "give what `ipset save` prints (which frontends there are) too"),
        ((SERVERS, RULES), "give what `ipset save` prints (which frontends there are) too"),
        ((SETS, RULES), "give what `ipvsadm -Sn` prints (the virtual servers with their backends) too"),
        ((ADDRESSES,), f"sluice dump: {ADDRESSES}: kube-proxy has no rules in it"),
    ],
)
def test_what_is_missing_is_one_line(names: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = sluice(capsys, "dump", *given(*names))
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1


def test_explain_names_the_services_of_the_objects(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = sluice(capsys, "explain", *given(*ALL, OBJECTS), *NODE1, "default/np")
    assert code == 0, out + err
    assert "10.96.30.4:80/TCP is the ClusterIP of default/np" in out
    assert "10.244.2.11:8080  on node2" in out
    assert "NOT what is wanted" not in out
    # The node's own addresses, which were saved with the rules, answer node ports; ClusterIPs are none of them.
    assert "192.168.50.11 answers node ports" in out
    code, out, err = sluice(capsys, "explain", *given(*ALL), "default/np")
    assert code == 1
    assert "in ipvs mode nothing has the names of Services: ask about an address, or give manifests with -f" in err


def test_explain_says_what_ipvs_mode_does_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = sluice(capsys, "explain", *given(*ALL), "203.0.113.30:80", "--from", "203.0.113.99")
    assert code == 1
    assert "is in none of the source ranges" in out
    assert "IPVS-21" not in err
    code, out, err = sluice(capsys, "explain", *given(*ALL), "192.168.50.11:31081", "--from", "pod")
    assert code == 0, out
    assert "in ipvs mode local pods and the node are given the same backends as everybody" in err
    code, out, _ = sluice(capsys, "explain", *given(*ALL, OBJECTS), *NODE1, "10.96.30.9:80")
    assert "backend: wanted none, the kernel has 10.244.2.11:8080" in out, "1.20 has no internalTrafficPolicy"


def test_verify_names_what_differs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = sluice(capsys, "verify", *given(*ALL, OBJECTS), *NODE1)
    assert code == 1
    assert f"IPv6 in kube-proxy's ipvs rules: equal to what {OBJECTS} wants, 3 frontends" in out
    assert "  default/itp  ClusterIP 10.96.30.9:80/TCP" in out
    assert "default/np" not in out
    assert err.count("\n") == 1
    edited = tmp_path / "ipvsadm"
    edited.write_text(re.sub(r"-a -t \S+:31080 -r 10.244.2.11:8080 .*\n", "", Path(SERVERS).read_text()))
    code, out, _ = sluice(capsys, "verify", *given(str(edited), *ALL[1:], OBJECTS), *NODE1)
    assert code == 1
    assert "  default/np  NodePort *:31080/TCP\n    - backend: 10.244.2.11:8080" in out


def test_a_bundle_is_read_by_every_verb(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    archive = tmp_path / "bundle.tar.gz"
    manifest = {
        "format": 1,
        "taken": "2026-11-21T11:00:00Z",
        "version": "1",
        "node": "node1",
        "addresses": ["wKgyCw=="],
        "node_ips": ["wKgyCw=="],
    }
    files = {
        f"{OTHERS}iptables-nft-IPv4.txt": Path(RULES).read_text(),
        f"{OTHERS}iptables-nft-IPv6.txt": Path(RULES6).read_text(),
        f"{OTHERS}nftables.txt": "table ip mine {\n}\n",
        f"{OTHERS}ipvs.txt": "\n".join(Path(each).read_text() for each in (SETS, SERVERS, ADDRESSES)),
        "manifest.json": json.dumps(manifest),
        "tables.json": "[]",
    }
    with tarfile.open(archive, "w:gz") as into:
        for name, text in files.items():
            info = tarfile.TarInfo(f"{TOP}/{name}")
            info.size = len(text.encode())
            into.addfile(info, io.BytesIO(text.encode()))
    code, of_bundle, err = sluice(capsys, "dump", "-f", str(archive), "--of", "kube-proxy", "-o", "json")
    assert code == 0, err
    _, of_files, _ = sluice(capsys, "dump", *given(*ALL), "-o", "json")
    assert [each["routes"] for each in json.loads(of_bundle)["tables"]] == [
        each["routes"] for each in json.loads(of_files)["tables"]
    ]
    code, out, err = sluice(capsys, "explain", "-f", str(archive), "--of", "kube-proxy", "10.96.30.4:80")
    assert code == 0, out + err
    assert "kube-proxy's ipvs rules in the bundle of node node1" in out
