"""The kernel's IPVS over generic netlink: what is there, and changes in batches.

    with Ipvs() as ipvs:
        held = ipvs.dump(Family.IPV4)
        refused = ipvs.send([add_server(server), add_real(key, target)])

A batch is no transaction: every message stands for itself, in order.

The real servers of every virtual server are a dump of their own, some 50 us each.  /proc/net/ip_vs has all of them in
one file and cannot be used: it leaves servers out as soon as another network namespace of the machine has some, as the
kernel finds its place in the file by counting those of this namespace, and goes on by counting all.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Family
from rules.ipvs import messages
from rules.ipvs.messages import Held, Key, Real, Target, Timeouts, VirtualServer
from rules.netlink.attributes import REQUEST, DecodeError, message
from rules.netlink.closing import Closing
from rules.netlink.errors import error_code
from rules.netlink.generic import NETLINK_GENERIC, family_number
from rules.netlink.served import closed_unless_served
from rules.netlink.transaction import NetfilterSocket

_AT_ONCE = 400
"""Requests to a send: the kernel's IPVS is locked for each alone, but the buffer is copied whole."""

_REASONS = {
    errno.EEXIST: "there is one already",
    errno.ESRCH: "there is no such virtual server",
    errno.ENOENT: "there is no such real server, or no such scheduler",
    errno.EINVAL: "the kernel takes it for invalid: a real server needs a unicast address, and lo must be up",
}


class Refused(NamedTuple):
    """A request of a batch that the kernel refused; the others were carried out."""

    place: int
    """In the list that was sent."""
    errno: int
    """EEXIST: there is one already; ESRCH: no such virtual server; ENOENT: no such real server, or scheduler."""

    @property
    def reason(self) -> str:
        """In words."""
        return _REASONS.get(self.errno) or os.strerror(self.errno)


class Ipvs(Closing):
    """A socket to the IPVS of the network namespace of the calling thread.  One call at a time.

    The first one in a kernel has it load its module.

    Raises:
        UnavailableError: the kernel has no IPVS, or we may not use it.
    """

    def __init__(self) -> None:
        self._socket = NetfilterSocket(NETLINK_GENERIC)
        with closed_unless_served(
            self._socket,
            denied="IPVS may not be used: CAP_NET_ADMIN of the host is needed",
            absent=lambda error: f"IPVS doesn't answer: {error}",
        ):
            self._family = self._number()
            self._socket.request(self._message(messages.get_info()))

    def close(self) -> None:
        """Give back the socket; the servers stay."""
        self._socket.close()

    # --- reading ---------------------------------------------------------------------------------------------

    def servers(self) -> list[VirtualServer]:
        """All virtual servers of both families, whoever made them.

        Raises:
            DataplaneError: the kernel refused, or said what makes no sense.
        """
        return [server for server, _ in self._servers()]

    def dump(self, family: Family) -> dict[Key, Held]:
        """All virtual servers of a family with their real servers, whoever made them.

        Raises:
            DataplaneError: the kernel refused, or said what makes no sense.
        """
        found = {}
        for server, foreign in self._servers():
            if server.key.family is family:
                reals = self.reals(server.key)
                direct = any(not real.masquerading for real in reals.values())
                found[server.key] = Held(server, reals, foreign or direct)
        return found

    def reals(self, key: Key) -> Mapping[Target, Real]:
        """The real servers of one virtual server; empty when there is no such server.

        Raises:
            DataplaneError: as of `dump`.
        """
        try:
            return dict(
                messages.decode_real(key.family, data, start, end)
                for data, spans in self._socket.stream(self._message(messages.get_reals(key)))
                for start, end in spans
            )
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"IPVS' real servers could not be read: {error}") from None

    def _servers(self) -> list[tuple[VirtualServer, bool]]:
        try:
            payloads = self._socket.dump(self._message(messages.get_servers()))
            return [messages.decode_server(payload) for payload in payloads]
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"IPVS' virtual servers could not be read: {error}") from None

    # --- writing ---------------------------------------------------------------------------------------------

    def send(self, requests: Sequence[bytes]) -> list[Refused]:
        """Carry requests out in order, some hundreds to a send; those that the kernel refused.

        Raises:
            DataplaneError: they could not be handed to the kernel; some may have been carried out.
        """
        refused = []
        try:
            for begin in range(0, len(requests), _AT_ONCE):
                batch = [self._message(request) for request in requests[begin : begin + _AT_ONCE]]
                answers = self._socket.refusals(batch)
                refused += [Refused(begin + place, error_code(answer.payload)) for place, answer in answers]
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"IPVS could not be changed: {error}") from None
        return refused

    def timeouts(self) -> Timeouts:
        """What idle connections are given now.

        Raises:
            DataplaneError: the kernel refused, or said what makes no sense.
        """
        try:
            return messages.decode_timeouts(self._socket.request(self._message(messages.get_timeouts())))
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"IPVS' timeouts could not be read: {error}") from None

    def set_timeouts(self, timeouts: Timeouts) -> None:
        """Set those that aren't 0 (IPVS-4).

        Raises:
            DataplaneError: the kernel refused.
        """
        try:
            self._socket.perform(self._message(messages.set_timeouts(timeouts)))
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"IPVS' timeouts could not be set: {error}") from None

    def _number(self) -> int:
        number = family_number(self._socket, "IPVS")
        if number is None:
            raise UnavailableError("this kernel has no IPVS: load its module (modprobe ip_vs) or use another mode")
        return number

    def _message(self, request: bytes) -> bytes:
        return message(self._family, REQUEST, request)
