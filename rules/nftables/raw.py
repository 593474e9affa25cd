"""What the kernel holds of our table, object by object and in words: `sluice dump -o raw`.

A rule is told as the instructions that it consists of, so that a stranger's rule is told as well as ours; r1, r9 and so
on are the registers between them.  An element is told with its key and data unpacked, and with the frontends that it
serves, found as the decoder finds them: from the frontend to its list, from the list to its backends.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping

from rules.dataplane import RawItem
from rules.forwarding import Backend, Family, ForwardingTable, Frontend, Kind, Protocol, format_address
from rules.nftables import names
from rules.nftables.chains import pick_count
from rules.nftables.describe import describe_key
from rules.nftables.elements import ENDPOINT_MAPS, MalformedError, unpack_backend, unpack_index_key, unpack_reference
from rules.nftables.expressions import (
    ACCEPT,
    CT_STATE,
    CT_STATUS,
    DROP,
    EQUAL,
    FIB_DESTINATION,
    FIB_SOURCE,
    GOTO,
    INVERSE,
    JUMP,
    META_IIFNAME,
    META_L4PROTO,
    META_MARK,
    META_PRIORITY,
    NAT_DESTINATION,
    NETWORK_HEADER,
    RETURN,
    TRANSPORT_HEADER,
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
from rules.nftables.messages import INTERVAL_END, Element
from rules.nftables.model import Model
from rules.nftables.objects import MAP, ChainSpec, RuleSpec, SetSpec
from rules.nftables.sets import PICK
from rules.nftables.state import StaticState

Owners = Mapping[tuple[str, bytes], tuple[Frontend, ...]]

_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_META = {META_MARK: "mark", META_PRIORITY: "priority", META_IIFNAME: "iifname", META_L4PROTO: "l4proto"}
_CT = {CT_STATE: "state", CT_STATUS: "status"}
_VERDICTS = {ACCEPT: "accept", DROP: "drop", JUMP: "jump", GOTO: "goto", RETURN: "return"}
_ADDRESSES = {
    Family.IPV4: {(12, 4): "ip saddr", (16, 4): "ip daddr"},
    Family.IPV6: {(8, 16): "ip6 saddr", (24, 16): "ip6 daddr"},
}


def raw_items(
    static: StaticState, elements: Mapping[str, Mapping[bytes, Element]], table: ForwardingTable, model: Model
) -> Iterator[RawItem]:
    """Table, chains, rules, sets and elements, each behind what it belongs to.

    Args:
        static: what was read of the static part.
        elements: of every set, by name and key; those that the kernel writes are left out.
        table: what all of it comes to.
        model: how that is laid out.
    """
    family = static.family
    owners = owners_of(table, model)
    keyword = "ip" if family is Family.IPV4 else "ip6"
    yield RawItem(0, f"table {keyword} {static.table.name}" + _comment(static.table.comment))
    # Where packets come in stands first, the many chains that are alike last.
    for chain in sorted(static.chains.values(), key=lambda each: (each.hook is None, pick_count(each.name) or 0)):
        yield RawItem(1, chain_words(chain))
        for number, rule in enumerate(chain.rules, 1):
            yield RawItem(2, f"{number}: {rule_words(rule, family)}")
    for name, spec in static.sets.items():
        held = elements.get(name, {})
        yield RawItem(1, set_words(spec, len(held)))
        shown = sorted(
            (element_words(name, element, family), owners.get((name, key), ())) for key, element in held.items()
        )
        yield from (RawItem(2, words, frontends) for words, frontends in shown)


def owners_of(table: ForwardingTable, model: Model) -> Owners:
    """The frontends that each element serves, by set and key."""
    owners: dict[tuple[str, bytes], tuple[Frontend, ...]] = {}
    by_address: dict[bytes, list[Frontend]] = defaultdict(list)
    by_backend: dict[tuple[Protocol, Backend], list[Frontend]] = defaultdict(list)
    for frontend, route in table.routes.items():
        if route.kind is Kind.CLUSTER_IP:
            by_address[frontend.address].append(frontend)
        for backend in route.backends | (route.local_backends or frozenset()):
            by_backend[frontend.protocol, backend].append(frontend)
    for placed, frontends in model.owned():
        owners[placed.set, placed.element.key] = frontends
    for address, found in by_address.items():
        owners[names.CLUSTER_IPS, address] = tuple(found)
    for placed, endpoint in model.hairpin_elements():
        backend = Backend(endpoint.address, endpoint.port)
        owners[placed.set, placed.element.key] = tuple(by_backend.get((endpoint.protocol, backend), ()))
    return owners


# --- the static part ---------------------------------------------------------------------------------------------


def chain_words(chain: ChainSpec) -> str:
    """A chain and where it hangs."""
    words = f"chain {chain.name}"
    if chain.hook is not None:
        hook = chain.hook
        number = _HOOKS[hook.number] if hook.number < len(_HOOKS) else str(hook.number)
        words += (
            f" (type {hook.type}, hook {number}, priority {hook.priority}, policy {_verdict(Verdict(hook.policy))})"
        )
    return words + _comment(chain.comment)


def rule_words(rule: RuleSpec, family: Family) -> str:
    """A rule's instructions, one after the other."""
    return ", ".join(expression_words(each, family) for each in rule.expressions) + _comment(rule.comment)


