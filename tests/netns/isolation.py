"""A network namespace for one test: the test's own thread, and the programs that it starts, are in it."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000


@contextlib.contextmanager
def own_network_namespace() -> Iterator[None]:
    """Be in a new network namespace; it ends with the block, however that ends."""
    library = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments: int) -> None:
        if getattr(library, function)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        call("unshare", _CLONE_NEWNET)
        try:
            yield
        finally:
            call("setns", before, _CLONE_NEWNET)
    finally:
        os.close(before)
