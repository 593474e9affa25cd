"""The agent as the first process of a container, whom signals without a handler do not reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from proxy.lock import Lock
from tests.netns.agent import DEADLINE
from tests.netns.isolation import own_network_namespace


def test_it_ends_when_it_is_told_to_before_it_serves(root, tmp_path):
    """CFG-51: else a kubelet would wait for the whole grace period, and kill it."""
    log = tmp_path / "log"
    program = [str(Path(sys.executable).with_name("kube-proxy")), f"--manifests={tmp_path}", "--takeover"]
    quiet = ["--hostname-override=node1", f"--run-directory={tmp_path}/run"]
    with own_network_namespace(), log.open("wb") as file:
        lock = Lock()
        try:
            # The child of unshare is the first process of its namespace.
            command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *program, *quiet]
            process = subprocess.Popen(command, stdout=file, stderr=file)
            try:
                deadline = time.monotonic() + DEADLINE
                while "waiting" not in log.read_text():
                    assert process.poll() is None, log.read_text()
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.02)
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                [agent] = map(int, children)
                os.kill(agent, signal.SIGTERM)
                assert process.wait(DEADLINE) == 0
            finally:
                process.kill()
                process.wait()
        finally:
            lock.release()
    assert "Traceback" not in log.read_text()
