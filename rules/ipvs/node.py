"""What mode ipvs asks of the node beside its rules: settings of the kernel, and a scheduler that works (IPVS-1, 3)."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping

from rules.dataplane import UnavailableError
from rules.forwarding import Family, Protocol
from rules.ipvs.messages import Key, VirtualServer, add_server, delete_server
from rules.ipvs.services import Ipvs

_PROBED = {
    Family.IPV4: bytes((198, 51, 100, 0)),
    Family.IPV6: bytes((0x20, 0x01, 0x0D, 0xB8)) + bytes(12),
}
"""Of documentation's addresses, which nobody uses."""
_PROBED_PORT = 20000
_NO_SCHEDULER = "none"
"""What the kernel takes for a wish to have none, and calls a server without one: it would answer nobody."""

_SYSCTLS = {
    "net/ipv4/vs/conntrack": 1,
    "net/ipv4/vs/expire_nodest_conn": 1,
    "net/ipv4/vs/expire_quiescent_template": 1,
    "net/ipv4/ip_forward": 1,
}
_STRICT_ARP = {"net/ipv4/conf/all/arp_ignore": 1, "net/ipv4/conf/all/arp_announce": 2}
_NO_REUSE = {"net/ipv4/vs/conn_reuse_mode": 0}
_REUSE_DELAYS = (4, 1), (5, 9)
"""Kernels from the first to before the second delay a client by a second that uses a source port again."""


def check_scheduler(ipvs: Ipvs, scheduler: str, family: Family = Family.IPV4) -> None:
    """Ask the kernel whether it has a scheduler: make and remove a virtual server, unless one uses it (IPVS-1).

    Raises:
        UnavailableError: the kernel doesn't have it; the message names it.
        DataplaneError: as of `Ipvs.servers` and `Ipvs.send`.
    """
    if scheduler == _NO_SCHEDULER:
        raise UnavailableError(f"this kernel has no IPVS scheduler {scheduler}: name another")
    servers = ipvs.servers()
    if any(server.scheduler == scheduler for server in servers):
        return
    probe = VirtualServer(Key(family, Protocol.TCP, _PROBED[family], _PROBED_PORT), scheduler)
    refused = ipvs.send([add_server(probe)])
    if refused and refused[0].errno == errno.ENOENT:
        raise UnavailableError(f"this kernel has no IPVS scheduler {scheduler}: load ip_vs_{scheduler} or name another")
    if refused and refused[0].errno != errno.EEXIST:
        raise UnavailableError(f"IPVS refuses a virtual server with scheduler {scheduler}: {refused[0].reason}")
    made = probe in ipvs.servers()
    if not refused:
        ipvs.send([delete_server(probe.key)])
    if not made and not refused:
        raise UnavailableError("IPVS accepts a virtual server but does not show it: this kernel's IPVS cannot be used")


def sysctls(*, strict_arp: bool, release: str) -> Mapping[str, int]:
    """Settings that the mode needs, by their path under /proc/sys, for a kernel release (`6.1.0-56-amd64`)."""
    found = re.match(r"(\d+)\.(\d+)", release)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    first, after = _REUSE_DELAYS
    return {
        **_SYSCTLS,
        **(_NO_REUSE if first <= version < after else {}),
        **(_STRICT_ARP if strict_arp else {}),
    }
