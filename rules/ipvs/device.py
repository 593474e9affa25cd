"""The dummy device that holds the frontends' addresses, so that the node takes packets to them for its own (IPVS-7).

The addresses are for being reached, never for being used: IPv4 ones have scope host and IPv6 ones are deprecated, so
that the kernel doesn't choose them as the source of connections to elsewhere.  A connection to one of them still has
it as its source, by the route of local addresses.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from rules.dataplane import DataplaneError, UnavailableError
from rules.forwarding import Address, Family
from rules.ipvs import DEVICE
from rules.netlink.attributes import (
    CREATE,
    EXCLUSIVE,
    REQUEST,
    U32,
    DecodeError,
    attribute,
    attributes,
    message,
    nested,
    parse_text,
    text,
    u8,
)
from rules.netlink.closing import Closing
from rules.netlink.errors import error_code
from rules.netlink.transaction import NetfilterSocket

NAME = DEVICE

_NETLINK_ROUTE = 0
_NEW_LINK, _DELETE_LINK, _GET_LINK = 16, 17, 18
_NEW_ADDRESS, _DELETE_ADDRESS, _GET_ADDRESS = 20, 21, 22
_LINK_NAME, _LINK_INFO, _BY_FAMILY = 3, 18, 26
_KIND = 1
_GENERATED_ADDRESSES, _NO_GENERATED_ADDRESSES = 8, 1
_ADDRESS, _LOCAL, _LIFETIMES, _FLAGS = 1, 2, 6, 8

_UP = 1
_SCOPE_HOST, _SCOPE_GLOBAL = 254, 0
_NO_DUPLICATE_DETECTION, _NO_PREFIX_ROUTE = 0x02, 0x200
_FOR_EVER = 0xFFFFFFFF

_LINK_HEADER = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change mask."""
_ADDRESS_HEADER = struct.Struct("=BBBBi")
"""struct ifaddrmsg: family, prefix length, flags, scope, index of the interface."""
_DEPRECATED = attribute(_LIFETIMES, struct.pack("=IIII", 0, _FOR_EVER, 0, 0))
"""struct ifa_cacheinfo: preferred and valid seconds, two times of the kernel's."""
_IPV6_FLAGS = attribute(_FLAGS, U32.pack(_NO_DUPLICATE_DETECTION | _NO_PREFIX_ROUTE))

_AT_ONCE = 1000

_REASONS = {
    errno.EACCES: "the family is switched off there: see the sysctls net.ipv6.conf.*.disable_ipv6",
    errno.EPERM: "CAP_NET_ADMIN is needed",
}


class _Link(NamedTuple):
    number: int
    up: bool


