"""`sluice demo` as a person or a script runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from proxy.demo import namespaces

COMMAND = [sys.executable, "-m", "proxy", "demo"]


def left_behind(demo: subprocess.Popen) -> list[str]:
    return [path.name for path in namespaces.RUN.glob(f"sluice-demo-{demo.pid}-*")]


def agents_of(pid: int) -> list[str]:
    """Processes in the session or with the parent `pid`."""
    found = subprocess.run(["ps", "-eo", "pid,ppid,sid,args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if str(pid) in line.split()[:3]]


def test_the_demo_meets_its_expectations_and_prints_plain_text_in_a_pipe(root):
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        shown = demo.stdout.read()
    assert demo.returncode == 0, shown
    assert "\x1b" not in shown
    assert "WRONG" not in shown
    assert "  0 of" in shown.rpartition("connections failed")[0].splitlines()[-1]
    for words in ["ClusterIP 10.96.0.10:80", "node port", "load balancer", "[fd00:10:96::10]:80", "refused", "dropped"]:
        assert words in shown
    assert left_behind(demo) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["servers in the pods", "first rules", "dns"])
def test_a_signal_at_any_moment_leaves_nothing_behind(root, number, moment):
    demo = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with demo:
        for line in demo.stdout:
            if moment in line:
                break
        demo.send_signal(number)
        rest = demo.stdout.read()
    assert (demo.returncode, rest.splitlines()[-1]) == (130, "Interrupted. Nothing is left behind.")
    assert left_behind(demo) == []
    assert agents_of(demo.pid) == []


def test_killed_outright_its_processes_end_too(root):
    demo = subprocess.Popen(COMMAND, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with demo:
        for line in demo.stdout:
            if "first rules" in line:
                break
        [agent] = [line.split()[0] for line in agents_of(demo.pid) if " run " in line]
        demo.kill()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{agent}") and time.monotonic() < deadline:  # noqa: PTH110  # a process, not a file
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{agent}")  # noqa: PTH110  # likewise
    namespaces.remove_stale("sluice-demo")
    assert left_behind(demo) == []


UNPRIVILEGED = """
import os, sys
import proxy.demo.show
os.setresuid(65534, 65534, 65534)
sys.exit(proxy.demo.main())
"""


def test_without_root_one_line_says_what_is_missing():
    command = [sys.executable, "-c", UNPRIVILEGED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "root is needed" in done.stderr
