"""What `ip -j addr` prints: which interface has which addresses.  Read and written; pure."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from socket import inet_pton
from typing import Any

from rules.forwarding import Address, Family, family_of, format_address

HEAD = re.compile(r'\s*\[(?:\s*\{\s*\}\s*,)*\s*\{\s*"ifindex"\s*:')
"""How it begins."""

_FAMILIES = {"inet": Family.IPV4, "inet6": Family.IPV6}
_NAMES = {family: name for name, family in _FAMILIES.items()}

Addresses = dict[str, tuple[Address, ...]]


def parse_at(text: str, start: int) -> tuple[Addresses, int] | None:
    """The addresses by interface at a place of a text, and where they end; None: nothing that makes sense."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, list):
        return None
    found: Addresses = {}
    for each in value:
        if isinstance(each, dict) and isinstance(name := each.get("ifname"), str):
            listed = each.get("addr_info")
            told = listed if isinstance(listed, list) else []
            found[name] = tuple(packed for one in told if (packed := _address(one)) is not None)
    return found, end


def text_of(addresses: Mapping[str, tuple[Address, ...]]) -> str:
    """Addresses in the form that `parse_at` reads, as far as it goes."""
    value = [
        {
            "ifindex": number,
            "ifname": name,
            "addr_info": [{"family": _NAMES[family_of(each)], "local": format_address(each)} for each in found],
        }
        for number, (name, found) in enumerate(addresses.items(), 1)
    ]
    return json.dumps(value)


def _address(value: Any) -> Address | None:
    if not isinstance(value, dict):
        return None
    family, text = value.get("family"), value.get("local")
    if not isinstance(family, str) or not isinstance(text, str) or family not in _FAMILIES:
        return None
    try:
        return inet_pton(_FAMILIES[family].af, text)
    except (OSError, ValueError):
        return None
