"""A two-node cluster of network namespaces on one machine; `proxy.demo.plan` says who lives where.

The machine's own interfaces, rules and settings are not touched: every interface is made inside the namespaces.  The
world goes away with its context, whatever ends it; the namespaces of a process that was killed are removed by the
next one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from pyroute2 import IPRoute

from proxy.demo import enter, namespaces, plan
from proxy.demo.namespaces import Namespace
from proxy.demo.plan import Host
from proxy.demo.probes import Probes

_GATEWAY = ("169.254.1.1", "fe80::1")
_FOREVER = 0xFFFFFFFF
_NODAD = 0x02


class World:
    """The cluster, from `with World() as world` to the end of that block.

    `prefix` begins the names of the namespaces; a process has one world per prefix.  `ipv6` False makes a world
    without IPv6; it is without it anyway where the kernel is.
    """

    def __init__(self, *, prefix: str = "sluice", ipv6: bool = True) -> None:
        self.ipv6 = ipv6 and Path("/proc/sys/net/ipv6").exists()
        self.namespaces: dict[str, Namespace] = {}
        self._prefix = prefix
        self._processes: list[subprocess.Popen[Any]] = []
        self._probes: Probes | None = None

    @property
    def probes(self) -> Probes:
        """Servers and clients inside the hosts."""
        if self._probes is None:
            raise RuntimeError("the world is not there yet, or no longer")
        return self._probes

    def __enter__(self) -> Self:
        namespaces.remove_stale(self._prefix)
        try:
            for name in plan.HOSTS:
                self.namespaces[name] = namespaces.create(f"{self._prefix}-{os.getpid()}-{name}")
            for host in plan.HOSTS.values():
                self.namespaces[host.name].inside(lambda host=host: self._prepare(host))  # type: ignore[misc]
            self._connect()
            self._probes = Probes({name: each.path for name, each in self.namespaces.items()})
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and remove the namespaces.  A second ^C does not interrupt it."""
        with _undisturbed():
            for process in self._processes:
                _end(process)
            if self._probes is not None:
                self._probes.close()
                self._probes = None
            for namespace in self.namespaces.values():
                namespace.remove()
            self.namespaces.clear()

    def start(
        self, host: str, command: Sequence[str], *, stdout: IO[Any] | int | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a command inside a host; it ends with the world, and with this process.

        Call it from a thread that lives on: the kernel takes the end of the calling thread for the parent's.
        ^C at the terminal does not reach it, as the world ends its processes itself.
        """
        entry = [sys.executable, "-I", "-S", enter.__file__, str(os.getpid()), str(self.namespaces[host].path)]
        process = subprocess.Popen(  # noqa: S603  # the caller's own command
            [*entry, *command], stdout=stdout, start_new_session=True, **options
        )
        self._processes.append(process)
        return process

    # --- how it is made ---------------------------------------------------------------------------------------

    def _prepare(self, host: Host) -> None:
        """Settings of a namespace, before it has any interface but loopback."""
        forward = host in (plan.NODE1, plan.NODE2)
        settings = {
            "ipv4/ip_forward": int(forward),
            # Refusals are counted by probes: none may be held back.
            "ipv4/icmp_ratelimit": 0,
            "ipv4/icmp_msgs_per_sec": 1_000_000,
            "ipv4/icmp_msgs_burst": 1_000_000,
            "ipv6/icmp/ratelimit": 0,
        }
        for scope in ("all", "default"):
            settings |= {
                f"ipv4/conf/{scope}/rp_filter": 0,
                f"ipv4/conf/{scope}/send_redirects": 0,
                f"ipv4/conf/{scope}/accept_redirects": 0,
                f"ipv6/conf/{scope}/disable_ipv6": int(not self.ipv6),
                f"ipv6/conf/{scope}/accept_dad": 0,
                f"ipv6/conf/{scope}/dad_transmits": 0,
                f"ipv6/conf/{scope}/accept_ra": 0,
                f"ipv6/conf/{scope}/accept_redirects": 0,
                f"ipv6/conf/{scope}/forwarding": int(forward),
            }
        for name, value in settings.items():
            # Not every kernel has each of them, or has it for every namespace.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                Path("/proc/sys/net", name).write_text(str(value))
        with IPRoute() as link:
            link.link("set", index=1, state="up")

    def _connect(self) -> None:
        """Interfaces, addresses and routes."""
        self._do(plan.UPSTREAM, self._make_bridge)
        for host in (plan.NODE1, plan.NODE2, plan.CLIENT, plan.FAR_CLIENT):
            self._attach(plan.UPSTREAM, host)
        for pod in plan.PODS:
            self._attach(plan.HOSTS[pod.node], pod)
        self._do(plan.UPSTREAM, self._configure_upstream)
        self._do(plan.NODE1, self._configure_node1)
        self._do(plan.NODE2, self._configure_node2)
        self._do(plan.CLIENT, self._configure_client)
        self._do(plan.FAR_CLIENT, self._configure_far_client)
        for pod in plan.PODS:
            self._do(pod, lambda network, pod=pod: network.pod(pod))  # type: ignore[misc]

    def _do(self, host: Host, work: Callable[[_Network], None]) -> None:
        def inside() -> None:
            with IPRoute() as link:
                work(_Network(link, self.ipv6))

        self.namespaces[host.name].inside(inside)

    def _make_bridge(self, network: _Network) -> None:
        network.link.link("add", ifname="br0", kind="bridge", br_mcast_snooping=0, br_forward_delay=0)
        network.up("br0")

    def _attach(self, near: Host, far: Host) -> None:
        """A veth pair from `near`, where it is called after `far`, to `far`, where it is `eth0`."""
        descriptor = os.open(self.namespaces[far.name].path, os.O_RDONLY)

        def make(network: _Network) -> None:
            network.link.link(
                "add",
                ifname=far.interface,
                kind="veth",
                address=_mac(near, far),
                peer={"ifname": "eth0", "address": _mac(far, far), "net_ns_fd": descriptor},
            )
            if near is plan.UPSTREAM:
                network.link.link("set", index=network.index(far.interface), master=network.index("br0"))
            network.up(far.interface)

        try:
            self._do(near, make)
        finally:
            os.close(descriptor)

    def _configure_upstream(self, network: _Network) -> None:
        host = plan.UPSTREAM
        network.addresses("br0", host, (24, 64))
        for cidrs, node in ((plan.POD_CIDRS["node1"], plan.NODE1), (plan.POD_CIDRS["node2"], plan.NODE2)):
            network.routes(cidrs, "br0", via=node)
        for far in (plan.CLIENT, plan.FAR_CLIENT):
            network.routes(far.addresses, "br0", via=plan.NODE1)
        network.routes(plan.NODE1.ipv4[1:] + plan.NODE1.ipv6[1:], "br0", via=plan.NODE1)
        # Every other address is its own.
        network.local_routes(("0.0.0.0/0", "::/0"))

    def _configure_node1(self, network: _Network) -> None:
        network.addresses("eth0", plan.NODE1, (24, 64))
        network.routes(plan.FAR_CLIENT.addresses, "eth0")
        network.routes(plan.POD_CIDRS["node2"], "eth0", via=plan.NODE2)
        network.routes(("0.0.0.0/0", "::/0"), "eth0", via=plan.UPSTREAM)
        network.pods(plan.NODE1, plan.PODS1)

    def _configure_node2(self, network: _Network) -> None:
        network.addresses("eth0", plan.NODE2, (24, 64))
        for destinations in (plan.POD_CIDRS["node1"], plan.CLIENT.addresses, ("0.0.0.0/0", "::/0")):
            network.routes(destinations, "eth0", via=plan.NODE1)
        network.pods(plan.NODE2, plan.PODS2)

    def _configure_client(self, network: _Network) -> None:
        network.addresses("eth0", plan.CLIENT, (24, 64))
        network.routes(("0.0.0.0/0", "::/0"), "eth0", via=plan.NODE1)

    def _configure_far_client(self, network: _Network) -> None:
        network.addresses("eth0", plan.FAR_CLIENT, (32, 128))
        network.routes((plan.NODE1.ipv4[0], plan.NODE1.ipv6[0]), "eth0")
        network.routes(("0.0.0.0/0", "::/0"), "eth0", via=plan.NODE1)


class _Network:
    """Interfaces, addresses and routes of the namespace that an rtnetlink socket belongs to."""

    def __init__(self, link: IPRoute, ipv6: bool) -> None:
        self.link = link
        self._ipv6 = ipv6

    def index(self, name: str) -> int:
        found = self.link.link_lookup(ifname=name)
        return int(found[0])

    def up(self, name: str) -> None:
        self.link.link("set", index=self.index(name), state="up")

    def addresses(self, interface: str, host: Host, lengths: tuple[int, int]) -> None:
        """The first address of each family gets its prefix length; others stand alone and are never preferred."""
        index = self.index(interface)
        self.up(interface)
        for position, address in enumerate(host.ipv4):
            self.link.addr("add", index=index, address=address, prefixlen=32 if position else lengths[0])
        for position, address in enumerate(host.ipv6 if self._ipv6 else ()):
            self.link.addr(
                "add",
                index=index,
                address=address,
                prefixlen=128 if position else lengths[1],
                flags=_NODAD,
                IFA_CACHEINFO={"ifa_preferred": 0 if position else _FOREVER, "ifa_valid": _FOREVER},
            )

    def routes(
        self, destinations: Iterable[str], interface: str, *, via: Host | None = None, source: Host | None = None
    ) -> None:
        """Routes to networks or addresses, directly or by way of a host of the segment."""
        index = self.index(interface)
        for destination in self._usable(destinations):
            v6 = ":" in destination
            options: dict[str, Any] = {"dst": destination, "oif": index}
            if via is not None:
                options["gateway"] = via.ipv6[0] if v6 else via.ipv4[0]
            elif not v6:
                options["scope"] = 253  # link: there is no gateway
            if source is not None:
                options["prefsrc"] = source.ipv6[0] if v6 else source.ipv4[0]
            self.link.route("add", **options)

    def local_routes(self, destinations: Iterable[str]) -> None:
        """The namespace answers to every address in the networks (AnyIP)."""
        for destination in self._usable(destinations):
            family = {"scope": 254} if ":" not in destination else {}
            self.link.route("add", dst=destination, oif=1, type="local", **family)

    def pods(self, node: Host, pods: Iterable[Host]) -> None:
        """The node's side of its pods."""
        for pod in pods:
            self.routes(pod.addresses, pod.interface, source=node)
            for address in self._usable(pod.addresses):
                self._neighbour(pod.interface, address, _mac(pod, pod))

    def pod(self, pod: Host) -> None:
        """The pod's side: a lone address, and a gateway that has a hardware address and no address of its own."""
        self.addresses("eth0", pod, (32, 128))
        for gateway, everywhere in zip(_GATEWAY, ("0.0.0.0/0", "::/0"), strict=True):
            if next(self._usable((gateway,)), None):
                self.routes((gateway,), "eth0")
                self._neighbour("eth0", gateway, _mac(plan.HOSTS[pod.node], pod))
                self.link.route("add", dst=everywhere, oif=self.index("eth0"), gateway=gateway)

    def _neighbour(self, interface: str, address: str, mac: str) -> None:
        self.link.neigh("add", dst=address, lladdr=mac, ifindex=self.index(interface), state="permanent")

    def _usable(self, addresses: Iterable[str]) -> Iterator[str]:
        return (address for address in addresses if self._ipv6 or ":" not in address)


def _mac(owner: Host, far: Host) -> str:
    """The hardware address of one end of the link to `far`: a local one, the same in every world."""
    names = list(plan.HOSTS)
    return f"02:5c:00:00:{int(owner is far):02x}:{names.index(far.name):02x}"


def _end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold back SIGINT and SIGTERM until the block is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
