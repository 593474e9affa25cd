"""nftables expressions: the instructions that a rule is made of, as frozen values, and their netlink form.

A rule runs its expressions from left to right over a packet and sixteen registers of four bytes; one that does not
match ends the rule.  Here stand only the expressions that nft compiles our layout to.  Every other one, and one of
ours with an attribute that we do not know, is decoded to `Unknown`, so that a rule that somebody else wrote compares
unequal and never raises.

Two expressions are equal only if they are of one type.  Values are as the kernel tells them: it says register 1 for
the first four (16 bytes) and 9, 10, 11 for the three behind it (see `register`), and fills in what a sender left out.
Decoding takes back what it fills in, so that `decode(encode(rule)) == rule`, by way of the kernel too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from rules.netlink.attributes import (
    DecodeError,
    attribute,
    attribute_list,
    attributes,
    be32,
    be64,
    nested,
    parse_be32,
    parse_be64,
    parse_text,
    parse_u8,
    text,
    text_of,
    u8,
)

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
_NAT_IMPLIED = 0b11
"""NAT flags that the kernel sets by itself: there is an address, there is a port."""

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

_EXPRESSION = 1
_NAME = 1
_DATA = 2
_VALUE = 1
_VERDICT = 2
_VERDICT_CODE = 1
_VERDICT_CHAIN = 2


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


# --- values --------------------------------------------------------------------------------------------------


def encode_value(kind: int, value: bytes) -> bytes:
    """An attribute that holds a value of registers."""
    return nested(kind, attribute(_VALUE, value))


def encode_verdict(kind: int, verdict: Verdict) -> bytes:
    """An attribute that holds a verdict."""
    chain = text(_VERDICT_CHAIN, verdict.chain) if verdict.chain else b""
    return nested(kind, nested(_VERDICT, be32(_VERDICT_CODE, verdict.code), chain))


def parse_value(data: bytes) -> bytes:
    """The value in such an attribute's content; raises DecodeError."""
    value = attributes(data).get(_VALUE)
    if value is None:
        raise DecodeError("a value was expected")
    return value


def parse_verdict(data: bytes) -> Verdict:
    """The verdict in such an attribute's content; raises DecodeError."""
    content = attributes(data).get(_VERDICT)
    if content is None:
        raise DecodeError("a verdict was expected")
    found = attributes(content)
    code = parse_be32(found.get(_VERDICT_CODE, b""))
    return Verdict(code - (1 << 32) if code >> 31 else code, text_of(found, _VERDICT_CHAIN, ""))


# --- the table of expressions ----------------------------------------------------------------------------------

Pack = Callable[[int, Any], bytes]
Parse = Callable[[bytes], Any]
_NUMBER: tuple[Pack, Parse] = (be32, parse_be32)
_LONG: tuple[Pack, Parse] = (be64, parse_be64)
_BYTE: tuple[Pack, Parse] = (u8, parse_u8)
_TEXT: tuple[Pack, Parse] = (text, parse_text)
_BYTES: tuple[Pack, Parse] = (encode_value, parse_value)


class _Form(NamedTuple):
    """How one expression looks on the wire: its name, and an attribute and a codec for each field."""

    name: str
    type: Any
    fields: tuple[tuple[int, tuple[Pack, Parse]], ...]
    constant: Mapping[int, int] = {}
    """Attributes that always have one value; a form whose constants differ does not apply."""

    @property
    def required(self) -> int:
        """How many fields must be there; the others stand behind them, and to the kernel are zero where absent."""
        return len(self.fields) - len(self.type.__struct_defaults__)


