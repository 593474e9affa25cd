"""Network namespaces with names that say whose they are, and work done inside them.

A namespace is kept by a bind mount in /run/netns, as `ip netns` does, so that a person can look inside with
`ip netns exec`.  Its name is PREFIX-PID-HOST: whoever makes new ones removes those of processes that are gone.

Entering a namespace concerns one thread only, so everything that is done inside is done by a thread of its own: the
caller's sockets stay where they were.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

RUN = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MNT_DETACH = 2

T = TypeVar("T")


class NamespaceError(OSError):
    """A namespace could not be made or entered."""


def _libc(function: str, *arguments: object) -> None:
    """Call a function of the C library that returns 0, or raise its errno."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*arguments) != 0:
        number = ctypes.get_errno()
        raise NamespaceError(number, f"{function}: {os.strerror(number)}")


def _in_thread(function: Callable[[], T]) -> T:
    """The result of `function`, called in a new thread; what it raises is raised here."""
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(function())
        except BaseException as error:  # noqa: BLE001  # raised again in the calling thread
            errors.append(error)

    thread = threading.Thread(target=work, name="namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class Namespace:
    """A named network namespace that exists."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = RUN / name

    def inside(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises when a thread inside the namespace calls it.

        Sockets that it opens belong to the namespace and may be used outside.
        """

        def enter() -> T:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _libc("setns", descriptor, _CLONE_NEWNET)
            finally:
                os.close(descriptor)
            return function()

        return _in_thread(enter)

    def remove(self) -> None:
        """Take the name away; the kernel ends the namespace with the last process and socket in it."""
        with contextlib.suppress(NamespaceError):
            _libc("umount2", bytes(self.path), _MNT_DETACH)
        self.path.unlink(missing_ok=True)


def create(name: str) -> Namespace:
    """A new and empty namespace.

    Raises:
        OSError: the name is taken, or the process may not.
    """
    RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
    namespace = Namespace(name)
    namespace.path.touch(mode=0o444, exist_ok=False)

    def unshare() -> None:
        _libc("unshare", _CLONE_NEWNET)
        _libc("mount", b"/proc/thread-self/ns/net", bytes(namespace.path), b"none", _MS_BIND, None)

    try:
        _in_thread(unshare)
    except BaseException:
        namespace.remove()
        raise
    return namespace


def remove_stale(prefix: str) -> None:
    """Remove the namespaces with `prefix` whose makers are gone, or had this process's number."""
    pattern = re.compile(re.escape(prefix) + r"-(\d+)-")
    with contextlib.suppress(FileNotFoundError):
        for path in RUN.iterdir():
            match = pattern.match(path.name)
            if match and (int(match[1]) == os.getpid() or not Path("/proc", match[1]).exists()):
                Namespace(path.name).remove()


def obstacle() -> str | None:
    """Why no namespace can be made here, or None when one can."""
    if os.geteuid() != 0:
        return "root is needed to make network namespaces"
    try:
        _in_thread(lambda: _libc("unshare", _CLONE_NEWNET))
    except NamespaceError as error:
        return f"network namespaces cannot be made here ({error.strerror})"
    return None
