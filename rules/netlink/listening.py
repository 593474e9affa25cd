"""A socket on which netfilter tells of things as they happen, for whom they are told to by nobody else.

Nothing that it hears is kept by the kernel when it is closed, by whatever end of its process.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Iterator, Sequence

from rules.netlink.attributes import ERROR, messages
from rules.netlink.closing import Closing
from rules.netlink.errors import raise_refusal
from rules.netlink.filters import Instruction, attach

_NETLINK_NETFILTER = 12
_SOL_NETLINK, _ADD_MEMBERSHIP = 270, 1
_SO_RCVBUFFORCE = 33
_RECEIVE = 1 << 16
_SMALLEST = 512
"""Bytes of room that the shortest datagram takes, at the least; the kernel gives twice the room that is asked for."""
_ANSWER_SECONDS = 5

AT_ONCE = 1000
"""Datagrams that are read in one go: a flood leaves the rest for the next, so that others have their turn."""


class Listening(Closing):
    """A netfilter socket in the network namespace of the calling thread, which is never waited for in reading.

    Raises:
        OSError: the kernel refuses it; EPERM without CAP_NET_ADMIN.
    """

    def __init__(self, room: int, group: int = 0, program: Sequence[Instruction] = ()) -> None:
        """Listen from now on.

        Args:
            room: bytes for what waits, if it may have them; else the usual room has to do.
            group: the multicast group that it is a member of; 0: none.
            program: a filter that lets through what is to be heard; none: everything.
        """
        self._most = 2 * room // _SMALLEST
        self.lost = 0
        """How often more came than there was room for."""
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER
        )
        try:
            if program:
                attach(self._socket, program)  # before it is a member: nothing comes past it
            with contextlib.suppress(PermissionError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, room)
            self._socket.bind((0, 0))
            if group:
                self._socket.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """The socket's, to be waited for."""
        return self._socket.fileno()

    def datagrams(self, most: int = AT_ONCE) -> Iterator[bytes]:
        """What waits, at most so many datagrams; an empty one stands where some were lost.

        Raises:
            OSError: the socket cannot be read.
        """
        for _ in range(most):
            try:
                yield self._socket.recv(_RECEIVE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost += 1
                yield b""

    def waiting(self) -> Iterator[bytes]:
        """All that waits now, as `datagrams`: no more than there is room for, however fast more comes.

        Raises:
            OSError: the socket cannot be read.
        """
        return self.datagrams(self._most)

    def ask(self, message: bytes) -> None:
        """Have a request carried out that asks to be acknowledged; what is told before that is not kept.

        Raises:
            OSError: the kernel refused, or did not answer.
            DecodeError: what came is no netlink message.
        """
        self._socket.send(message)
        while select.select([self._socket], [], [], _ANSWER_SECONDS)[0]:
            for answer in messages(self._socket.recv(_RECEIVE)):
                if answer.kind == ERROR:
                    raise_refusal(answer)
                    return
        raise OSError(errno.ETIMEDOUT, "the kernel did not answer")
