"""`sluice verify`: when a difference counts, and what it ends with."""

from __future__ import annotations

import io
import json
from typing import Any

import msgspec
import pytest

from proxy import agent_socket, cli, verify
from proxy.agent_socket import AgentError, NoAgentError, TableHead, WantedTable
from proxy.config.settings import Settings
from rules.dataplane import Capabilities, DataplaneError
from rules.forwarding import Family, ForwardingTable, Kind, Refusal, Route
from tests.builders import at, backends

WEB = Route(kind=Kind.CLUSTER_IP, backends=backends("10.0.0.1"), label="b/web:http")
GONE = Route(kind=Kind.CLUSTER_IP, refusal=Refusal.REJECT, label="b/web:http")
WANTED = ForwardingTable(family=Family.IPV4, routes={at("10.96.0.2:80"): WEB})
OTHER = ForwardingTable(family=Family.IPV4, routes={at("10.96.0.2:80"): GONE})


class Kernel:
    """A dataplane that holds one table after the other."""

    def __init__(self, *held: ForwardingTable | Exception | None) -> None:
        self.held = list(held)
        self.reads = 0
        self.closed = 0

    def __call__(self, name: str, family: Family) -> Any:
        assert (name, family) == ("nftables", Family.IPV4)
        return self

    def read(self) -> ForwardingTable | None:
        self.reads += 1
        value = self.held.pop(0) if len(self.held) > 1 else self.held[0]
        if isinstance(value, Exception):
            raise value
        return value

    def close(self) -> None:
        self.closed += 1


class Agent:
    """An agent by what it says; of `pending` and `syncs` the next ones, the last for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, namespace: int = 7, synced: bool = True) -> None:
        self.pending = [False]
        self.syncs = [1]
        self.namespace = namespace
        self.synced = synced
        self.error: AgentError | None = None
        monkeypatch.setattr(agent_socket, "status", lambda _: self)
        monkeypatch.setattr(agent_socket, "table", lambda _family, _directory: self.table())
        monkeypatch.setattr(agent_socket, "network_namespace", lambda: 7)
        monkeypatch.setattr(verify, "PAUSE", 0.0)

    pid = 42

    @property
    def families(self) -> list[Any]:
        return [msgspec.defstruct("Family", [("family", str)])("IPv4")]

    @property
    def network_namespace(self) -> int:
        return self.namespace

    def syncs_of(self, _: str) -> int:
        return self.syncs.pop(0) if len(self.syncs) > 1 else self.syncs[0]

    def table(self) -> WantedTable:
        if self.error is not None:
            raise self.error
        head = TableHead(
            family=Family.IPV4,
            node=WANTED.node,
            dataplane="nftables",
            capabilities=Capabilities(),
            syncs=1,
            pending=self.pending.pop(0) if len(self.pending) > 1 else self.pending[0],
            network_namespace=7,
        )
        return WantedTable(WANTED, head)


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Agent:
    return Agent(monkeypatch)


def run(kernel: Kernel, format_: Any = "text") -> tuple[int, str]:
    out = io.StringIO()
    code = verify.main(Settings(), "", format_, out=out, open_dataplane=kernel)
    return code, out.getvalue()


def test_equal(agent: Agent) -> None:
    kernel = Kernel(WANTED)
    assert run(kernel) == (0, "IPv4 in nftables: equal to what the agent wants, 1 frontend\n")
    assert kernel.closed == 1


def test_drift_is_a_diff(agent: Agent) -> None:
    assert run(Kernel(OTHER)) == (
        1,
        """\
IPv4 in nftables: 1 frontend changed (- wanted by the agent, + in the kernel)
  b/web:http  ClusterIP 10.96.0.2:80/TCP
    - without backend: none
    + without backend: rejected
    - backend: 10.0.0.1:80
""",
    )


def test_drift_in_json(agent: Agent) -> None:
    code, text = run(Kernel(None), "json")
    value = json.loads(text)
    assert (code, value["wanted"], value["equal"]) == (1, "the agent", False)
    (family,) = value["families"]
    assert (family["family"], family["dataplane"], family["absent"]) == ("IPv4", "nftables", True)


def test_what_the_agent_is_about_to_write_is_no_drift(agent: Agent) -> None:
    agent.pending = [True, True, False]
    kernel = Kernel(OTHER, OTHER, WANTED)
    assert run(kernel)[0] == 0
    assert kernel.reads == 3


def test_what_the_agent_wrote_in_between_is_no_drift(agent: Agent) -> None:
    agent.syncs = [2, 1]
    kernel = Kernel(OTHER, WANTED)
    assert run(kernel)[0] == 0
    assert kernel.reads == 2


def test_an_agent_that_never_stops_writing_leaves_it_open(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "PATIENCE", 0.0)
    agent.pending = [True]
    kernel = Kernel(OTHER)
    assert run(kernel)[0] == 2
    assert "keeps changing the rules of IPv4" in capsys.readouterr().err
    assert kernel.closed == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NoAgentError("no agent answers at /run/x"), "no agent answers at /run/x, or give manifests with -f"),
        (AgentError("the agent does not answer"), "the agent does not answer"),
    ],
)
def test_an_agent_that_cannot_be_asked(
    agent: Agent, error: AgentError, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.error = error
    assert run(Kernel(WANTED))[0] == 2
    assert capsys.readouterr().err == f"sluice verify: {words}\n"


def test_a_kernel_that_cannot_be_read(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = Kernel(DataplaneError("nftables (IPv4) cannot be read: permission denied"))
    assert run(kernel)[0] == 2
    assert capsys.readouterr().err == "sluice verify: nftables (IPv4) cannot be read: permission denied\n"
    assert kernel.closed == 1


def test_an_agent_of_another_namespace_or_without_lists_says_nothing_about_this_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Agent(monkeypatch, namespace=8)
    assert run(Kernel(WANTED))[0] == 2
    assert "process 42) serves another network namespace" in capsys.readouterr().err
    Agent(monkeypatch, synced=False)
    assert run(Kernel(WANTED))[0] == 2
    assert "has not listed all Services yet" in capsys.readouterr().err


# --- the command line ----------------------------------------------------------------------------------------------


def test_the_verbs_go_to_the_agent_of_the_run_directory(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("status", "verify"):
        assert cli.main([verb, "--run-directory", str(tmp_path)]) == 2
        assert f"sluice {verb}: no agent answers at {tmp_path}/agent.sock" in capsys.readouterr().err


def test_the_run_directory_may_come_from_the_configuration(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"apiVersion: sluice.internal/v1alpha1\nkind: SluiceConfiguration\nrunDirectory: {tmp_path}\n")
    assert cli.main(["status", f"--config={config}"]) == 2
    assert f"no agent answers at {tmp_path}/agent.sock" in capsys.readouterr().err


def test_flags_that_say_how_manifests_are_meant_need_manifests(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--cluster-cidr=10.0.0.0/8"]) == 2
    assert "--cluster-cidr says how manifests are meant: it needs -f" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("driftPolicy: ignore", 'driftPolicy: "ignore": must be repair or report'),
        ("runDirectory: run", 'runDirectory: "run": must be an absolute path'),
    ],
)
def test_settings_of_drift_and_socket_are_checked(
    lines: str, words: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"apiVersion: sluice.internal/v1alpha1\nkind: SluiceConfiguration\n{lines}\n")
    assert cli.main(["run", f"--config={config}"]) == 1
    assert words in capsys.readouterr().err
