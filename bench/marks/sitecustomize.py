# ruff: noqa: INP001  # found by its name on the path, not imported from a package
"""In an agent that is measured: note when it hands something to netfilter.

Python imports a module of this name at its start, when it finds one (`bench.agent` sees to that); the agent itself is
not changed.  What was noted is read by another process through a file that both have mapped.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import sys
import time

_NETLINK_NETFILTER = 12


def _install(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    marks = mmap.mmap(descriptor, 8)
    os.close(descriptor)

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "socket.sendto":
            sender = arguments[0]
            if isinstance(sender, socket.socket) and sender.proto == _NETLINK_NETFILTER:
                struct.pack_into("=d", marks, 0, time.monotonic())

    sys.addaudithook(note)


if "SLUICE_BENCH_MARKS" in os.environ:
    _install(os.environ.pop("SLUICE_BENCH_MARKS"))
