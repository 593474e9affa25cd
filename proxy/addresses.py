"""Addresses and networks as Kubernetes objects spell them, read as leniently as kube-proxy reads them.

Old objects hold what today's API servers refuse: `172.030.0.041`, `1.2.3.4/24` with host bits, `::ffff:1.2.3.4`.
They must work as they always have (SVC-8, SVC-10, SVC-17, EPS-7): leading zeros are decimal, never octal; host bits
are masked off; an IPv4 address mapped into IPv6 is an IPv4 address.
"""

from __future__ import annotations

import re
import socket

from rules.forwarding import Address, Prefix

_MAPPED = bytes(10) + b"\xff\xff"
_LEADING_ZEROS = re.compile(r"\b0+(?=[0-9A-Fa-f])")


def lenient_address(text: str) -> Address:
    """The packed form of an IPv4 or IPv6 address.

    Raises:
        ValueError: `text` is no address; blanks around one are not forgiven either.
    """
    if ":" not in text:
        try:
            return socket.inet_pton(socket.AF_INET, text)  # nearly all are so
        except (OSError, ValueError):
            return _packed(text)
    packed = _packed(text)
    return packed[12:] if len(packed) == 16 and packed.startswith(_MAPPED) else packed


def lenient_prefix(text: str) -> Prefix:
    """A network from `address/length`.

    Raises:
        ValueError: `text` is no network; an address alone is none.
    """
    host, slash, digits = text.partition("/")
    if not slash or not digits.isascii() or not digits.isdigit():
        raise ValueError(f"{text!r} is no network: expected address/length")
    address, length = _packed(host), int(digits)
    if len(address) == 16 and address.startswith(_MAPPED) and length >= 96:
        address, length = address[12:], length - 96
    bits = len(address) * 8
    if length > bits:
        raise ValueError(f"{text!r} is no network: the length is over {bits}")
    host_bits = bits - length
    return Prefix((int.from_bytes(address) >> host_bits << host_bits).to_bytes(len(address)), length)


def _packed(text: str) -> Address:
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    try:
        return socket.inet_pton(family, text)
    except (OSError, ValueError):
        # glibc takes leading zeros for a mistake, where others once took them for octal.
        try:
            return socket.inet_pton(family, _LEADING_ZEROS.sub("", text))
        except (OSError, ValueError):
            raise ValueError(f"{text!r} is no IP address") from None
