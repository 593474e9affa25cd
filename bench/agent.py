"""The agent as a process: how it is started, and what it uses."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from bench.cluster import NODE

MARKS = Path(__file__).with_name("marks")
SMALLEST = "1us"
"""The smallest minSyncPeriod there is: 0 would mean the default."""
HEALTH = 10256


class Usage(NamedTuple):
    """What a process holds in memory, in bytes."""

    rss: int
    uss: int


class Source(NamedTuple):
    """Where the agent's objects come from: one of the two."""

    manifests: Path | None = None
    kubeconfig: Path | None = None


class Agent:
    """`sluice run` of a checkout, from start to end of a `with` block."""

    def __init__(
        self, checkout: Path, directory: Path, source: Source, *, period: str | None = SMALLEST, marks: bool = False
    ) -> None:
        """Of a checkout of Sluice.

        Args:
            checkout: where its packages are.
            directory: for configuration and log.
            source: of its objects.
            period: minSyncPeriod; None: the default.
            marks: whether to note when it writes to the kernel.
        """
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "hostnameOverride": NODE,
            "clientConnection": {"kubeconfig": str(source.kubeconfig or "")},
            "nftables": {"minSyncPeriod": period} if period else {},
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
        (directory / "config.yaml").write_bytes(msgspec.json.encode(config))
        self.log = directory / "agent.log"
        self._checkout = checkout
        self._command = [sys.executable, "-m", "proxy", "run", "--config", str(directory / "config.yaml")]
        if source.manifests:
            self._command += ["--manifests", str(source.manifests)]
        self._environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._marks: mmap.mmap | None = None
        if marks:
            path = directory / "marks"
            path.write_bytes(bytes(8))
            with path.open("r+b") as file:
                self._marks = mmap.mmap(file.fileno(), 8)
            self._environment |= {"PYTHONPATH": str(MARKS), "SLUICE_BENCH_MARKS": str(path)}
        self.started = 0.0

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.started = time.monotonic()
            self._process = subprocess.Popen(  # noqa: S603  # our own program
                self._command, cwd=self._checkout, env=self._environment, stdout=log, stderr=log
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def check(self) -> None:
        """See that it runs.

        Raises:
            RuntimeError: it does not; the message has the end of its log.
        """
        if self._process.poll() is not None:
            raise RuntimeError(f"the agent ended with {self._process.returncode}:\n{self.tail()}")

    def tail(self) -> str:
        """The end of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def sent(self) -> float:
        """When it last began to hand something to the kernel (monotonic seconds), for an agent with marks."""
        assert self._marks is not None
        found: float = struct.unpack_from("=d", self._marks)[0]
        return found

    def cpu(self) -> float:
        """The CPU time that it has used, without that of its children, in seconds."""
        # The kernel's name for the CPU clock of another process (see clock_getcpuclockid).
        return time.clock_gettime(~self._process.pid << 3 | 2)

    def usage(self) -> Usage:
        """What it holds in memory now."""
        found = {}
        for line in Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, size, *_ = line.split()
            found[name] = int(size) * 1024
        return Usage(found["Rss:"], found["Private_Clean:"] + found["Private_Dirty:"])
