"""A table of nftables as `nft` prints it, object by object; what the text and the JSON form have in common.

Rules are held in the words of the text form, one spelling for what versions print differently.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

from rules.forwarding import Family

TABLE = "kube-proxy"
FAMILIES = {"ip": Family.IPV4, "ip6": Family.IPV6}

_NUMBER = re.compile(r"\b0x[0-9a-f]+\b")
_REJECT = re.compile(r"reject with icmp(?:v6|x)?(?: type)? port-unreachable")
_WORDS = re.compile(r"\b(?:or|and|xor)\b")
_OPERATORS = {"or": "|", "and": "&", "xor": "^"}


class Element(NamedTuple):
    """One element of a set or a map."""

    key: str
    """Its parts, with ` . ` between them."""
    value: str = ""
    """The verdict, in a map."""
    comment: str = ""


class NftSet(msgspec.Struct):
    """A named set or map."""

    elements: list[Element] = []
    timeout: int = 0
    """Seconds after which elements go, unless it says 0."""


class Hook(msgspec.Struct, frozen=True):
    """Where packets come into a base chain."""

    type: str
    hook: str
    priority: int
    policy: str


class NftChain(msgspec.Struct):
    """A chain."""

    hook: Hook | None = None
    rules: list[str] = []


class NftTable(msgspec.Struct):
    """kube-proxy's table of one family."""

    family: Family
    sets: dict[str, NftSet] = {}
    chains: dict[str, NftChain] = {}
    faults: list[str] = []
    """What was not understood, a sentence each."""


def normal_rule(text: str) -> str:
    """A rule's words, spelt one way: operators as signs, numbers as hexadecimal without leading zeros."""
    if "reject" in text:
        text = _REJECT.sub("reject", text)
    if "mark" in text:
        text = _NUMBER.sub(lambda hit: f"{int(hit[0], 16):#x}", text)
        text = _WORDS.sub(lambda hit: _OPERATORS[hit[0]], text)
    return text
