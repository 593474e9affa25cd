"""What the kernel says of nftables: when a transaction was applied, and what is there then.

The kernel multicasts a message at the end of every transaction, before the sender's call returns.  A socket that
listens to nothing else sees it some ten microseconds later, whoever the sender was.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
import time
from collections.abc import Mapping

from bench.cluster import CLUSTER_IPS, NODE_ADDRESS, PODS
from rules.forwarding import Backend, Family
from rules.netlink.errors import NetlinkError
from rules.netlink.transaction import NetfilterSocket
from rules.nftables import names
from rules.nftables.dataplane import NftablesDataplane
from rules.nftables.state import read_elements

_CLONE_NEWNET = 0x40000000
_NETLINK_NETFILTER = 12
_GROUP_NFTABLES = 7
_NEW_GENERATION = 10 << 8 | 15
_SO_ATTACH_FILTER = 26
_SO_RCVBUFFORCE = 33
_TYPE_OFFSET = 4
_LOAD_HALF, _JUMP_EQUAL, _RETURN = 0x28, 0x15, 0x06
_INSTRUCTION = struct.Struct("=HBBI")


def enter_own_namespace() -> None:
    """Put this process, which has one thread yet, and all that it starts into a new network namespace.

    In it, every address of a pod is the namespace's own, so that one listener is all endpoints of all Services.

    Raises:
        OSError: the process may not.
    """
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), f"no network namespace: {os.strerror(ctypes.get_errno())}")
    for command in (
        "link set lo up",
        f"address add {NODE_ADDRESS}/32 dev lo",
        f"route add local {PODS} dev lo src {NODE_ADDRESS}",
        f"route add {CLUSTER_IPS} dev lo src {NODE_ADDRESS}",
    ):
        subprocess.run(["ip", *command.split()], check=True)  # noqa: S603, S607  # ours, and wherever ip is


class Listener:
    """Sees every transaction of nftables in this network namespace."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        wanted = int.from_bytes(struct.pack("=H", _NEW_GENERATION))
        program = [(_LOAD_HALF, 0, 0, _TYPE_OFFSET), (_JUMP_EQUAL, 0, 1, wanted), (_RETURN, 0, 0, 0xFFFFFFFF)]
        code = b"".join(_INSTRUCTION.pack(*each) for each in [*program, (_RETURN, 0, 0, 0)])
        buffer = ctypes.create_string_buffer(code, len(code))
        header = struct.pack("HP", len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, header)
        self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 1 << 20)
        self._socket.bind((0, 1 << _GROUP_NFTABLES - 1))

    def wait(self, seconds: float) -> float | None:
        """When the next transaction was applied (monotonic seconds); None: there was none for so long."""
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(4096)
        except TimeoutError:
            return None
        return time.monotonic()

    def drain(self, quiet: float = 0.0) -> float | None:
        """Pass over transactions until there was none for `quiet` seconds; when the last one was applied."""
        last = None
        while (seen := self.wait(quiet or 1e-4)) is not None:
            last = seen
        return last

    def close(self) -> None:
        self._socket.close()


def cluster_ips() -> int:
    """How many ClusterIPs the kernel's table has; 0 until both families have a table."""
    with NetfilterSocket() as netlink:
        try:
            counts = [len(read_elements(netlink, family, names.CLUSTER_IPS)) for family in Family]
        except NetlinkError as error:
            if error.errno != errno.ENOENT:
                raise
            return 0
    return counts[0]


def services() -> Mapping[str, frozenset[Backend]]:
    """What the kernel's table does: backends by the Services' names.

    Raises:
        AssertionError: it is damaged.
    """
    dataplane = NftablesDataplane(Family.IPV4)
    try:
        table = dataplane.read()
    finally:
        dataplane.close()
    assert table is not None, "there is no table"
    assert not table.damage, f"the table is damaged: {sorted(table.damage)[:3]}"
    return {route.label.partition(":")[0]: route.backends for route in table.routes.values()}


def remove_tables() -> None:
    """Remove the agent's tables."""
    for family in Family:
        dataplane = NftablesDataplane(family)
        try:
            dataplane.cleanup()
        finally:
            dataplane.close()
