"""dump, explain and verify of another proxy's rules, from files and with objects from elsewhere."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ryaml

from proxy import cli
from proxy.config.settings import Settings
from proxy.explain.routing import Way
from proxy.explain.surroundings import Surroundings
from proxy.foreign import choice, explain, listing, sources, verify, wanted
from proxy.foreign.sources import Files, from_files, sort_files
from proxy.foreign.wanted import CannotTellError
from rules.forwarding import Address, Family, parse_address
from tests.builders import networks
from tests.fakes.apiserver import FakeApiServer

RECORDING = Path(__file__).parents[1] / "data" / "kube-proxy-v1.36.2"
OBJECTS = str(RECORDING / "objects.yaml")
IPTABLES, IP6TABLES, NFT = (
    str(RECORDING / name) for name in ("iptables.iptables-save", "iptables.ip6tables-save", "nftables.nft")
)
IPVS = Path(__file__).parents[1] / "recordings" / "kube-proxy-v1.20.2-ipvs"
NODE1 = ("--hostname-override", "node1", "--bind-address", "192.168.50.11")


def sluice(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments), name="sluice")
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def edited(tmp_path: Path, pattern: str, replacement: str, name: str = IPTABLES) -> str:
    text, count = re.subn(pattern, replacement, Path(name).read_text(), flags=re.MULTILINE)
    assert count
    file = tmp_path / "rules"
    file.write_text(text)
    return str(file)


def test_large_files_are_decoded_in_a_process_of_their_own_to_the_same_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = edited(tmp_path, r"10\.244\.1\.11", "10.244.1.99")
    commands = [
        (verb, "-f", rules, "-f", OBJECTS, *NODE1)
        for verb in ("verify", "explain default/web")
        for rules in (IPTABLES, changed)
    ]
    said = [sluice(capsys, *command[0].split(), *command[1:]) for command in commands]
    assert {code for code, _, _ in said} >= {0, 1}
    copies = []
    monkeypatch.setattr(sources, "LARGE", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threading, "active_count", lambda: 1)
    monkeypatch.setattr(os, "fork", lambda fork=os.fork: copies.append(1) or fork())
    # What is computed meanwhile is for the likely mode: whichever that was held to be, the answer is the same.
    for likely in (sources.likely_mode, lambda _: "nftables", lambda _: ""):
        monkeypatch.setattr(verify, "likely_mode", likely)
        monkeypatch.setattr(explain, "likely_mode", likely)
        copies.clear()
        assert [sluice(capsys, *command[0].split(), *command[1:]) for command in commands] == said
        assert len(copies) == len(commands)
    assert sluice(capsys, "verify", "-f", edited(tmp_path, "KUBE", "CUBE"), "-f", OBJECTS, *NODE1)[0] == 2


def test_the_likely_mode_is_the_one_of_the_rules(tmp_path: Path) -> None:
    for name in (IPTABLES, IP6TABLES, NFT, f"{NFT}.json"):
        assert sources.likely_mode(Files("", (name,))) == from_files([name])[0].reading.mode, name
    for name in ("iptables-save", "ipset-save", "ipvsadm-save"):
        assert sources.likely_mode(Files("", (str(IPVS / name),))) == "ipvs", name
    assert sources.likely_mode(Files(OBJECTS, ())) == ""
    assert sources.likely_mode(Files("", (str(tmp_path / "nothing"),))) == ""


# --- files -------------------------------------------------------------------------------------------------------


def test_files_are_told_apart_by_what_is_in_them(tmp_path: Path) -> None:
    renamed = tmp_path / "objects.yaml"
    renamed.write_text(Path(NFT).read_text())
    assert sort_files([OBJECTS, str(renamed), IPTABLES]) == Files(OBJECTS, (str(renamed), IPTABLES))
    assert sort_files([str(tmp_path)]) == Files(str(tmp_path), ()), "a directory is of manifests"
    assert sort_files(["-"]) == Files("-", ())
    with pytest.raises(ValueError, match="takes one file or directory"):
        sort_files([OBJECTS, str(RECORDING / "config.yaml")])


def test_a_manifest_that_is_json_is_no_file_of_rules(tmp_path: Path) -> None:
    file = tmp_path / "objects.json"
    file.write_text(json.dumps({"kind": "List", "items": [], "note": '"nftables"'}))
    assert sort_files([str(file)]).manifests


@pytest.mark.parametrize("first", ["apiVersion: v1\n", "# of node1\n- apiVersion: v1\n", '"apiVersion" : "v1"\n'])
def test_objects_in_yaml_are_told_by_how_they_begin_and_rules_by_any_line(first: str, tmp_path: Path) -> None:
    """Most of their bytes need not be read for it: ten thousand Services have 26 MB."""
    file = tmp_path / "objects.yaml"
    comment = "# no more than a note\n" * 4000
    file.write_text(f"{first}{comment}*nat\n")
    assert sort_files([str(file)]).manifests
    file.write_text(f"{comment}*nat\n")
    assert sort_files([str(file)]).rules == (str(file),)


def test_dump_prints_a_file_of_rules(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = sluice(capsys, "dump", "-f", IPTABLES, "-f", IP6TABLES, "-o", "json")
    assert (code, err) == (0, "")
    assert [each["family"] for each in json.loads(out)["tables"]] == ["IPv4", "IPv6"]
    code, out, _ = sluice(capsys, "dump", "-f", NFT, "--address", "10.244.1.13")
    assert code == 0
    assert "default/ext" in out
    assert "default/web" not in out


def test_dump_reads_standard_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(Path(IPTABLES).read_bytes())))
    code, out, _ = sluice(capsys, "dump", "-f", "-", "--service", "sticky")
    assert code == 0
    assert "affinity 600s" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["dump", "-f", OBJECTS], f"sluice dump: {OBJECTS}: it is not what iptables-save"),
        (["dump", "-f", "/nonexistent"], "sluice dump: /nonexistent: No such file or directory"),
        (["dump", "-f", NFT, "-o", "raw"], "-o raw shows rules of sluice"),
        (["verify", "-f", NFT], "give manifests with -f too"),
        (["verify", "-f", NFT, "-f", "/nonexistent"], "/nonexistent"),
        (["verify", "--of", "sluice", "--kubeconfig", "/nonexistent"], "--of kube-proxy"),
        (["explain", "-f", NFT, "10.96.30.1:80", "--from", "fd00::1"], "--from is IPv6"),
        (["explain", "-f", NFT, "10.96.30.1"], ""),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = sluice(capsys, *arguments)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


# --- explain -----------------------------------------------------------------------------------------------------


def test_explain_goes_by_saved_rules(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = sluice(capsys, "explain", "-f", IPTABLES, "10.96.30.8:80", "--from", "10.244.1.13")
    assert (code, err) == (0, "")
    assert f"kube-proxy's iptables rules, saved in {IPTABLES}" in out
    assert "10.244.1.13 counts as a local pod" in out
    assert "gets the backend that it had" in out
    code, out, _ = sluice(capsys, "explain", "-f", NFT, "203.0.113.30:80", "--from", "192.0.2.99")
    assert code == 1
    assert "is dropped" in out


def test_explain_says_where_saved_rules_differ_from_the_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = sluice(capsys, "explain", "-f", IPTABLES, "-f", OBJECTS, *NODE1, "default/np")
    assert code == 0
    assert "on node2" in out, "the objects know the nodes"
    assert "NOT what is wanted" not in out
    rules = edited(tmp_path, r"^-A KUBE-SERVICES -d 10.96.30.4/32.*\n", "")
    _, out, _ = sluice(capsys, "explain", "-f", rules, "-f", OBJECTS, *NODE1, "default/np")
    assert "10.96.30.4:80/TCP is wanted, and the kernel does not have it" in out


def test_explain_knows_the_addresses_of_a_node_that_is_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("explain", "-f", IPTABLES, "192.168.50.11:31080")
    code, _, _ = sluice(capsys, *arguments)
    assert code == 1, "nobody said that this is an address of the node"
    for more in (("--node-addresses", "192.168.50.11"), ("-f", OBJECTS, *NODE1)):
        code, out, _ = sluice(capsys, *arguments, *more)
        assert code == 0, out


# --- verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "objects"), [("iptables", ""), ("nftables", ""), ("ipvs", str(IPVS / "objects.yaml"))]
)
def test_explain_tells_by_name_what_it_tells_by_address(
    mode: str, objects: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The source of the node's own connections, on which source ranges hang, and backends that it does not reach."""
    ipvs = [str(IPVS / name) for name in ("ipvsadm-save", "ipset-save", "iptables-save", "addresses.json")]
    found = from_files({"iptables": [IPTABLES], "nftables": [NFT], "ipvs": ipvs}[mode])
    lost = parse_address("10.244.2.11")

    def look(*addresses: Address) -> Surroundings:
        ways = {each: Way("eth1", parse_address("192.0.2.7")) for each in addresses if each != lost}
        own = list(map(parse_address, ("192.168.50.11", "192.0.2.7")))
        nowhere = {lost: "there is no route"} if lost in addresses else {}
        return Surroundings(addresses=frozenset(own), node_ips={Family.IPV4: own[0]}, ways=ways, unreachable=nowhere)

    def asked(target: str) -> dict[str, Any]:
        where = explain.Where(files=Files(objects, ()))
        settings = Settings(hostname_override="node1", run_directory="/nonexistent")
        means = explain.Means(lambda families: [each for each in found if each.reading.table.family in families], look)
        explain.main(target, "node", where, settings, as_json=True, means=means)
        answers = json.loads(capsys.readouterr().out)["answers"]
        return {each["frontend"]: (each["packet"], each["outcome"], each["causes"]) for each in answers}

    by_name = asked("default/np") | asked("default/lb")
    assert len(by_name) == 5
    for frontend, told in by_name.items():
        assert asked(frontend) == {frontend: told}
    packet, _, _ = by_name["203.0.113.30:80/TCP"]
    assert packet["source"] == ("203.0.113.30" if mode == "ipvs" else "192.0.2.7")
    _, _, causes = by_name["10.96.30.4:80/TCP"]
    assert [each["words"] for each in causes if each["kind"] == "no-route"] == [
        "the node has no way to 10.244.2.11:8080: there is no route (routes to pods are the CNI's)"
    ]


