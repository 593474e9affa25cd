"""`sluice explain --watch`: what is told, and when nothing is."""

from __future__ import annotations

import io
import json
import os

import msgspec
import pytest

from proxy import cli
from proxy.explain.asked import Client, parse_asked
from proxy.explain.evidence import Evidence
from proxy.explain.watching import Clock, is_unread, watch
from rules.forwarding import Family, ForwardingTable
from tests.builders import at
from tests.fakes.held import HELD


def evidence(table: ForwardingTable) -> Evidence:
    return Evidence(source="kernel", words="the kernel", tables={Family.IPV4: table})


EMPTY = msgspec.structs.replace(
    HELD, routes={at("10.96.0.41:80"): msgspec.structs.replace(HELD.routes[at("10.96.0.41:80")], backends=frozenset())}
)


def watched(*found: Evidence | Exception, as_json: bool = False) -> tuple[int, str]:
    """The exit code and what is printed, where these come one after the other and ^C then."""
    answers = iter(found)

    def gather() -> Evidence:
        each = next(answers)
        if isinstance(each, Exception):
            raise each
        return each

    left = [len(found) - 1]

    def sleep(_seconds: float) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1

    out = io.StringIO()
    clock = Clock(lambda: "12:00:00", sleep)
    code = watch(parse_asked("10.96.0.41:80"), Client(), gather, (ValueError,), as_json=as_json, out=out, clock=clock)
    return code, out.getvalue()


def test_the_same_answer_is_told_once():
    code, told = watched(evidence(HELD), evidence(HELD), evidence(HELD))
    assert code == 0
    assert told.count("According to") == 1
    assert "another" not in told


def test_another_answer_is_told_as_what_changed():
    code, told = watched(evidence(HELD), evidence(EMPTY))
    assert code == 1
    first, second = told.split("12:00:00  the answer is another:\n")
    assert "It works" in first
    lines = second.splitlines()
    assert all(line.startswith(("  + ", "  - ")) for line in lines)
    assert any(line.startswith("  -   ") and "It works" in line for line in lines)
    assert any(line.startswith("  +   ") and "It does not work" in line for line in lines)


def test_that_nobody_can_tell_is_an_answer_too():
    code, told = watched(evidence(HELD), ValueError("the agent is gone"), evidence(HELD))
    assert code == 0
    assert "+ Nobody can tell: the agent is gone" in told
    assert watched(ValueError("nothing there"))[0] == 2


def test_as_json_each_answer_is_a_line():
    _, told = watched(evidence(HELD), evidence(EMPTY), ValueError("gone"), as_json=True)
    first, second, third = map(json.loads, told.splitlines())
    assert (first["works"], second["works"], third["unanswered"]) == (True, False, "gone")
    assert {each["time"] for each in (first, second, third)} == {"12:00:00"}


def test_another_error_is_no_answer():
    with pytest.raises(RuntimeError):
        watched(RuntimeError())


def test_the_verb_asks_again(tmp_path, monkeypatch, capsys):
    manifest = tmp_path / "web.yaml"
    metadata, spec = "{name: web, namespace: default}", "{clusterIP: 10.96.0.9, ports: [{port: 80}]}"
    service = f"{{apiVersion: v1, kind: Service, metadata: {metadata}, spec: {spec}}}"
    manifest.write_text(service)

    def sleep(_seconds: float) -> None:
        if manifest.read_text() != service:
            raise KeyboardInterrupt
        manifest.write_text(service.replace("10.96.0.9", "10.96.0.10"))

    monkeypatch.setattr("proxy.explain.watching.time.sleep", sleep)
    assert cli.main(["explain", "--watch", "-f", str(manifest), "--node-addresses", "192.0.2.1", "default/web"]) == 1
    printed = capsys.readouterr().out
    assert "+ default/web  10.96.0.10:80/TCP (ClusterIP), from a local pod" in printed


def test_it_ends_when_nobody_reads_any_more():
    """What kubectl exec has started gets no signal when kubectl ends, and an answer that stays is not written again."""
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as out:
        assert not is_unread(out)
        looks = []

        def gather() -> Evidence:
            looks.append(1)
            if len(looks) == 2:
                os.close(reading)
            return evidence(HELD)

        clock = Clock(lambda: "12:00:00", lambda _: None, is_unread)
        assert watch(parse_asked("10.96.0.41:80"), Client(), gather, (), as_json=False, out=out, clock=clock) == 0
        assert len(looks) == 2
    assert not is_unread(io.StringIO())
