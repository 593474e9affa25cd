"""The netlink form of expressions: a table says for each how it looks on the wire, and one pair of functions reads it.

Decoding takes back what the kernel fills in where a sender left something out, so that `decode(encode(rule)) == rule`,
by way of the kernel too.  What is none of the layout's expressions, or has an attribute that we do not know, becomes
`Unknown`, so that a rule that somebody else wrote compares unequal and never raises.
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
from rules.nftables.expressions import (
    VERDICT_REGISTER,
    Bitwise,
    Cmp,
    Ct,
    Decide,
    DynamicSet,
    Expression,
    Fib,
    Hash,
    Immediate,
    Lookup,
    LookupMap,
    Masquerade,
    Meta,
    MetaSet,
    Nat,
    Number,
    Payload,
    Reject,
    Unknown,
    Verdict,
)

_EXPRESSION = 1
_NAME = 1
_DATA = 2
_VALUE = 1
_VERDICT = 2
_VERDICT_CODE = 1
_VERDICT_CHAIN = 2
_NAT_IMPLIED = 0b11
"""NAT flags that the kernel sets by itself: there is an address, there is a port."""

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