_FORMS = (
    _Form("payload", Payload, ((1, _NUMBER), (2, _NUMBER), (3, _NUMBER), (4, _NUMBER))),
    _Form("meta", Meta, ((1, _NUMBER), (2, _NUMBER))),
    _Form("meta", MetaSet, ((3, _NUMBER), (2, _NUMBER))),
    _Form("ct", Ct, ((1, _NUMBER), (2, _NUMBER))),
    _Form("fib", Fib, ((1, _NUMBER), (2, _NUMBER), (3, _NUMBER))),
    _Form("cmp", Cmp, ((1, _NUMBER), (2, _NUMBER), (3, _BYTES))),
    _Form("bitwise", Bitwise, ((1, _NUMBER), (2, _NUMBER), (3, _NUMBER), (4, _BYTES), (5, _BYTES)), {6: 0}),
    _Form("lookup", Lookup, ((1, _TEXT), (2, _NUMBER), (5, _NUMBER))),
    _Form("lookup", LookupMap, ((1, _TEXT), (2, _NUMBER), (3, _NUMBER), (5, _NUMBER))),
    _Form("immediate", Decide, ((2, (encode_verdict, parse_verdict)),), {1: VERDICT_REGISTER}),
    _Form("immediate", Immediate, ((1, _NUMBER), (2, _BYTES))),
    _Form("numgen", Number, ((1, _NUMBER), (2, _NUMBER), (3, _NUMBER), (4, _NUMBER))),
    _Form(
        "hash",
        Hash,
        ((1, _NUMBER), (2, _NUMBER), (3, _NUMBER), (4, _NUMBER), (5, _NUMBER), (6, _NUMBER), (7, _NUMBER)),
    ),
    _Form("dynset", DynamicSet, ((1, _TEXT), (3, _NUMBER), (4, _NUMBER), (5, _NUMBER), (6, _LONG), (9, _NUMBER))),
    _Form("nat", Nat, ((1, _NUMBER), (2, _NUMBER), (3, _NUMBER), (5, _NUMBER), (7, _NUMBER))),
    _Form("masq", Masquerade, ((1, _NUMBER),)),
    _Form("reject", Reject, ((1, _NUMBER), (2, _BYTE))),
)
_FORM_OF = {form.type: form for form in _FORMS}
_FORMS_OF = {name: [form for form in _FORMS if form.name == name] for name in {form.name for form in _FORMS}}

_NAT_ADDRESS, _NAT_ADDRESS_END, _NAT_PORT, _NAT_PORT_END, _NAT_FLAGS = 3, 4, 5, 6, 7


def encode(expressions: Iterable[Expression]) -> bytes:
    """The attributes of a rule's expressions, one list element each."""
    return b"".join([_encode(expression) for expression in expressions])


def _encode(expression: Expression) -> bytes:
    if isinstance(expression, Unknown):
        return nested(_EXPRESSION, text(_NAME, expression.name), nested(_DATA, expression.raw))
    form = _FORM_OF[type(expression)]
    parts = [be32(kind, value) for kind, value in form.constant.items()]
    values = msgspec.structs.astuple(expression)
    for place, ((kind, (pack, _)), value) in enumerate(zip(form.fields, values, strict=True)):
        if value != 0 or place < form.required:
            parts.append(pack(kind, value))
    return nested(_EXPRESSION, text(_NAME, form.name), nested(_DATA, *parts))


def decode(data: bytes) -> tuple[Expression, ...]:
    """A rule's expressions from the content of its expressions attribute.

    Raises:
        DecodeError: it is no list of named expressions at all.
    """
    return tuple(_decode(content) for kind, content in attribute_list(data) if kind == _EXPRESSION)


def _decode(content: bytes) -> Expression:
    found = attributes(content)
    name = text_of(found, _NAME)
    raw = found.get(_DATA, b"")
    try:
        listed = attribute_list(raw)
        values = dict(listed)
        if len(values) == len(listed):
            if name == "nat":
                values = _without_implied(values)
            for form in _FORMS_OF.get(name, ()):
                fields = _fields(form, values)
                if fields is not None:
                    expression: Expression = form.type(*fields)
                    return expression
    except DecodeError:
        pass
    return Unknown(name, raw)


def _fields(form: _Form, values: dict[int, bytes]) -> list[Any] | None:
    """The fields of an expression of this form; None: the values are of another form."""
    known = {kind for kind, _ in form.fields} | form.constant.keys()
    if not values.keys() <= known:
        return None
    if any(kind in values and parse_be32(values[kind]) != value for kind, value in form.constant.items()):
        return None
    fields = []
    for place, (kind, (_, parse)) in enumerate(form.fields):
        if kind in values:
            fields.append(parse(values[kind]))
        elif place < form.required:
            return None
        else:
            fields.append(0)
    return fields


def _without_implied(values: dict[int, bytes]) -> dict[int, bytes]:
    """The attributes of a NAT expression without those that the kernel adds: ends of ranges of one, and flags."""
    kept = dict(values)
    for start, end in ((_NAT_ADDRESS, _NAT_ADDRESS_END), (_NAT_PORT, _NAT_PORT_END)):
        if end in kept and kept[end] == kept.get(start):
            del kept[end]
    if _NAT_FLAGS in kept:
        kept[_NAT_FLAGS] = (parse_be32(kept[_NAT_FLAGS]) & ~_NAT_IMPLIED).to_bytes(4)
    return kept
