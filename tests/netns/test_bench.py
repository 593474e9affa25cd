"""The benchmark measures what it says it does: a short form of it, for its correctness and not for its times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from bench.report import Results

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.xdist_group("bench")
def test_a_short_run_fills_the_table(root, tmp_path):
    out = tmp_path / "results.json"
    short = ("--no-iptables", "--sizes", "1000", "--starts", "1", "--changes", "3", "--flows", "4000")
    done = run(*short, "--out", str(out))
    # It compares the kernel with what was sent by itself, after each session of changes.
    assert done.returncode == 0, done.stderr
    found = msgspec.json.decode(out.read_bytes(), type=Results)
    rows = {(row.cluster, row.what) for row in found.rows}
    assert {cluster for cluster, _ in rows} == {"1,000 x 4", "1,000 x 4, 1 in 10 with affinity", "4,000 UDP flows"}
    for what in (
        *("first sync, API server", "first sync, JSON", "first sync, YAML"),
        *("endpoint replaced, median", "endpoint added, median", "endpoint removed, median"),
        *("Service added, median", "Service removed, median", "1000 replaced in a burst"),
        *("default settings: endpoint replaced, median", "default settings: 1000 replaced in a burst"),
        *("USS after the first sync", "RSS after the first sync", "longest wait for /healthz in a first sync"),
        *("connect directly", "connect through the first Service", "connect through the last Service"),
    ):
        assert ("1,000 x 4", what) in rows
        assert what in done.stdout
    assert all(row.values["now"] > 0 for row in found.rows)


def test_an_agent_that_ends_is_an_error_with_its_log(root, tmp_path):
    (tmp_path / "proxy").mkdir()
    (tmp_path / "proxy" / "__init__.py").touch()
    (tmp_path / "proxy" / "__main__.py").write_text("raise SystemExit('no agent here')")
    done = run("--sizes", "10", "--against", str(tmp_path), "--out", str(tmp_path / "results.json"))
    assert done.returncode != 0
    assert "no agent here" in done.stderr
