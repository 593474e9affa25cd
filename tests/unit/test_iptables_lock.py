"""Who holds the xtables lock, as the log names him."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rules.iptables import programs

HOLD = """
import fcntl, pathlib, sys
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
pathlib.Path("/proc/self/comm").write_bytes(b"\\xff\\xfeodd")
print("held", flush=True)
sys.stdin.read()
"""


def test_the_holder_of_the_lock_may_call_himself_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    monkeypatch.setenv("XTABLES_LOCKFILE", str(lock))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        said = programs._lock_holder(0)
        holder.communicate()
    assert said.endswith(f"odd (process {holder.pid})")