def test_verify_names_what_saved_rules_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = edited(tmp_path, r"^-A KUBE-NODEPORTS .*--dport 31080.*\n", "")
    code, out, err = sluice(capsys, "verify", "-f", rules, "-f", OBJECTS, *NODE1)
    assert code == 1
    assert "  default/np  NodePort *:31080/TCP\n    - is missing" in out
    assert f"+ in {rules})" in out
    assert "the files have no rules of IPv6: it is not compared" in err
    _, out, _ = sluice(capsys, "verify", "-f", rules, "-f", OBJECTS, *NODE1, "-o", "json")
    assert "the files have no rules of IPv6: it is not compared" in json.loads(out)["notes"]
    code, out, _ = sluice(capsys, "verify", "-f", rules, "-f", OBJECTS, *NODE1, "-o", "json")
    value = json.loads(out)
    assert (code, value["equal"], value["families"][0]["dataplane"]) == (1, False, "kube-proxy's iptables rules")


def test_verify_compares_the_nodes_facts_where_the_configuration_is_known(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("verify", "-f", IP6TABLES, "-f", OBJECTS, *NODE1)
    code, _, _ = sluice(capsys, *arguments)
    assert code == 0
    code, out, _ = sluice(capsys, *arguments, "--cluster-cidr", "fd00:999::/32")
    assert code == 1
    assert "- local pods: sources in fd00:999::/32" in out
    code, _, err = sluice(capsys, *arguments, "--proxy-mode", "nftables")
    assert code == 0
    assert "mode nftables is configured, and the rules are of mode iptables" in err


@contextmanager
def api_server(objects: list[dict[str, Any]]) -> Iterator[str]:
    """A server in a thread of its own; its URL."""
    loop = asyncio.new_event_loop()
    ready: list[str] = []
    started, over = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with FakeApiServer() as server:
            for each in objects:
                server.set(each)
            ready.append(server.url)
            started.set()
            await over.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert started.wait(30)
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(30)
        loop.close()


def recorded_objects() -> list[dict[str, Any]]:
    text = Path(OBJECTS).read_text()
    items: list[dict[str, Any]] = ryaml.loads(text)["items"]  # type: ignore[attr-defined]  # as in its stub
    return items


def test_the_api_server_says_what_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with api_server(recorded_objects()) as url:
        code, out, err = sluice(capsys, "verify", "-f", IP6TABLES, "--master", url, *NODE1)
        assert code == 0, out + err
        assert f"equal to what {url} wants, 3 frontends" in out
        code, out, _ = sluice(capsys, "verify", "-f", IPTABLES, "--master", url, *NODE1)
    assert code == 1
    assert "1 frontend extra, 1 hairpin" in out, "default/kubernetes, which this server does not have"


def test_an_api_server_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "PATIENCE", 0.2)
    settings = Settings(master="http://127.0.0.1:9")
    with pytest.raises(CannotTellError, match="has not listed everything within 0 s"):
        wanted.of_api_server(settings, "node1")


