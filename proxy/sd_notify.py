"""What the agent tells its supervisor: ready, reloading, stopping, and that its event loop still turns.

The protocol is systemd's: lines `NAME=value` in one datagram to the Unix socket that NOTIFY_SOCKET names; see
sd_notify(3).  Without the variable nothing is told.  A supervisor that does not listen is no trouble of the node: what
cannot be sent is lost in silence.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Mapping


class Supervisor:
    """Who started this process, if that is somebody who wants to be told."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """By NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID of an environment."""
        name = environment.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the zero byte of an abstract name, which no environment can hold.
        self._address = "\0" + name[1:] if name.startswith("@") else name
        self._ready = False
        self._reloading = False
        self.watchdog: float | None = None
        """Seconds without a sign of life after which the process is killed; None: nobody watches."""
        if environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            microseconds = environment.get("WATCHDOG_USEC", "")
            if microseconds.isascii() and microseconds.isdigit() and int(microseconds):
                self.watchdog = int(microseconds) / 1e6

    def ready(self) -> None:
        """The first sync is done; what is told after the first time changes nothing."""
        if not self._ready:
            self._ready = True
            self._tell("READY=1", "STATUS=serving")

    def reloading(self) -> None:
        """The configuration is about to be read again; before `ready` that is part of the start."""
        if self._ready:
            self._reloading = True
            self._tell("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def reloaded(self) -> None:
        """What `reloading` announced is over, however it went."""
        if self._reloading:
            self._reloading = False
            self._tell("READY=1")

    def stopping(self) -> None:
        """The process is about to end."""
        self._tell("STOPPING=1", "STATUS=ending, the rules stay")

    async def run(self) -> None:
        """Give a sign of life at twice the rate that is asked for, until cancelled."""
        self._tell("STATUS=waiting for the first sync")
        if not self._address or self.watchdog is None:
            return
        while True:
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog / 2)

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(
                socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            ) as sender:
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return
