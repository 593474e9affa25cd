"""What the agent sets on its node besides rules: connection tracking, sysctls, how readily it is killed for memory.

It needs more than NET_ADMIN, so it can be done beforehand by `--init-only` (CFG-53); the agent then finds everything
as it should be and writes nothing.  What cannot be set is told, and is no reason to end: the node's rules work
without, where kube-proxy refuses to start (CT-8, IPT-30).
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from proxy.config.settings import PRIMARY, ConntrackLimits, Settings
from proxy.logs import get_logger
from proxy.modes import supported_families
from proxy.node import covers_loopback, node_ips
from proxy.sysctls import ROUTE_LOCALNET, Setting, ensure_all, sysctl
from rules.dataplane import UnavailableError
from rules.forwarding import Family

_log = get_logger("sluice.agent")

MOST_FLOWS = 1 << 20
"""The most flows that a number of cores asks for (CT-8)."""
FLOWS_PER_BUCKET = 4

_NETFILTER = "net/netfilter/nf_conntrack_"
_HASHSIZE = Path("/sys/module/nf_conntrack/parameters/hashsize")
_OOM_SCORE = Path("/proc/self/oom_score_adj")

_CT_GET_STATS_CPU = 1 << 8 | 4
_NETLINK_NETFILTER = 12
_REQUEST_DUMP = 0x301


def set_up(settings: Settings, mode: str = "") -> list[str]:
    """Do everything that takes privileges, where it isn't done yet; what could not be done, a line for each reason.

    `mode` is the dataplane that was chosen; empty: the configured one.
    """
    conntrack = list(conntrack_settings(settings.conntrack, cores()))
    if conntrack and not conntrack[0].path.exists():
        _load_conntrack()
    complaints = ensure_all(
        [*conntrack, *_sysctls(settings, mode or settings.mode), Setting(_OOM_SCORE, settings.oom_score_adj)]
    )
    most = flows(settings.conntrack, cores())
    # The hash table is the machine's: an agent whose network namespace may not say how many flows there are leaves it.
    if most and not any(conntrack[0].name in each for each in complaints):
        complaints += ensure_all([Setting(_HASHSIZE, most // FLOWS_PER_BUCKET, at_least=True)])
    return complaints


def set_up_or_tell(settings: Settings, mode: str = "") -> None:
    """`set_up`; what could not be done goes to the log, in one line."""
    if complaints := set_up(settings, mode):
        _log.warning(
            "the node is not set up as configured",
            reason="; ".join(complaints),
            do="run it once with all privileges and --init-only, or configure what the node has; rules work without",
        )


def concerns(settings: Settings) -> tuple[object, ...]:
    """Of a configuration what `set_up` goes by: another one with the same needs nothing done again."""
    return (
        settings.mode,
        settings.ipvs.strict_arp,
        settings.conntrack,
        settings.oom_score_adj,
        needs_route_localnet(settings),
    )


# --- connection tracking ----------------------------------------------------------------------------------------


def flows(limits: ConntrackLimits, cores: int) -> int:
    """How many flows the node is to track; 0: as many as it does."""
    if limits.max_per_core <= 0:
        return 0
    asked = limits.max_per_core * cores
    return MOST_FLOWS if asked > MOST_FLOWS else max(asked, limits.minimum)


def conntrack_settings(limits: ConntrackLimits, cores: int) -> Iterator[Setting]:
    """The sysctls of connection tracking that are asked for."""
    values = {
        "max": flows(limits, cores),
        "tcp_timeout_established": int(limits.tcp_established_timeout),
        "tcp_timeout_close_wait": int(limits.tcp_close_wait_timeout),
        "tcp_be_liberal": int(limits.tcp_be_liberal),
        "udp_timeout": int(limits.udp_timeout),
        "udp_timeout_stream": int(limits.udp_stream_timeout),
    }
    for name, value in values.items():
        if value > 0:
            yield sysctl(_NETFILTER + name, value)


def cores(devices: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many CPUs the node has, however few of them this process may use (CT-9)."""
    try:
        cpus = [each for each in devices.iterdir() if re.fullmatch(r"cpu\d+", each.name)]
        found = sum((each / "topology").exists() for each in cpus)
    except OSError:
        found = 0
    return found or len(os.sched_getaffinity(0))


def _load_conntrack() -> None:
    """Have the kernel load connection tracking, as asking it anything about that does."""
    request = struct.pack("=IHHIIBBH", 20, _CT_GET_STATS_CPU, _REQUEST_DUMP, 1, 0, socket.AF_UNSPEC, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as netlink:
            netlink.send(request)
            netlink.recv(1 << 16)
    except OSError:
        return  # what is missing then is told when it is to be set


# --- the rest ---------------------------------------------------------------------------------------------------


def _sysctls(settings: Settings, mode: str) -> Iterator[Setting]:
    """What the mode needs."""
    if needs_route_localnet(settings):
        yield sysctl(ROUTE_LOCALNET, 1)
    if settings.traffic_counters:
        yield sysctl(_NETFILTER + "acct", 1)
    if mode == "ipvs":
        from rules.ipvs import node  # noqa: PLC0415  # one dataplane of several is loaded

        _load_ipvs()
        wanted = node.sysctls(strict_arp=settings.ipvs.strict_arp, release=os.uname().release)
        yield from (sysctl(name, value) for name, value in wanted.items())


def _load_ipvs() -> None:
    """Have the kernel load IPVS, as asking it anything about that does."""
    from rules.ipvs.services import Ipvs  # noqa: PLC0415  # as above

    with contextlib.suppress(UnavailableError):  # what is missing then is told when it is to be set
        Ipvs().close()


def needs_route_localnet(settings: Settings) -> bool:
    """Whether node ports are to answer on 127.0.0.0/8, as in iptables mode alone (IPT-30, TRF-21)."""
    addresses = settings.node_port_addresses
    return (
        settings.behaviour == "iptables"
        and settings.localhost_node_ports
        and PRIMARY not in addresses
        and covers_loopback(addresses, node_ips(None))
        and Family.IPV4 in supported_families()
    )
