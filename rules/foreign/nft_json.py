"""`nft -j list ruleset` and `nft -j list table`: the JSON, as far as it is kube-proxy's.  Pure.

Rules are said in the words of the text form, so that one decoder does for both.  A statement that kube-proxy doesn't
write is said as JSON, which no decoder understands, and so is damage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from rules.foreign.gathering import ForeignError
from rules.foreign.nft_model import FAMILIES, TABLE, Element, Hook, NftChain, NftSet, NftTable, normal_rule

_DEEPEST = 12
"""How deep expressions are followed; kube-proxy's have five levels."""
_PLAIN_META = {"iifname", "oifname"}
_STRANGE = (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration)
"""What comes of values of other types than they should be."""


def parse(data: bytes) -> list[NftTable]:
    """kube-proxy's tables, one of each family at most.

    Raises:
        ForeignError: it is no JSON, or none of nft's.
    """
    try:
        items = msgspec.json.decode(data)["nftables"]
    except msgspec.DecodeError as error:
        raise ForeignError(f"it is not the JSON that nft prints: {error}") from None
    except (RecursionError, *_STRANGE):
        items = None
    if not isinstance(items, list):
        raise ForeignError("it is not the JSON that nft prints: it has no list `nftables`")
    found: dict[str, NftTable] = {}
    for item in items:
        if isinstance(item, dict) and len(item) == 1:
            kind, value = next(iter(item.items()))
            if isinstance(value, dict):
                _take(found, kind, value)
    return list(found.values())


def _take(found: dict[str, NftTable], kind: str, value: dict[str, Any]) -> None:
    family = value.get("family")
    of = value.get("name") if kind == "table" else value.get("table")
    if of != TABLE or not isinstance(family, str) or family not in FAMILIES:
        return
    table = found.get(family)
    if table is None:
        table = found[family] = NftTable(FAMILIES[family], {}, {}, [])
    name = value.get("chain" if kind == "rule" else "name")
    if not isinstance(name, str):
        table.faults.append(f"there is a {kind} without a name")
    elif kind in {"set", "map"}:
        table.sets[name] = _set(table, name, value)
    elif kind == "chain":
        table.chains.setdefault(name, NftChain(None, [])).hook = _hook(table, name, value)
    elif kind == "rule":
        table.chains.setdefault(name, NftChain(None, [])).rules.append(_rule(value.get("expr")))


def _set(table: NftTable, name: str, value: dict[str, Any]) -> NftSet:
    timeout = value.get("timeout", 0)
    found = NftSet([], timeout if isinstance(timeout, int) else 0)
    elements = value.get("elem", [])
    for each in elements if isinstance(elements, list) else [elements]:
        try:
            found.elements.append(_element(each, mapped="map" in value))
        except _STRANGE:
            table.faults.append(f"{name} has an element that is not understood")
    return found


def _element(value: Any, *, mapped: bool) -> Element:
    key, verdict = value if mapped else (value, None)
    comment = ""
    if isinstance(key, dict) and "elem" in key:
        key = key["elem"]
        comment = str(key.get("comment", ""))
        key = key["val"]
    return Element(_expression(key), _statement(verdict) if mapped else "", comment)


def _hook(table: NftTable, name: str, value: dict[str, Any]) -> Hook | None:
    if "hook" not in value:
        return None
    try:
        return msgspec.convert({"policy": "accept", "priority": value.get("prio"), **value}, Hook)
    except msgspec.ValidationError:
        table.faults.append(f"chain {name} stands at a place that is not understood")
        return None


def _rule(expressions: Any) -> str:
    try:
        words = [_statement(each) for each in expressions]
    except _STRANGE:
        return "a rule that is not what nft prints"
    return normal_rule(" ".join(filter(None, words)))


# --- words -----------------------------------------------------------------------------------------------------


def _statement(value: Any) -> str:
    """A statement or a verdict in the words of the text form."""
    kind, body = next(iter(value.items()))
    words = _STATEMENTS.get(kind)
    return f"{kind} {msgspec.json.encode(body).decode()}" if words is None else words(body)


def _match(body: Any) -> str:
    operator = "" if body["op"] in {"==", "in"} else f"{body['op']} "
    return f"{_expression(body['left'])} {operator}{_expression(body['right'])}"


