"""Noticing that another process touched our rules: flushed them, as firewalld's reload does, or edited them.

iptables tells nobody of changes.  So a thread asks the kernel once a second for something small that a change alters,
and compares it with what it was after our last write:

* legacy: how many entries each table has, and how large it is.  Anybody's rules count, so that a change of theirs has
  ours read once more, and nothing written.
* nft: how many rules and jumps each chain of ours has, where the generation says that anything changed at all.

A rule exchanged for another one of its size stays unnoticed until the next read.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

from rules.dataplane import DataplaneError, Touch
from rules.forwarding import Family
from rules.iptables.programs import Backend
from rules.iptables.text import PREFIX, TABLES
from rules.netlink.transaction import NetfilterSocket, attributes_of, netfilter_message

PERIOD = 1.0
"""Seconds between two looks."""

_GET_INFO = 64
_INFO_SIZE = 84
"""Of struct ipt_getinfo: a name of 32 bytes, hooks, 5 entries, 5 underflows, the number of entries, the size."""
_NAME_SIZE = 32
_GET_CHAIN = 4


class Signature(Protocol):
    """Tells something small of the kernel's rules, which a change alters."""

    def take(self) -> Hashable:
        """What it is now.  Raises OSError or DataplaneError."""

    def close(self) -> None: ...


def signature(family: Family, backend: Backend, tables: Sequence[str] = TABLES) -> Signature:
    """Of the rules that the programs of a kind write into some tables, in the network namespace of the thread.

    Raises:
        OSError: the kernel refuses the socket.
    """
    return _Legacy(family, tables) if backend == "legacy" else _Nft(family)


class _Legacy:
    def __init__(self, family: Family, tables: Sequence[str]) -> None:
        self._tables = tables
        self._socket = socket.socket(family.af, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW)
        self._level = socket.IPPROTO_IP if family is Family.IPV4 else socket.IPPROTO_IPV6
        self._library = ctypes.CDLL(None, use_errno=True)

    def take(self) -> Hashable:
        return tuple(self._info(table) for table in self._tables)

    def _info(self, table: str) -> bytes:
        """What the kernel says of a table; empty if there is none."""
        buffer = ctypes.create_string_buffer(table.encode(), _INFO_SIZE)
        size = ctypes.c_uint32(_INFO_SIZE)
        done = self._library.getsockopt(self._socket.fileno(), self._level, _GET_INFO, buffer, ctypes.byref(size))
        return buffer.raw[_NAME_SIZE:] if done == 0 else b""

    def close(self) -> None:
        self._socket.close()


class _Nft:
    def __init__(self, family: Family) -> None:
        self._socket = NetfilterSocket()
        self._family = family
        self._last: tuple[int, Hashable] | None = None

    def take(self) -> Hashable:
        generation = self._socket.generation()
        if self._last is None or self._last[0] != generation:
            ours = PREFIX.encode()
            chains = self._socket.dump(netfilter_message(_GET_CHAIN, 0, self._family.af, b""))
            self._last = generation, hash(tuple(attributes_of(each) for each in chains if ours in each))
        return self._last[1]

    def close(self) -> None:
        self._socket.close()


class OwnWrites:
    """Tells what others write from what we do, by a signature: what it was after our last write, and is now."""

    def __init__(self, open_signature: Callable[[], Signature]) -> None:
        """By a signature that is opened when somebody asks for the first time, as of many a dataplane nobody does."""
        self._open = open_signature
        self._busy = threading.Lock()
        self._signature: Signature | None = None
        self._closed = False
        self._undisturbed: Hashable = None
        """What the signature was after the last write; None: it isn't known."""

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """While nobody looks: where looking takes the sockets that are at work."""
        with self._busy:
            yield

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """While we write: nobody takes that for another process, and from then on it is what is expected."""
        with self.unwatched():
            self._undisturbed = None
            yield
            if self._signature is not None:
                with contextlib.suppress(OSError, DataplaneError):
                    self._undisturbed = self._signature.take()

    def disturbed(self) -> bool:
        """Whether the signature is another than after our last write, or the last call; not so while we are at work."""
        if not self._busy.acquire(blocking=False):
            return False
        try:
            if self._closed:
                return False
            if self._signature is None:
                self._signature = self._open()
            now = self._signature.take()
        except (OSError, ValueError, DataplaneError):
            return False
        else:
            before, self._undisturbed = self._undisturbed, now
            return before is not None and before != now
        finally:
            self._busy.release()

    def close(self) -> None:
        """Give back the signature; nothing disturbs any more."""
        with self._busy:
            self._closed = True
            if self._signature is not None:
                self._signature.close()
                self._signature = None


class Watched(Protocol):
    """A dataplane that can tell whether others changed its rules."""

    @property
    def family(self) -> Family: ...

    def disturbed(self) -> bool:
        """Whether the rules are others than after the last write, or the last call."""


class Watch:
    """Becomes readable when another process may have changed our rules."""

    def __init__(self, watched: Sequence[Watched], *, period: float = PERIOD) -> None:
        """Of dataplanes, at which a thread looks every `period` seconds until `close`.

        Raises:
            OSError: there are no more descriptors.
        """
        self._watched = watched
        self._period = period
        self._reader = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._touched: set[Family] = set()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        for each in watched:
            each.disturbed()  # from now on it knows what its own writes lead to
        self._thread = threading.Thread(target=self._look, name="iptables watch", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """The descriptor, for an event loop."""
        return self._reader

    def touched(self) -> frozenset[Touch]:
        """In which families rules may have been changed since the last call; by whom, iptables never tells."""
        try:
            os.eventfd_read(self._reader)
        except BlockingIOError:
            return frozenset()
        with self._lock:
            touched, self._touched = self._touched, set()
        return frozenset(Touch(family, None) for family in touched)

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()
        os.close(self._reader)

    def _look(self) -> None:
        while not self._ended.wait(self._period):
            for each in self._watched:
                if each.disturbed():
                    with self._lock:
                        self._touched.add(each.family)
                    os.eventfd_write(self._reader, 1)
