"""The real kube-proxy on node1 of a world: its configuration as kubeadm writes it, its command line, its rules.

`KUBE_PROXY_BIN` says where the program is; `make kube-proxy` builds one.  It asks the stand-in API server, which serves
what its version wants (`ApiFeed(..., older=...)`).
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import ryaml

from proxy.demo.world import World
from rules.iptables.programs import Backend
from tests.netns.agent import DEADLINE
from tests.netns.asking import eventually, said

PATH = os.environ.get("KUBE_PROXY_BIN", "")
_KUBEADM = Path(__file__).parents[1] / "data" / "configmaps" / "kubeadm.yaml"
_NODE = "node1"
_PROGRAMS = tuple(f"{name}{suffix}" for name in ("iptables", "ip6tables") for suffix in ("", "-save", "-restore"))


class Version(NamedTuple):
    """What `kube-proxy --version` says, and what follows from it."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return ".".join(map(str, self))

    @property
    def knows_nftables(self) -> bool:
        """Alpha in 1.29."""
        return self >= (1, 29)

    @property
    def serves_terminating(self) -> bool:
        """Whether endpoints that end still serve where there are no others."""
        return self >= (1, 26)

    @property
    def spares_udp(self) -> bool:
        """Whether its first sync ends those UDP flows alone whose endpoint has gone, as 1.36 does (CT-3).

        1.20 ends all flows of every Service, and with them answers that are under way.
        """
        return self >= (1, 36)

    @property
    def reads_v1beta1(self) -> bool:
        """EndpointSlices of v1, which it reads since, came with 1.21."""
        return self < (1, 21)

    @property
    def gates(self) -> dict[str, bool]:
        """What both families need: on from 1.21, gone from 1.25."""
        return {"IPv6DualStack": True} if self < (1, 21) else {}


def version(path: str = PATH) -> Version:
    """The program's version.

    Raises:
        ValueError: it is no kube-proxy.
    """
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.fullmatch(r"Kubernetes v(\d+)\.(\d+)\.(\d+)\S*\n", said)
    if found is None:
        raise ValueError(f"{path} --version says {said!r}: that is no kube-proxy")
    return Version(*map(int, found.groups()))


class Kind(NamedTuple):
    """How a kube-proxy writes."""

    mode: str
    """nftables, iptables or ipvs."""
    backend: Backend = "nft"


class Running(NamedTuple):
    """A kube-proxy that runs."""

    process: subprocess.Popen[bytes]
    log: Path

    def end(self) -> None:
        """Stop it, also if it was suspended; its rules stay."""
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)
        self.process.wait(timeout=DEADLINE)


class KubeProxy:
    """The program with a configuration, to be started as often as wanted.

    kind: its mode, and which iptables it finds first in its PATH.
    client: the clientConnection of its configuration.
    """

    def __init__(self, world: World, directory: Path, kind: Kind, client: dict[str, Any], path: str = PATH) -> None:
        mode, backend = kind
        self.version = version(path)
        self.log = directory / "kube-proxy.log"
        self._world = world
        self._mode = mode
        self._backend = backend
        self._path = path
        self._file = directory / "config.conf"
        self._file.write_bytes(msgspec.json.encode(self.configuration(client)))
        self._programs = directory / f"iptables-{backend}"
        self._programs.mkdir(exist_ok=True)
        target = shutil.which(f"xtables-{backend}-multi")
        assert target, f"xtables-{backend}-multi is not installed"
        for name in _PROGRAMS:
            # They look at the name that they are started by.
            if not (self._programs / name).is_symlink():
                (self._programs / name).symlink_to(target)

    def configuration(self, client: dict[str, Any]) -> dict[str, Any]:
        """The file that kubeadm writes, with what a test needs; JSON is YAML."""
        config: dict[str, Any] = ryaml.loads(ryaml.loads(_KUBEADM.read_text())["data"]["config.conf"])  # type: ignore[attr-defined]  # as in its stub
        return {
            **config,
            "mode": self._mode,
            "clusterCIDR": "10.244.0.0/16,fd00:244::/32",
            "bindAddress": "192.168.50.11",
            # The stand-in reads no protobuf, in which events would come.
            "clientConnection": {"contentType": "application/json", **client},
            # Those of the host, where this is no virtual machine.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            "featureGates": self.version.gates,
        }

    def start(self) -> Running:
        """Start it as kubeadm's DaemonSet does, and return once it has written everything it was told first."""
        command = [self._path, f"--config={self._file}", f"--hostname-override={_NODE}"]
        environment = {**os.environ, "PATH": f"{self._programs}:{os.environ['PATH']}"}
        with self.log.open("ab") as log:
            process = self._world.start(_NODE, command, stdout=log, stderr=subprocess.STDOUT, env=environment)

        def written() -> bool:
            assert process.poll() is None, f"kube-proxy has ended:\n{self.log.read_text()}"
            return all(self._written(each) for each in ("4", "6"))

        eventually(written, "kube-proxy's rules")
        return Running(process, self.log)

    @contextmanager
    def running(self) -> Iterator[Running]:
        """It runs for as long as the block lasts."""
        running = self.start()
        try:
            yield running
        finally:
            running.end()

    def _written(self, family: str) -> bool:
        """Whether it has written what comes last of a family; there must be endpoints of each."""
        if self._mode == "nftables":
            return "endpoint-" in said(self._world, "nft", "list", "chains", "ip" if family == "4" else "ip6")
        program = "iptables" if family == "4" else "ip6tables"
        nat = said(self._world, f"{program}-{self._backend}-save", "-t", "nat")
        # Mode ipvs writes its servers, addresses and sets before the rules.
        return ("\n-A KUBE-SERVICES " if self._mode == "ipvs" else "\n:KUBE-SEP-") in nat
