"""What `ipset save` prints, read and written.  Pure.

Sets whose names do not begin with `KUBE-` are passed over, and so is what elements carry (counters, comments).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from socket import inet_pton

from rules.foreign.gathering import parse_port
from rules.foreign.ipvs_state import MOST_FAULTS, KeptSet
from rules.foreign.saved import PREFIX
from rules.forwarding import Address, Family, Protocol, parse_prefix
from rules.ipvs.decode import element_words
from rules.netlink.ipset_messages import Element, SetType

LINE = re.compile(r"(?:create \S+ (?:hash|bitmap|list):|add \S+ \S)")
"""How its lines begin."""

_FAMILIES = {"inet": Family.IPV4, "inet6": Family.IPV6}
_NAMES = {family: name for name, family in _FAMILIES.items()}
_PROTOCOLS = {each.name.lower(): each.value for each in Protocol} | {str(each.value): each.value for each in Protocol}
_PARTS = {SetType.IP: 1, SetType.IP_PORT: 2, SetType.IP_PORT_IP: 3, SetType.IP_PORT_NET: 3, SetType.PORT: 1}
"""Of how many parts an element consists, by those types of which kube-proxy has sets (IPVS-11)."""


def parse(lines: Iterable[str]) -> tuple[dict[str, KeptSet], list[str]]:
    """kube-proxy's sets by name, and what is not understood of them, one sentence each."""
    made: dict[str, tuple[SetType, Family | None]] = {}
    elements: dict[str, set[Element]] = {}
    faults: list[str] = []
    for line in lines:
        words = line.split(None, 3)
        if len(words) < 3 or not words[1].startswith(PREFIX):
            continue
        command, name, rest = words[0], words[1], words[2]
        if command == "create":
            spec = _spec(rest, line.split()[3:])
            if spec is None:
                _complain(faults, f"ipset {name} is of another type than kube-proxy makes: {rest}")
            elif made.setdefault(name, spec) != spec:
                _complain(faults, f"ipset {name} stands there twice, and not alike: the first one is read")
            elements.setdefault(name, set())
        elif command == "add" and name in made:
            try:
                elements[name].add(_element(rest, *made[name]))
            except (ValueError, OSError):
                _complain(faults, f"ipset {name} has an element that is not understood: {rest[:100]}")
        elif command == "add" and name not in elements:
            elements[name] = set()
            _complain(faults, f"ipset {name} has elements, and no line that creates it")
    return {name: KeptSet(*spec, frozenset(elements[name])) for name, spec in made.items()}, faults


def lines(sets: Mapping[str, KeptSet]) -> Iterator[str]:
    """Sets as `ipset save` prints them, with the sizes that kube-proxy gives them (IPVS-11)."""
    for name, (kind, family, elements) in sorted(sets.items()):
        if family is None:
            yield f"create {name} {kind.value} range 0-65535"
        else:
            yield f"create {name} {kind.value} family {_NAMES[family]} hashsize 1024 maxelem 65536"
        for element in sorted(elements):
            yield f"add {name} {element_words(element)}"


def _complain(faults: list[str], sentence: str) -> None:
    if len(faults) < MOST_FAULTS:
        faults.append(sentence)


def _spec(kind: str, options: list[str]) -> tuple[SetType, Family | None] | None:
    try:
        found = SetType(kind)
        if found not in _PARTS:
            return None
        if found is SetType.PORT:
            return found, None
        return found, _FAMILIES[options[options.index("family") + 1]]
    except (ValueError, KeyError, IndexError):
        return None


def _element(text: str, kind: SetType, family: Family | None) -> Element:
    """One element; raises ValueError or OSError."""
    parts = text.split(",")
    if len(parts) != _PARTS[kind]:
        raise ValueError(text)
    if family is None:
        return Element(port=parse_port(parts[0].rpartition(":")[2]))
    address = _address(family, parts[0])
    if kind is SetType.IP:
        return Element(address)
    name, _, port = parts[1].partition(":")
    if name not in _PROTOCOLS:
        raise ValueError(text)
    protocol, number = _PROTOCOLS[name], parse_port(port)
    if kind is SetType.IP_PORT:
        return Element(address, protocol, number)
    if kind is SetType.IP_PORT_IP:
        return Element(address, protocol, number, _address(family, parts[2]))
    prefix = parse_prefix(parts[2])
    if len(prefix.address) != family.address_bytes:
        raise ValueError(text)
    return Element(address, protocol, number, prefix.address, prefix.length)


@lru_cache(maxsize=1 << 15)
def _address(family: Family, text: str) -> Address:
    return inet_pton(family.af, text)
