"""Watching over the workers and their routes, in a thread of the agent.

* A worker that ends is replaced at once, and the new one is given what the others hold: nobody waits for a sync, and
  the policy for drift has no say, as nobody has changed anything.
* Routes and addresses of the node are told by rtnetlink.  Where they are others than after the last write, the agent is
  told to look: an address that came wants its node ports, a route that somebody deleted comes back.
* Listeners are looked at now and then: somebody may have closed one (`ss -K`), which nobody tells.
* Every few seconds the workers are asked what has passed them, and addresses that flows of a Service that is gone
  still use are looked at.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Protocol

from proxy.logs import get_logger
from proxy.userspace.anyip import GROUPS
from proxy.userspace.supervisor import Changed
from rules.dataplane import DataplaneError, Touch
from rules.forwarding import Family

_log = get_logger("sluice.userspace")

SETTLE = 0.1
"""Seconds in which a burst of changes is one change."""
LOOK = 1.0
"""Seconds from one look at the routes to the next, however many changes others make."""
TIDY = 2.0
"""Seconds between two looks at addresses that linger, at what workers have counted, and at whether all are there."""

LISTENERS = 30.0
"""Seconds between two looks at all listeners, of which nobody tells when somebody closes one."""
SHARE = 0.01
"""Of a processor may go into looks that nobody asked for: with very many Services they come less often."""


class Watched(Protocol):
    """A dataplane over workers."""

    @property
    def family(self) -> Family: ...

    def attend(self) -> Changed:
        """Replace workers that are gone.  Raises DataplaneError."""

    def tidy(self) -> None:
        """Take away what lingers.  Raises DataplaneError."""

    def count(self) -> None:
        """Ask the workers what has passed them.  Raises DataplaneError."""

    def deaf(self) -> bool:
        """Whether a listener is gone."""

    def disturbed(self) -> bool:
        """Whether routes or addresses are others than after the last write."""

    def worker_pids(self) -> dict[int, int]:
        """The workers' processes."""


class Watch:
    """Becomes readable when the agent should look; `touched` says at which family."""

    def __init__(self, watched: Sequence[Watched], *, tidy: float = TIDY, listeners: float = LISTENERS) -> None:
        """Of the dataplanes of a network namespace, which is the calling thread's.

        Raises:
            OSError: rtnetlink cannot be listened to, or there are no more descriptors.
        """
        self._watched = watched
        self._tidy = tidy
        self._listeners = listeners
        self._listened = time.monotonic()
        self._lock = threading.Lock()
        self._touched: set[Family] = set()
        self._complaints: dict[Family, str] = {}
        """Why workers could not be looked after, until they could."""
        self._pids: dict[int, int] = {}
        """Of workers that are watched, a pidfd by process."""
        self._netlink = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        groups = 0
        for each in watched:
            groups |= GROUPS[each.family]
        self._netlink.bind((0, groups))
        self._reader = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="userspace watch", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """The descriptor, for an event loop."""
        return self._reader

    def touched(self) -> frozenset[Touch]:
        """The families whose routes or addresses were changed since the last call; the kernel doesn't tell by whom."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._reader)
        with self._lock:
            touched, self._touched = self._touched, set()
        return frozenset(Touch(family, None) for family in touched)

    def close(self) -> None:
        """End the thread; workers and routes stay."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        for descriptor in (*self._pids.values(), self._reader, self._stop):
            os.close(descriptor)
        self._netlink.close()

    def _run(self) -> None:
        due = time.monotonic() + self._tidy
        looked = 0.0
        changed = False
        while True:
            now = time.monotonic()
            self._follow()
            wait = max(0.0, min(due - now, looked + LOOK - now if changed else due - now))
            ready = self._poll(wait)
            if self._stop in ready:
                return
            if self._netlink.fileno() in ready:
                self._drain()
                changed = True
            now = time.monotonic()
            if ready - {self._netlink.fileno()} or now >= due:
                self._attend()
            if now >= due:
                before = time.thread_time()
                self._look_after()
                due = time.monotonic() + max(self._tidy, (time.thread_time() - before) / SHARE)
            if changed and now >= looked + LOOK:
                changed, looked = False, now
                self._look()

    def _follow(self) -> None:
        """Hear of the end of every worker that there is now."""
        wanted = {pid for each in self._watched for pid in each.worker_pids().values() if pid > 0}
        for pid in self._pids.keys() - wanted:
            os.close(self._pids.pop(pid))
        for pid in wanted - self._pids.keys():
            with contextlib.suppress(OSError):  # it has ended: the next round finds it missing
                self._pids[pid] = os.pidfd_open(pid)

    def _poll(self, wait: float) -> set[int]:
        poll = select.poll()
        for descriptor in (self._stop, self._netlink.fileno(), *self._pids.values()):
            poll.register(descriptor, select.POLLIN)
        return {descriptor for descriptor, _ in poll.poll(wait * 1000)}

    def _drain(self) -> None:
        """Take what rtnetlink has told, until it is silent for a moment."""
        deadline = time.monotonic() + SETTLE
        while time.monotonic() < deadline:
            try:
                self._netlink.recv(1 << 16)
            except BlockingIOError:
                time.sleep(SETTLE / 4)
            except OSError:  # ENOBUFS: more was told than fits
                continue

    def _attend(self) -> None:
        for each in self._watched:
            try:
                changed = each.attend()
            except DataplaneError as error:
                _log.error("workers cannot be replaced", family=each.family.label, reason=str(error))
                self._touch(each.family)
                time.sleep(SETTLE)
                continue
            if changed.lost or changed.started:
                _log.warning(
                    "a worker died: its flows are lost, and it is replaced",
                    family=each.family.label,
                    lost=changed.lost,
                    started=changed.started,
                )

    def _look_after(self) -> None:
        if time.monotonic() >= self._listened + self._listeners:
            for each in self._watched:
                if each.deaf():
                    self._touch(each.family)
            self._listened = time.monotonic()
        for each in self._watched:
            try:
                each.tidy()
                each.count()
            except DataplaneError as error:
                if str(error) != self._complaints.get(each.family):
                    _log.warning("workers cannot be looked after", family=each.family.label, reason=str(error))
                self._complaints[each.family] = str(error)
            else:
                self._complaints.pop(each.family, None)

    def _look(self) -> None:
        for each in self._watched:
            if each.disturbed():
                self._touch(each.family)

    def _touch(self, family: Family) -> None:
        with self._lock:
            self._touched.add(family)
        os.eventfd_write(self._reader, 1)
