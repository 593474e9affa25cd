"""The benchmark of iptables mode measures what it says: a short form, for its correctness alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rules.forwarding import Family
from rules.iptables.programs import available

ROOT = Path(__file__).parents[2]


@pytest.mark.xdist_group("bench")
def test_a_short_run_fills_the_table_for_both_kinds_of_programs(root: None) -> None:
    command = [sys.executable, "-m", "bench.iptables", "--sizes", "50", "--changes", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # It compares the kernel with the cluster by itself, after the changes.
    assert done.returncode == 0, done.stderr
    for kind in available(Family.IPV4):
        assert f"50 x 4, iptables-{kind}" in done.stdout
    for what in ("full sync (s)", "change, median (ms)", "USS", "connect through the last Service (us)", "no Service"):
        assert done.stdout.count(what) == len(available(Family.IPV4))
