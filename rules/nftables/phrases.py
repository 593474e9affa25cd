"""Phrases of rules: what nft 1.0.6 compiles its own words to, as expressions.

Registers are numbered as nft numbers them: a first operand in register 1, the fields of a key side by side behind it,
and an operand that has no place in the key behind what the key may take.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from rules.forwarding import (
    Detector,
    Family,
    InputInterface,
    Prefix,
    Protocol,
    SourcePrefix,
)
from rules.nftables.expressions import (
    ADDRESS_LOCAL,
    CT_NEW,
    CT_STATE,
    CT_STATUS,
    CT_STATUS_DNAT,
    EQUAL,
    FIB_ADDRESS_TYPE,
    GOTO,
    ICMP6_PORT_UNREACHABLE,
    ICMP_PORT_UNREACHABLE,
    JUMP,
    META_IIFNAME,
    META_L4PROTO,
    META_PRIORITY,
    NAT_DESTINATION,
    NETWORK_HEADER,
    NOT_EQUAL,
    REJECT_ICMP,
    TRANSPORT_HEADER,
    Bitwise,
    Cmp,
    Ct,
    Decide,
    Expression,
    Fib,
    Hash,
    LookupMap,
    Meta,
    MetaSet,
    Nat,
    Payload,
    Reject,
    Verdict,
    register,
)
from rules.nftables.objects import (
    ChainSpec,
    Hook,
    RuleSpec,
)

LIST_MASK = 0xFFFFE000

Phrase = tuple[Expression, ...]


def _host32(value: int) -> bytes:
    return struct.pack("=I", value)


FIRST = register(0)
SECOND = register(1)
SECOND_WIDE = register(4)
"""The second operand, where nft puts it while it keeps the first whole (16 bytes)."""


class Header(NamedTuple):
    """Phrases that differ by family."""

    family: Family

    @property
    def address_bytes(self) -> int:
        return self.family.address_bytes

    @property
    def after_address(self) -> int:
        """The slot of four bytes behind an address."""
        return self.address_bytes // 4

    def source(self, slot: int = 0, length: int = 0) -> Payload:
        """Load the source address, or its first bytes."""
        return self._address(12 if self.family is Family.IPV4 else 8, slot, length)

    def destination(self, slot: int = 0, length: int = 0) -> Payload:
        """Load the destination address, or its first bytes."""
        return self._address(16 if self.family is Family.IPV4 else 24, slot, length)

    def _address(self, offset: int, slot: int, length: int) -> Payload:
        return Payload(register(slot), NETWORK_HEADER, offset, length or self.address_bytes)

    def frontend_key(self, slot: int = 0) -> Phrase:
        """`ip daddr . meta l4proto . th dport`."""
        return (self.destination(slot), *port_key(slot + self.after_address))

    def matches_prefix(self, load: Payload, prefix: Prefix, operator: int) -> Phrase:
        """`ip saddr PREFIX`, or with NOT_EQUAL `ip saddr != PREFIX`; `load` loads the whole address."""
        whole, rest = divmod(prefix.length, 8)
        if not rest and whole:
            return msgspec.structs.replace(load, length=whole), Cmp(FIRST, operator, prefix.address[:whole])
        size = self.address_bytes
        mask = ((1 << prefix.length) - 1 << size * 8 - prefix.length).to_bytes(size)
        return load, Bitwise(FIRST, FIRST, size, mask, bytes(size)), Cmp(FIRST, operator, prefix.address)

    def is_loopback(self, load: Payload, operator: int) -> Phrase:
        """`ip daddr 127.0.0.0/8` or `ip6 daddr ::1`, or with NOT_EQUAL the opposite."""
        if self.family is Family.IPV4:
            return self.matches_prefix(load, Prefix(bytes((127, 0, 0, 0)), 8), operator)
        return load, Cmp(FIRST, operator, bytes(15) + b"\1")

    def translate(self, address_slot: int = 0) -> Nat:
        """`dnat ip to` an address and a port that lie side by side."""
        port = register(address_slot + self.after_address)
        return Nat(NAT_DESTINATION, self.family.af, register(address_slot), port)

    def client_hash(self, source_register: int) -> Phrase:
        """`jhash ip saddr mod 4294967295 seed ...`, as the second field of a key."""
        load = msgspec.structs.replace(self.source(), register=source_register)
        return load, Hash(source_register, SECOND, self.address_bytes, 0xFFFFFFFF, _HASH_SEED)

    def reject(self) -> Reject:
        """`reject`, as kube-proxy does for every protocol (NFT-15)."""
        code = ICMP_PORT_UNREACHABLE if self.family is Family.IPV4 else ICMP6_PORT_UNREACHABLE
        return Reject(REJECT_ICMP, code)


_HASH_SEED = 0x5BD1E995


def port_key(slot: int = 0) -> Phrase:
    """`meta l4proto . th dport`."""
    return Meta(register(slot), META_L4PROTO), Payload(register(slot + 1), TRANSPORT_HEADER, 2, 2)


def to_scratch(*key: Expression, mapping: str) -> Phrase:
    """`meta priority set KEY map @mapping`."""
    return (*key, LookupMap(mapping, FIRST, FIRST), MetaSet(FIRST, META_PRIORITY))


SCRATCH = Meta(FIRST, META_PRIORITY)


def masked(value: int, flip: int = 0) -> Bitwise:
    return Bitwise(FIRST, FIRST, 4, _host32(value), _host32(flip))


CLEAR_SLOT: Phrase = (SCRATCH, masked(LIST_MASK), MetaSet(FIRST, META_PRIORITY))
"""`meta priority set meta priority and ffff:e000`."""


def any_bit(load: Expression, bits: int) -> Phrase:
    """`meta mark & BITS != 0`, `ct state new`."""
    return load, masked(bits), Cmp(FIRST, NOT_EQUAL, bytes(4))


IS_NEW = any_bit(Ct(FIRST, CT_STATE), CT_NEW)
IS_TRANSLATED = any_bit(Ct(FIRST, CT_STATUS), CT_STATUS_DNAT)


def is_local(flags: int) -> Phrase:
    """`fib daddr type local`, `fib saddr type local`."""
    return Fib(FIRST, FIB_ADDRESS_TYPE, flags), Cmp(FIRST, EQUAL, _host32(ADDRESS_LOCAL))


def is_protocol(protocol: Protocol) -> Phrase:
    """`meta l4proto tcp`."""
    return Meta(FIRST, META_L4PROTO), Cmp(FIRST, EQUAL, bytes((protocol,)))


def go(chain: str) -> Decide:
    return Decide(Verdict(GOTO, chain))


def jump(chain: str) -> Decide:
    return Decide(Verdict(JUMP, chain))


def chain(name: str, *rules: Iterable[Expression], hook: Hook | None = None) -> ChainSpec:
    return ChainSpec(name, tuple(RuleSpec(tuple(rule)) for rule in rules), hook)


def _interface(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) < _INTERFACE_BYTES or b"\0" in raw:
        raise ValueError(f"no interface can have a name like {name!r}: it has 1 to {_INTERFACE_BYTES - 1} bytes")
    return raw


_INTERFACE_BYTES = 16


def from_pods(header: Header, detector: Detector, operator: int) -> Phrase:
    """What a local pod's packet matches; with NOT_EQUAL what any other matches (TRF-10)."""
    if isinstance(detector, SourcePrefix):
        if len(detector.prefix.address) != header.address_bytes:
            raise ValueError(f"{detector.prefix} is no network of {header.family.label}")
        return header.matches_prefix(header.source(), detector.prefix, operator)
    load = Meta(FIRST, META_IIFNAME)
    if isinstance(detector, InputInterface):
        return load, Cmp(FIRST, operator, _interface(detector.name).ljust(_INTERFACE_BYTES, b"\0"))
    return load, Cmp(FIRST, operator, _interface(detector.prefix))
