"""Whether a kube-proxy runs here, and what of its mode ipvs is there, by what /proc says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxy import takeover, takeover_ipvs
from proxy.takeover import RunningError, who_runs
from rules.forwarding import Family

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


class Proc:
    """A /proc of a few files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("thread-self/net", "thread-self/ns", "self/fd"):
            (path / name).mkdir(parents=True)
        (path / "thread-self/ns/net").write_text("")

    def process(self, pid: int, name: str, exe: str, *, here: bool = True, zombie: bool = False) -> None:
        directory = self.path / str(pid)
        (directory / "ns").mkdir(parents=True)
        (directory / "comm").write_text(f"{name}\n")
        (directory / "cmdline").write_text("" if zombie else f"{name}\0--config\0")
        (directory / "exe").symlink_to(exe)
        if here:
            os.link(self.path / "thread-self/ns/net", directory / "ns/net")
        else:
            (directory / "ns/net").write_text("")

    def listener(self, port: int, inode: int, *, own: bool = False, file: str = "tcp", state: str = "0A") -> None:
        line = f"   0: 00000000:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 {inode} 1\n"
        (self.path / "thread-self/net" / file).write_text(HEAD + line)
        if own:
            (self.path / "self/fd" / str(inode)).symlink_to(f"socket:[{inode}]")


@pytest.fixture
def proc(tmp_path):
    return Proc(tmp_path)


def test_a_node_without_one_has_none(proc):
    proc.process(10, "kubelet", "/usr/bin/kubelet")
    assert who_runs(proc.path) == ""


def test_a_kube_proxy_of_this_network_namespace_is_named(proc):
    proc.process(10, "kube-proxy", "/usr/local/bin/kube-proxy")
    assert who_runs(proc.path) == "kube-proxy runs in this network namespace (process 10)"


def test_a_process_may_call_itself_anything(proc):
    proc.process(9, "odd", "/usr/bin/odd")
    (proc.path / "9/comm").write_bytes(b"\xff\xfe\n")
    proc.process(10, "kube-proxy", "/usr/local/bin/kube-proxy")
    assert who_runs(proc.path) == "kube-proxy runs in this network namespace (process 10)"


def test_others_of_that_name_do_not_count(proc):
    proc.process(10, "kube-proxy", "/usr/local/bin/kube-proxy", here=False)
    proc.process(11, "kube-proxy", "/opt/sluice/bin/python3.11")
    proc.process(12, "kube-proxy", "/usr/local/bin/kube-proxy", zombie=True)
    proc.process(os.getpid(), "kube-proxy", "/usr/local/bin/kube-proxy")
    assert who_runs(proc.path) == ""


@pytest.mark.parametrize("port", [10256, 10249])
@pytest.mark.parametrize("file", ["tcp", "tcp6"])
def test_who_listens_at_its_ports_counts_as_one_in_another_container(proc, port, file):
    proc.listener(port, 7, file=file)
    assert who_runs(proc.path) == f"another program listens on port {port}, as a running kube-proxy does"
    assert who_runs(proc.path, ports=False) == ""


def test_our_own_ports_connections_and_other_ports_do_not_count(proc):
    proc.listener(10256, 7, own=True)
    assert who_runs(proc.path) == ""
    proc.listener(10256, 8, state="01")
    assert who_runs(proc.path) == ""
    proc.listener(10250, 9)
    assert who_runs(proc.path) == ""


def test_ipvs_30_what_of_mode_ipvs_is_there_is_named(proc):
    net = proc.path / "thread-self/net"
    assert takeover_ipvs.left(proc.path) == []
    (net / "ip_vs").write_text(
        "IP Virtual Server version 1.2.1 (size=4096)\n"
        "Prot LocalAddress:Port Scheduler Flags\n"
        "  -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n"
        "TCP  0A600001:01BB rr \n"
        "  -> AC1F0F01:1D63      Masq    1      0          0\n"
        "UDP  0A60000A:0035 rr \n"
    )
    (net / "dev").write_text("Inter-|   Receive\n face |bytes\n    lo: 0 0\nkube-ipvs0: 0 0\n")
    how = "sluice cleanup --of kube-proxy removes what is kube-proxy's"
    assert takeover_ipvs.left(proc.path) == [
        f"2 virtual servers of ipvs stay, for the connections that are open: {how}",
        f"the device kube-ipvs0 of kube-proxy's mode ipvs stays: {how}",
    ]


def test_the_agent_takes_over_where_rules_are_and_nobody_writes_them(monkeypatch):
    asked = []
    monkeypatch.setattr(takeover, "present", lambda family: family is Family.IPV4)
    monkeypatch.setattr(takeover, "who_runs", lambda: "")
    monkeypatch.setattr(takeover, "remove", lambda families: asked.extend(families) or ["removed it"])
    monkeypatch.setattr(takeover_ipvs, "left", list)
    assert takeover.take_over(Family.IPV6) == []
    assert takeover.take_over(Family.IPV4) == ["removed it"]
    assert asked == [Family.IPV4]
    monkeypatch.setattr(takeover, "who_runs", lambda: "kube-proxy runs")
    assert takeover.take_over(Family.IPV6) == [], "without rules there is nothing to say"
    with pytest.raises(RunningError, match="kube-proxy runs: they go once it has ended"):
        takeover.take_over(Family.IPV4)
    assert asked == [Family.IPV4]
