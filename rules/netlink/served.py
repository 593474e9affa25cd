"""Whether the kernel has what a socket was opened for: the first requests on it show that."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from rules.dataplane import UnavailableError
from rules.netlink.attributes import DecodeError
from rules.netlink.closing import Closing


@contextlib.contextmanager
def closed_unless_served(opened: Closing, *, denied: str, absent: Callable[[Exception], str]) -> Iterator[None]:
    """For the first requests on a socket: close it if they fail.

    Args:
        opened: the socket.
        denied: what is said where we lack a capability (EPERM).
        absent: what is said of any other failure.

    Raises:
        UnavailableError: the kernel refused a request, or its answer made no sense.
    """
    with contextlib.ExitStack() as stack:
        stack.callback(opened.close)
        try:
            yield
        except (OSError, DecodeError) as error:
            lacking = isinstance(error, OSError) and error.errno == errno.EPERM
            raise UnavailableError(denied if lacking else absent(error)) from None
        stack.pop_all()