def set_words(spec: SetSpec, count: int) -> str:
    """A set or a map, with the number of its elements."""
    kind = "map" if spec.flags & MAP else "set"
    if spec.name == names.STICKY:
        return f"{kind} {spec.name} (written by the kernel: not listed)"
    return f"{kind} {spec.name} ({count} element{'' if count == 1 else 's'})"


def expression_words(step: Expression, family: Family) -> str:  # noqa: C901, PLR0911, PLR0912  # a line for each of them
    """One instruction."""
    match step:
        case Payload():
            return f"{_payload(step, family)} -> r{step.register}"
        case Meta():
            return f"meta {_META.get(step.key, step.key)} -> r{step.register}"
        case MetaSet():
            return f"r{step.register} -> meta {_META.get(step.key, step.key)}"
        case Ct():
            return f"ct {_CT.get(step.key, step.key)} -> r{step.register}"
        case Fib():
            side = {FIB_SOURCE: "saddr", FIB_DESTINATION: "daddr"}.get(step.flags, f"flags {step.flags:#x}")
            return f"fib {side} result {step.result} -> r{step.register}"
        case Cmp():
            operator = {EQUAL: "=="}.get(step.operator, "!=" if step.operator == 1 else f"op {step.operator}")
            return f"r{step.register} {operator} {_value(step.value, family)}"
        case Bitwise():
            return f"r{step.source} & 0x{step.mask.hex()} ^ 0x{step.flip.hex()} -> r{step.register}"
        case Lookup():
            return f"r{step.key} {'not in' if step.flags & INVERSE else 'in'} @{step.set}"
        case LookupMap():
            target = "verdict" if step.register == VERDICT_REGISTER else f"r{step.register}"
            return f"@{step.set}[r{step.key}] -> {target}"
        case Immediate():
            return f"{_value(step.value, family)} -> r{step.register}"
        case Decide():
            return _verdict(step.verdict)
        case Number():
            return f"random number below {step.modulus}{f' + {step.offset}' if step.offset else ''} -> r{step.register}"
        case Hash():
            return f"hash of {step.length} bytes in r{step.source} below {step.modulus} -> r{step.register}"
        case DynamicSet():
            return f"r{step.data} -> @{step.set}[r{step.key}] for {step.timeout / 1000:g} s"
        case Nat():
            kind = "dnat" if step.type == NAT_DESTINATION else "snat"
            return f"{kind} to r{step.address} port r{step.port}"
        case Masquerade():
            return "masquerade" + (f" flags {step.flags:#x}" if step.flags else "")
        case Reject():
            return f"reject type {step.type} code {step.code}"
        case Unknown():
            return f"{step.name} 0x{step.raw.hex()}"


def _payload(step: Payload, family: Family) -> str:
    if step.base == NETWORK_HEADER:
        found = _ADDRESSES[family].get((step.offset, step.length))
        if found:
            return found
    elif step.base == TRANSPORT_HEADER and step.length == 2 and step.offset in (0, 2):
        return "th dport" if step.offset else "th sport"
    base = {NETWORK_HEADER: "network", TRANSPORT_HEADER: "transport"}.get(step.base, str(step.base))
    return f"{step.length} bytes at {base} header + {step.offset}"


def _value(value: bytes, family: Family) -> str:
    if len(value) == 16 and family is Family.IPV4 and value.rstrip(b"\0").isascii() and value.rstrip(b"\0"):
        return f'"{value.rstrip(bytes(1)).decode()}"'  # the name of an interface
    return f"0x{value.hex()}"


def _verdict(verdict: Verdict) -> str:
    return f"{_VERDICTS.get(verdict.code, verdict.code)} {verdict.chain}".rstrip()


def _comment(comment: str) -> str:
    return f'  "{comment}"' if comment else ""


# --- elements ------------------------------------------------------------------------------------------------------


def element_words(name: str, element: Element, family: Family) -> str:
    """An element: its key, what it leads to, and its comment."""
    ends = element.flags & INTERVAL_END
    words = f"up to {_address(element.key)}" if ends else _key(name, element.key, family)
    if element.verdict is not None:
        words += f" -> {_verdict(element.verdict)}"
    elif element.data:
        words += f" -> {_data(name, element.data, family)}"
    return words + _comment(element.comment)


def _key(name: str, key: bytes, family: Family) -> str:
    if not key:
        return "all others"
    try:
        words = _list_key(name, key)
    except MalformedError:
        words = f"0x{key.hex()}"
    if words:
        return words
    return _address(key) if len(key) == family.address_bytes else describe_key(name, key, family)


def _list_key(name: str, key: bytes) -> str:
    """The key of an element that belongs to a list; empty for others.  Raises MalformedError."""
    if name in ENDPOINT_MAPS.values() or name == names.MEMBERS:
        return "list {} index {}".format(*unpack_index_key(key))
    if name == names.SLOTS:
        return "list {} slot {}".format(*unpack_reference(key))
    if names.affinity_timeout(name) is not None:
        return f"list {unpack_reference(key)[0]}"
    if name == PICK:
        return f"{int.from_bytes(key, sys.byteorder)} backends"
    return ""


def _data(name: str, data: bytes, family: Family) -> str:
    try:
        if name in ENDPOINT_MAPS.values() or name == names.SLOTS:
            return str(unpack_backend(data, family))
        number, low = unpack_reference(data)
    except MalformedError:
        return f"0x{data.hex()}"
    return f"list {number} slot {low}" if name == names.MEMBERS else f"list {number} of {low}"


def _address(key: bytes) -> str:
    return format_address(key) if len(key) in (4, 16) else f"0x{key.hex()}"