class Device(Closing):
    """The device in the network namespace of the calling thread, through a socket of its own.  One call at a time.

    Raises:
        DataplaneError: there is no rtnetlink.
    """

    def __init__(self, name: str = NAME) -> None:
        self._name = name
        try:
            self._socket = NetfilterSocket(_NETLINK_ROUTE)
        except OSError as error:
            raise DataplaneError(f"no socket to rtnetlink: {error}") from None

    def close(self) -> None:
        """Give back the socket; the device stays."""
        self._socket.close()

    def exists(self) -> bool:
        """Whether the device is there.

        Raises:
            DataplaneError: a device of the name is no dummy, or the kernel refused.
        """
        return self._link() is not None

    def ensure(self) -> bool:
        """Make the device unless it is there, and bring it up; whether anything had to be done.

        Raises:
            UnavailableError: the kernel has no dummy devices, or we lack CAP_NET_ADMIN.
            DataplaneError: a device of the name is no dummy.
        """
        link = self._link()
        made = link is None
        if link is None:
            # The other family's dataplane may make it at the same time.
            self._perform(
                _link_message(_NEW_LINK, 0, self._named() + _DUMMY, flags=CREATE | EXCLUSIVE),
                "could not be made",
                fine=errno.EEXIST,
            )
            link = self._link()
            if link is None:
                raise DataplaneError(f"device {self._name} was removed as soon as it was made")
            # Its own link-local address and route would serve nobody.  Refused where there is no IPv6.
            with contextlib.suppress(OSError):
                self._socket.perform(_link_message(_NEW_LINK, link.number, _NO_LINK_LOCAL))
        if not link.up:
            self._perform(_link_message(_NEW_LINK, link.number, b"", up=True), "could not be brought up")
        return made or not link.up

    def addresses(self, family: Family) -> frozenset[Address]:
        """What it holds of a family, IPv6 link-local addresses aside; empty without the device.

        Raises:
            DataplaneError: the kernel refused.
        """
        link = self._link()
        if link is None:
            return frozenset()
        return frozenset(self._addresses(family, lambda number: number == link.number))

    def elsewhere(self, family: Family) -> frozenset[Address]:
        """What all other interfaces hold of a family, the loopback too, IPv6 link-local addresses aside.

        Raises:
            DataplaneError: the kernel refused.
        """
        link = self._link()
        return frozenset(self._addresses(family, lambda number: link is None or number != link.number))

    def _addresses(self, family: Family, of: Callable[[int], bool]) -> Iterator[Address]:
        """The addresses of some interfaces, chosen by number; IPv6 link-local ones aside."""
        request = message(_GET_ADDRESS, REQUEST, _ADDRESS_HEADER.pack(family.af, 0, 0, 0, 0))
        try:
            for payload in self._socket.dump(request):
                af, _, _, _, number = _ADDRESS_HEADER.unpack_from(payload)
                if af != family.af or not of(number):
                    continue
                values = attributes(payload[_ADDRESS_HEADER.size :])
                address = values.get(_LOCAL) or values.get(_ADDRESS, b"")
                if len(address) == family.address_bytes and not _is_link_local(address):
                    yield address
        except (OSError, DecodeError, struct.error) as error:
            raise DataplaneError(f"the interfaces' addresses could not be read: {error}") from None

    def add(self, addresses: Iterable[Address]) -> dict[Address, str]:
        """Add addresses of either family; by those that the kernel refused, why.

        One that is there already is no refusal (IPVS-31).

        Raises:
            DataplaneError: nothing could be sent, or there is no device.
        """
        return self._change(_NEW_ADDRESS, CREATE | EXCLUSIVE, addresses, errno.EEXIST)

    def remove(self, addresses: Iterable[Address]) -> dict[Address, str]:
        """Likewise; one that isn't there is no refusal."""
        return self._change(_DELETE_ADDRESS, 0, addresses, errno.EADDRNOTAVAIL)

    def delete(self) -> bool:
        """Remove the device with all its addresses; whether it was there.

        Raises:
            DataplaneError: the kernel refused, or it is no dummy.
        """
        link = self._link()
        if link is None:
            return False
        self._perform(_link_message(_DELETE_LINK, link.number, b""), "could not be removed")
        return True

    def _named(self) -> bytes:
        return text(_LINK_NAME, self._name)

    def _link(self) -> _Link | None:
        try:
            answer = self._socket.request(_link_message(_GET_LINK, 0, self._named()))
            _, _, index, flags, _ = _LINK_HEADER.unpack_from(answer)
            info = attributes(attributes(answer[_LINK_HEADER.size :]).get(_LINK_INFO, b""))
            kind = parse_text(info.get(_KIND, b""))
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise DataplaneError(f"device {self._name} could not be looked up: {_words(error.errno)}") from None
        except (DecodeError, struct.error) as error:
            raise DataplaneError(f"device {self._name} could not be looked up: {error}") from None
        if kind != "dummy":
            raise DataplaneError(f"{self._name} is no dummy device but {kind or 'another'}: remove or rename it")
        return _Link(index, bool(flags & _UP))

    def _perform(self, request: bytes, what: str, *, fine: int = 0) -> None:
        try:
            self._socket.perform(request)
        except OSError as error:
            if error.errno == fine:
                return
            if error.errno == errno.EOPNOTSUPP:
                raise UnavailableError("this kernel has no dummy devices: load the module dummy") from None
            kind = UnavailableError if error.errno == errno.EPERM else DataplaneError
            raise kind(f"device {self._name} {what}: {_words(error.errno)}") from None

    def _change(self, kind: int, flags: int, addresses: Iterable[Address], fine: int) -> dict[Address, str]:
        wanted = list(addresses)
        if not wanted:
            return {}
        link = self._link()
        if link is None:
            if kind == _DELETE_ADDRESS:
                return {}
            raise DataplaneError(f"there is no device {self._name}")
        refused = {}
        try:
            for begin in range(0, len(wanted), _AT_ONCE):
                batch = [_address_message(kind, flags, link.number, each) for each in wanted[begin : begin + _AT_ONCE]]
                for place, answer in self._socket.refusals(batch):
                    code = error_code(answer.payload)
                    if code != fine:
                        refused[wanted[begin + place]] = _words(code)
        except (OSError, DecodeError) as error:
            raise DataplaneError(f"the addresses of {self._name} could not be changed: {error}") from None
        return refused


def _link_message(kind: int, index: int, payload: bytes, *, flags: int = 0, up: bool = False) -> bytes:
    header = _LINK_HEADER.pack(0, 0, index, _UP if up else 0, _UP if up else 0)
    return message(kind, REQUEST | flags, header + payload)


def _address_message(kind: int, flags: int, index: int, address: Address) -> bytes:
    if len(address) == Family.IPV4.address_bytes:
        header = _ADDRESS_HEADER.pack(Family.IPV4.af, 32, 0, _SCOPE_HOST, index)
        return message(kind, REQUEST | flags, header + attribute(_LOCAL, address) + attribute(_ADDRESS, address))
    header = _ADDRESS_HEADER.pack(Family.IPV6.af, 128, 0, _SCOPE_GLOBAL, index)
    payload = attribute(_LOCAL, address) + _DEPRECATED + _IPV6_FLAGS
    return message(kind, REQUEST | flags, header + payload)


def _is_link_local(address: Address) -> bool:
    return len(address) == Family.IPV6.address_bytes and address[0] == 0xFE and address[1] & 0xC0 == 0x80  # fe80::/10


def _words(code: int | None) -> str:
    return _REASONS.get(code or 0) or os.strerror(code or 0)


_DUMMY = nested(_LINK_INFO, text(_KIND, "dummy"))
_NO_LINK_LOCAL = nested(_BY_FAMILY, nested(Family.IPV6.af, u8(_GENERATED_ADDRESSES, _NO_GENERATED_ADDRESSES)))
