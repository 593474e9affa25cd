"""One agent per network namespace (DESIGN 4.11).

The lock is a listening abstract Unix socket: such names belong to a network namespace, and the kernel frees them when
their process dies, however it dies.
"""

from __future__ import annotations

import errno
import socket

from proxy.peers import is_ours, peer

_NAME = "\0sluice-agent"


class HeldError(Exception):
    """Another agent runs in this network namespace; the message says which process it is."""


class Lock:
    """The lock, held until `release` or until the process ends."""

    def __init__(self) -> None:
        """Take the lock.

        Raises:
            HeldError: another process holds it.
        """
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.bind(_NAME)
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            if error.errno != errno.EADDRINUSE:
                raise
            raise HeldError(_holder()) from None

    def release(self) -> None:
        """Give the lock back."""
        self._socket.close()


def _holder() -> str:
    """Who holds the lock, in a sentence: anybody may take such a name."""
    agent = "another sluice runs in this network namespace"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(_NAME)
            pid, user = peer(client)
        except OSError:
            return f"{agent} (process unknown)"
    if not is_ours(user):
        return (
            f"process {pid} of user {user}, which is no agent, holds the abstract Unix socket @{_NAME[1:]}, which the"
            " agent of a network namespace listens on: end it"
        )
    return f"{agent} (process {pid or 'in another container'})"  # whose processes have no numbers here
