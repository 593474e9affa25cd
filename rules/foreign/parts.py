"""A text of several programs, one after the other, cut into what each of them printed.  Pure.

`iptables-save`, `ip6tables-save`, `ipset save`, `ipvsadm -Sn` and `ip -j addr`: what kube-proxy's ipvs mode leaves in a
kernel takes all of them to tell, and people save them into one file as well as into several.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from rules.foreign import addresses_json, ipset_text, ipvs_text
from rules.forwarding import Address

_MARKS = ("create ", "add ", "-A -", "-a -", ipvs_text.LISTING)
_SOME_LINE = re.compile(rf"^(?:{ipset_text.LINE.pattern}|{ipvs_text.LINE.pattern})", re.MULTILINE)

_END_OF_TABLE = re.compile(r"\n[^\S\n]*COMMIT[^\S\n]*(?=\n|\Z)")


class Parts(msgspec.Struct):
    """What was found in a text; None: nothing of the kind."""

    iptables: str
    """Everything else, among it what iptables-save and ip6tables-save print."""
    ipset: list[str] | None = None
    """Lines."""
    ipvsadm: list[str] | None = None
    addresses: dict[str, tuple[Address, ...]] | None = None
    """By interface."""

    @property
    def of_ipvs(self) -> bool:
        """Whether there is anything beside iptables' rules."""
        return not (self.ipset is None and self.ipvsadm is None and self.addresses is None)


def looks_like_parts(text: str) -> bool:
    """Whether there is what ipset, ipvsadm or ip print."""
    return addresses_json.HEAD.match(text) is not None or any(map(_has_some_line, _outside_tables(text)))


def _outside_tables(text: str) -> Iterator[str]:
    """What stands before, between and behind the tables of iptables, which are the most of a text."""
    at = 0
    begin = 0 if text.startswith("*") else text.find("\n*")
    while begin >= 0:
        yield text[at:begin]
        end = _END_OF_TABLE.search(text, begin)
        if end is None:
            return
        at = end.end()
        begin = text.find("\n*", at)
    yield text[at:]


def _has_some_line(text: str) -> bool:
    # Manifests may be long, and a search for a line's beginning stops at every letter.
    return any(text.startswith(mark) or f"\n{mark}" in text for mark in _MARKS) and _SOME_LINE.search(text) is not None


def split(text: str) -> Parts:
    """Cut a text by what its lines look like."""
    if not looks_like_parts(text):
        return Parts(text)
    parts = Parts("")
    rest: list[str] = []
    ipset: list[str] = []
    ipvsadm: list[str] = []
    in_table = False
    at, length = 0, len(text)
    while at < length:
        end = text.find("\n", at)
        end = length if end < 0 else end
        line = text[at:end].rstrip("\r")
        if not in_table and line.startswith("[") and addresses_json.HEAD.match(text, at):
            found = addresses_json.parse_at(text, at)
            if found is not None:
                parts.addresses = {**(parts.addresses or {}), **found[0]}
                at = found[1]
                continue
        if in_table or line.startswith("*"):
            in_table = line.strip() != "COMMIT"
            rest.append(line)
        elif line[:1] in "ac" and ipset_text.LINE.match(line):
            ipset.append(line)
        elif ipvs_text.LINE.match(line):
            ipvsadm.append(line)
        else:
            rest.append(line)
        at = end + 1
    parts.iptables, parts.ipset, parts.ipvsadm = "\n".join(rest), ipset or None, ipvsadm or None
    return parts