def test_rules_of_two_modes_are_both_compared_and_told() -> None:
    both = [*from_files([NFT]), *from_files([IPTABLES, IP6TABLES])]
    asked = verify.Asked(Files(OBJECTS, ()), configured=False)
    settings = Settings(
        hostname_override="node1", bind_address="192.168.50.11", cluster_cidrs=networks("10.244.0.0/16")
    )
    comparison = verify._Comparison(asked, settings, lambda: both)
    verified = comparison.run()
    assert len(verified) == 4
    assert "kube-proxy has rules in iptables and in nftables: all of them act" in comparison.notes


# --- whose rules are meant ---------------------------------------------------------------------------------------


def test_whose_rules_are_meant_is_what_somebody_says() -> None:
    assert choice.another_is_meant("kube-proxy", "dump", None)
    assert not choice.another_is_meant("sluice", "dump", None)


def test_without_a_word_the_others_rules_are_read_only_where_there_are_none_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("proxy.modes.present", lambda: ())
    for tables, another in (({"kube-proxy"}, True), ({"kube-proxy", "sluice"}, False), ({"sluice"}, False)):
        monkeypatch.setattr(choice, "nft_tables", lambda tables=tables: frozenset(tables))
        assert choice.another_is_meant(None, "dump", None) is another
        assert ("its rules are read" in capsys.readouterr().err) is another
