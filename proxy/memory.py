"""Memory at the start of an agent: no collections while the first objects come in, and what is left over given back.

Until the first sync everything that is made is kept, so that collecting garbage finds none; with 10,000 Services that
alone is a third of the CPU time of a start.  Afterwards what is kept is frozen: later collections pass over it, which
would hold up the event loop for a tenth of a second each.  What is not kept are the bytes that the objects were read
from; they lie between them, and the C library returns them to the system only when it is told to (50 MB of 160).
"""

from __future__ import annotations

import ctypes
import gc

LONGEST = 60.0
"""Seconds without collections: an agent that waits for its server makes garbage too."""


def expect_much() -> None:
    """Let garbage be, until `settle` or `give_up`."""
    gc.disable()


def settle() -> None:
    """What there is stays, and what comes from now on may become garbage.  It takes some 30 ms."""
    gc.freeze()  # before anything is collected: it would look at all that there is
    gc.enable()
    trim()


def give_up() -> None:
    """Collect garbage from now on, though nothing has settled."""
    gc.enable()


def trim() -> None:
    """Give free memory back to the system, where the C library knows how (glibc)."""
    release = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if release is not None:
        release(0)
