"""A listening socket that more comes to than is read; what the kernel really tells is in tests/netns."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator

from rules.netlink.listening import AT_ONCE, Listening


class Endless:
    """A socket that always has something more, and has lost some between."""

    def __init__(self) -> None:
        self._answers: Iterator[bytes | None] = itertools.cycle([b"one", b"two", None])

    def recv(self, _most: int) -> bytes:
        answer = next(self._answers)
        if answer is None:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        return answer

    def close(self) -> None: ...


def test_reading_all_that_waits_ends_however_fast_more_comes(monkeypatch):
    with Listening(1 << 16) as listening:
        own = listening._socket
        monkeypatch.setattr(listening, "_socket", Endless())
        assert len(list(listening.datagrams())) == AT_ONCE
        read = list(listening.waiting())
        own.close()
    assert len(read) == 2 * (1 << 16) // 512
    assert read[:2] == [b"two", b""]
    assert listening.lost == (AT_ONCE + len(read)) // 3
