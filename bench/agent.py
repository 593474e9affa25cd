"""The agent as a process: how it is started, and what it uses."""

from __future__ import annotations

import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
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
        self,
        checkout: Path,
        directory: Path,
        source: Source,
        *,
        mode: str = "nftables",
        period: str | None = SMALLEST,
        marks: bool = False,
        run_directory: Path | None = None,
        more: Sequence[str] = (),
    ) -> None:
        """Of a checkout of Sluice.

        Args:
            checkout: where its packages are.
            directory: for configuration and log.
            source: of its objects.
            mode: the proxy mode.
            period: minSyncPeriod; None: the default.
            marks: whether to note when it writes to the kernel.
            run_directory: where its socket is; None: the default.
            more: flags beside those.
        """
        config = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": mode,
            "hostnameOverride": NODE,
            "clientConnection": {"kubeconfig": str(source.kubeconfig or "")},
            mode: {"minSyncPeriod": period} if period else {},
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }
        # By itself, as it is in a node's /etc: the agent watches the directory, and must not be woken by its own log.
        config_file = directory / "etc" / "config.yaml"
        config_file.parent.mkdir(exist_ok=True)
        config_file.write_bytes(msgspec.json.encode(config))
        self.log = directory / "agent.log"
        self._checkout = checkout
        self._command = [sys.executable, "-m", "proxy", "run", "--config", str(config_file)]
        if source.manifests:
            self._command += ["--manifests", str(source.manifests)]
        if run_directory:
            self._command += ["--run-directory", str(run_directory)]
        self._command += more
        # Bytecode is kept, as that of an installed program is, whatever the shell says; the first run compiles.
        unwanted = {"PYTHONPATH", "PYTHONDONTWRITEBYTECODE"}
        self._environment = {name: value for name, value in os.environ.items() if name not in unwanted}
        self._environment["PYTHONPYCACHEPREFIX"] = str(directory / "bytecode")
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

    def children_cpu(self) -> float:
        """The CPU time of the programs that it ran, in seconds."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[13:15])) / os.sysconf("SC_CLK_TCK")

    def usage(self) -> Usage:
        """What it holds in memory now."""
        found = {}
        for line in Path(f"/proc/{self._process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, size, *_ = line.split()
            found[name] = int(size) * 1024
        return Usage(found["Rss:"], found["Private_Clean:"] + found["Private_Dirty:"])
