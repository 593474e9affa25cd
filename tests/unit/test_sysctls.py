"""Sysctls: written only where they differ, and no reason to end."""

from __future__ import annotations

import os

import pytest

from proxy.sysctls import ROUTE_LOCALNET, Setting, ensure, ensure_all, sysctl


@pytest.fixture
def proc(tmp_path):
    """A directory in the place of /proc/sys."""
    path = tmp_path / ROUTE_LOCALNET
    path.parent.mkdir(parents=True)
    path.write_text("0\n")
    return tmp_path


def test_ipt_30_a_sysctl_is_set(proc):
    assert ensure(ROUTE_LOCALNET, 1, root=proc) is None
    assert (proc / ROUTE_LOCALNET).read_text() == "1\n"


def test_what_is_right_already_is_not_written(proc, monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_text", lambda *_: pytest.fail("it was written"))
    assert ensure(ROUTE_LOCALNET, 0, root=proc) is None
    assert ensure_all([Setting(proc / ROUTE_LOCALNET, -1, at_least=True)]) == []


def test_a_smaller_number_is_raised(proc):
    path = proc / ROUTE_LOCALNET
    path.write_text("100\n")
    assert ensure_all([Setting(path, 200, at_least=True)]) == []
    assert path.read_text() == "200\n"


def test_what_cannot_be_written_is_one_line_for_each_reason(proc, monkeypatch):
    files = [proc / name for name in ("a", "b")]
    for file in files:
        file.write_text("1\n")

    def refuse(path, _text):
        raise OSError(30, os.strerror(30), str(path))

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    wanted = [Setting(files[0], 2), Setting(proc / "missing", 3), Setting(files[1], 4)]
    assert ensure_all(wanted) == [
        f"cannot set {files[0]} to 2, {files[1]} to 4: Read-only file system",
        f"cannot set {proc / 'missing'} to 3: No such file or directory",
    ]


def test_a_file_that_holds_no_number_is_a_complaint(proc):
    (proc / ROUTE_LOCALNET).write_text("what\n")
    assert "what" in ensure(ROUTE_LOCALNET, 1, root=proc)


def test_names_are_those_of_sysctl():
    assert sysctl("net/netfilter/nf_conntrack_max", 1).name == "net.netfilter.nf_conntrack_max"
    assert Setting(sysctl("x", 1).path.parent.parent / "self/oom_score_adj", 1).name == "/proc/self/oom_score_adj"