def _reject(body: Any) -> str:
    usual = body is None or (body.get("expr") == "port-unreachable" and body.get("type") in {"icmp", "icmpv6", "icmpx"})
    return "reject" if usual else f"reject with {msgspec.json.encode(body).decode()}"


def _masquerade(body: Any) -> str:
    flags = (body or {}).get("flags", [])
    return f"masquerade {flags if isinstance(flags, str) else ','.join(flags)}".rstrip()


def _dnat(body: Any) -> str:
    family = f" {body['family']}" if "family" in body else ""
    address = _expression(body["addr"])
    if "port" not in body:
        return f"dnat{family} to {address}"
    host = f"[{address}]" if ":" in address else address
    return f"dnat{family} to {host}:{_expression(body['port'])}"


_VERDICTS: dict[str, Callable[[Any], str]] = {
    "jump": lambda body: f"jump {body['target']}",
    "goto": lambda body: f"goto {body['target']}",
    "drop": lambda _: "drop",
    "accept": lambda _: "accept",
    "return": lambda _: "return",
}
_STATEMENTS: dict[str, Callable[[Any], str]] = {
    **_VERDICTS,
    "match": _match,
    "reject": _reject,
    "vmap": lambda body: f"{_expression(body['key'])} vmap {_expression(body['data'])}",
    "mangle": lambda body: f"{_expression(body['key'])} set {_expression(body['value'])}",
    "masquerade": _masquerade,
    "dnat": _dnat,
    "set": lambda body: f"{body['op']} {body['set']} {{ {_expression(body['elem'])} }}",
    "counter": lambda _: "",
}


def _expression(value: Any, depth: int = 0) -> str:
    """An expression in the words of the text form."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    if depth > _DEEPEST:
        raise ValueError("too deep")
    if not value:
        raise ValueError("nothing")  # next would end the generators that this is called in
    kind, body = next(iter(value.items()))
    if kind in _VERDICTS:
        return _VERDICTS[kind](body)
    return _EXPRESSIONS[kind](body, depth + 1)


def _meta(body: Any, _: int) -> str:
    return str(body["key"]) if body["key"] in _PLAIN_META else f"meta {body['key']}"


def _fib(body: Any, _: int) -> str:
    flags = body["flags"]
    return f"fib {flags if isinstance(flags, str) else ' . '.join(flags)} {body['result']}"


def _numgen(body: Any, _: int) -> str:
    offset = f" offset {body['offset']}" if body.get("offset") else ""
    return f"numgen {body['mode']} mod {body['mod']}{offset}"


def _set_of(body: Any, depth: int) -> str:
    return "{ " + ", ".join(_members(body, depth)) + " }"


def _bits(operator: str) -> Callable[[Any, int], str]:
    def words(body: Any, depth: int) -> str:
        parts = (f"{each:#x}" if isinstance(each, int) else _expression(each, depth) for each in body)
        return f" {operator} ".join(parts)

    return words


_EXPRESSIONS: dict[str, Callable[[Any, int], str]] = {
    "payload": lambda body, _: f"{body['protocol']} {body['field']}",
    "meta": _meta,
    "ct": lambda body, _: f"ct {body['key']}",
    "fib": _fib,
    "concat": lambda body, depth: " . ".join(_expression(each, depth) for each in body),
    "prefix": lambda body, depth: f"{_expression(body['addr'], depth)}/{body['len']}",
    "range": lambda body, depth: "-".join(_expression(each, depth) for each in body),
    "set": _set_of,
    "elem": lambda body, depth: _expression(body["val"], depth),
    "map": lambda body, depth: f"{_expression(body['key'], depth)} map {_expression(body['data'], depth)}",
    "numgen": _numgen,
    "&": _bits("&"),
    "|": _bits("|"),
    "^": _bits("^"),
}


def _members(body: Any, depth: int) -> Iterator[str]:
    for each in body if isinstance(body, list) else [body]:
        if isinstance(each, list):
            key, value = each
            yield f"{_expression(key, depth)} : {_expression(value, depth)}"
        else:
            yield _expression(each, depth)
