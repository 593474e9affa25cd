"""nftables expressions: the instructions that a rule is made of, as frozen values.

A rule runs its expressions from left to right over a packet and sixteen registers of four bytes; one that does not
match ends the rule.  Here stand only the expressions that nft compiles our layout to; every other one is `Unknown`.
How they look on the wire is told in `rules.nftables.expression_codec`.

Two expressions are equal only if they are of one type.  Values are as the kernel tells them: it says register 1 for
the first four (16 bytes) and 9, 10, 11 for the three behind it (see `register`).
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

VERDICT_REGISTER = 0

NETWORK_HEADER = 1
TRANSPORT_HEADER = 2

META_PRIORITY = 2
META_MARK = 3
META_IIFNAME = 6
META_L4PROTO = 16

CT_STATE = 0
CT_STATUS = 2
CT_NEW = 8
CT_ESTABLISHED = 2
CT_RELATED = 4
CT_STATUS_DNAT = 1 << 5

FIB_SOURCE = 1
FIB_DESTINATION = 2
FIB_ADDRESS_TYPE = 3
ADDRESS_LOCAL = 2

EQUAL = 0
NOT_EQUAL = 1

NAT_SOURCE = 0
NAT_DESTINATION = 1
FULLY_RANDOM = 1 << 4

REJECT_ICMP = 0
ICMP_PORT_UNREACHABLE = 3
ICMP6_PORT_UNREACHABLE = 4

NUMBER_RANDOM = 1
JENKINS = 0
UPDATE, DELETE = 1, 2
INVERSE = 1

DROP = 0
ACCEPT = 1
JUMP = -3
GOTO = -4
RETURN = -5


class Verdict(NamedTuple):
    """What happens to a packet; with a chain for jump and goto."""

    code: int
    chain: str = ""


class Payload(msgspec.Struct, frozen=True, gc=False):
    """Load bytes of the packet."""

    register: int
    base: int
    offset: int
    length: int


class Meta(msgspec.Struct, frozen=True, gc=False):
    """Load a property of the packet."""

    register: int
    key: int


class MetaSet(msgspec.Struct, frozen=True, gc=False):
    """Set a property of the packet."""

    register: int
    key: int


class Ct(msgspec.Struct, frozen=True, gc=False):
    """Load a property of the packet's connection."""

    register: int
    key: int


class Fib(msgspec.Struct, frozen=True, gc=False):
    """Load what the routing table says about an address of the packet."""

    register: int
    result: int
    flags: int


class Cmp(msgspec.Struct, frozen=True, gc=False):
    """Go on if a register compares so with a value."""

    register: int
    operator: int
    value: bytes


class Bitwise(msgspec.Struct, frozen=True, gc=False):
    """Registers masked and then flipped."""

    source: int
    register: int
    length: int
    mask: bytes
    flip: bytes


class Lookup(msgspec.Struct, frozen=True, gc=False):
    """Go on if a key is in a set (`inverse`: is not)."""

    set: str
    key: int
    flags: int = 0


class LookupMap(msgspec.Struct, frozen=True, gc=False):
    """Load what a map has for a key, and go on if it has anything; into register 0: that verdict."""

    set: str
    key: int
    register: int
    flags: int = 0


class Immediate(msgspec.Struct, frozen=True, gc=False):
    """Load a constant."""

    register: int
    value: bytes


class Decide(msgspec.Struct, frozen=True, gc=False):
    """End the rule with a verdict."""

    verdict: Verdict


class Number(msgspec.Struct, frozen=True, gc=False):
    """Load a number below `modulus`."""

    register: int
    modulus: int
    type: int = NUMBER_RANDOM
    offset: int = 0


class Hash(msgspec.Struct, frozen=True, gc=False):
    """Load a hash of registers, below `modulus`."""

    source: int
    register: int
    length: int
    modulus: int
    seed: int
    offset: int = 0
    type: int = JENKINS


class DynamicSet(msgspec.Struct, frozen=True, gc=False):
    """Write or delete an element of a map from the packet path; `timeout` in milliseconds, 0: the map's own."""

    set: str
    operation: int
    key: int
    data: int
    timeout: int
    flags: int = 0


class Nat(msgspec.Struct, frozen=True, gc=False):
    """Rewrite an address and a port of the connection."""

    type: int
    family: int
    address: int
    port: int
    flags: int = 0


class Masquerade(msgspec.Struct, frozen=True, gc=False):
    """Rewrite the connection's source to the address of the outgoing interface."""

    flags: int = 0


class Reject(msgspec.Struct, frozen=True, gc=False):
    """Refuse with an ICMP error."""

    type: int
    code: int


class Unknown(msgspec.Struct, frozen=True, gc=False):
    """An expression that is none of ours: its name, and its attributes as they came."""

    name: str
    raw: bytes


Expression = (
    Payload
    | Meta
    | MetaSet
    | Ct
    | Fib
    | Cmp
    | Bitwise
    | Lookup
    | LookupMap
    | Immediate
    | Decide
    | Number
    | Hash
    | DynamicSet
    | Nat
    | Masquerade
    | Reject
    | Unknown
)


def register(slot: int) -> int:
    """The number by which the kernel calls the `slot`-th register of four bytes, from 0."""
    return 1 + slot // 4 if slot % 4 == 0 else 8 + slot
