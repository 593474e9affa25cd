"""`nft list ruleset` and `nft list table`: the text, as far as it is kube-proxy's.  Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rules.foreign.nft_model import FAMILIES, TABLE, Element, Hook, NftChain, NftSet, NftTable, normal_rule

_TABLE = re.compile(r"table (\w+) (\S+) \{")
_OBJECT = re.compile(r"(set|map|chain|[a-z]+) (\S+) \{")
_HOOK = re.compile(r"type (\w+) hook (\w+) priority ([a-z]*)\s*([+-]?)\s*(\d*);(?: policy (\w+);)?")
_HANDLE = re.compile(r"\s*# handle \d+$")
_COMMENT = re.compile(r'\s*comment "([^"]*)"')
_QUOTED = re.compile(r'"[^"]*"')
_EXPIRY = re.compile(r" (?:timeout|expires) \S+")
_COUNTER = re.compile(r"counter packets \d+ bytes \d+ ?")
_PIECE = re.compile(r'(?:[^",]|"[^"]*")+')
_TIME = re.compile(r"(\d+)(ms|[wdhms])")
_UNITS = {"w": 604800, "d": 86400, "h": 3600, "m": 60, "s": 1, "ms": 0}
_PRIORITIES = {"raw": -300, "mangle": -150, "dstnat": -100, "filter": 0, "security": 50, "srcnat": 100}
_IGNORED = ("type ", "typeof ", "flags ", "size ", "comment ", "gc-interval ", "policy ", "auto-merge", "counter")


def looks_listed(text: str) -> bool:
    """Whether a text is what nft lists."""
    # Manifests may be long, and a search for a line's beginning stops at every letter.
    if "table " not in text:
        return False
    return re.search(r"^\s*table (?:ip|ip6|inet|arp|bridge|netdev) \S+ \{", text, re.MULTILINE) is not None


def parse(text: str) -> list[NftTable]:
    """kube-proxy's tables in a text, one of each family at most."""
    reader = _Reader()
    for depth, line in _statements(text):
        if depth == 0:
            reader.open_table(line)
        elif depth == 1:
            reader.open_object(line)
        else:
            reader.take(line)
    return list(reader.found.values())


_CUT = "<cut off>"


class _Reader:
    """Where in a text the reading is."""

    def __init__(self) -> None:
        self.found: dict[str, NftTable] = {}
        self._table: NftTable | None = None
        self._kind = self._name = ""

    def open_table(self, line: str) -> None:
        hit = _TABLE.fullmatch(line)
        self._table, self._kind = None, ""
        if hit is not None and hit[2] == TABLE and hit[1] in FAMILIES:
            table = NftTable(FAMILIES[hit[1]], {}, {}, [])
            self._table = self.found.setdefault(hit[1], table)
            if self._table is not table:
                self._table.faults.append("the table stands there twice: both are read as one")

    def open_object(self, line: str) -> None:
        if self._table is None:
            return
        hit = _OBJECT.fullmatch(line)
        self._kind, self._name = (hit[1], hit[2]) if hit is not None else ("", "")
        if self._kind == "chain":
            self._table.chains.setdefault(self._name, NftChain(None, []))
        elif self._kind in {"set", "map"}:
            self._table.sets.setdefault(self._name, NftSet([]))
        elif line == _CUT:
            self._table.faults.append("the table has no end: the text is cut off")

    def take(self, line: str) -> None:
        if self._table is None:
            return
        if self._kind == "chain":
            _chain_line(self._table, self._name, line)
        elif self._kind in {"set", "map"}:
            _set_line(self._table, self._name, line)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Every line with how deep it stands; what is between inner braces is one line with what is before them."""
    depth = inner = 0
    gathered: list[str] = []
    for raw in text.split("\n"):
        line = _HANDLE.sub("", raw.strip()) if "#" in raw else raw.strip()
        opened, closed = _braces(line)
        if inner:
            gathered.append(line)
            inner += opened - closed
            if inner <= 0:
                yield depth, " ".join(gathered)
                gathered, inner = [], 0
        elif depth < 2 and opened == closed + 1:
            yield depth, line
            depth += 1
        elif line.startswith("}") and not opened:
            depth = max(0, depth - closed)
        elif opened > closed:
            gathered, inner = [line], opened - closed
        elif line:
            yield depth, line
    if inner:
        yield depth, " ".join(gathered)
    if depth:
        yield 1, _CUT


def _braces(line: str) -> tuple[int, int]:
    """How many braces a line opens and closes, outside of quotes."""
    if "{" not in line and "}" not in line:
        return 0, 0
    bare = _QUOTED.sub("", line) if '"' in line else line
    return bare.count("{"), bare.count("}")


def _chain_line(table: NftTable, name: str, line: str) -> None:
    chain = table.chains[name]
    if line.startswith("type ") and " hook " in line:
        chain.hook = _hook(line)
        if chain.hook is None:
            table.faults.append(f"chain {name} stands at a place that is not understood: {line}")
    elif not line.startswith("comment "):
        rule = _COMMENT.sub("", line) if '"' in line else line
        if "counter" in rule:
            rule = _COUNTER.sub("", rule)
        chain.rules.append(normal_rule(rule.replace('"', "")))


def _hook(line: str) -> Hook | None:
    hit = _HOOK.fullmatch(line)
    if hit is None or hit[3] not in _PRIORITIES | {"": 0} or len(hit[5]) > 9:
        return None
    base, distance = _PRIORITIES.get(hit[3], 0), int(hit[5] or 0)
    return Hook(hit[1], hit[2], base - distance if hit[4] == "-" else base + distance, hit[6] or "accept")


def _set_line(table: NftTable, name: str, line: str) -> None:
    into = table.sets[name]
    if line.startswith("elements = {"):
        into.elements += _elements(line[len("elements = {") :].rstrip().removesuffix("}"))
    elif line.startswith("timeout "):
        into.timeout = _seconds(line[len("timeout ") :])
    elif not line.startswith(_IGNORED):
        table.faults.append(f"{name} has something that is not understood: {line[:80]}")


def _elements(text: str) -> Iterator[Element]:
    quoted = '"' in text
    for piece in _PIECE.findall(text) if quoted else text.split(","):
        comment = ""
        if quoted and (hit := _COMMENT.search(piece)) is not None:
            comment = hit[1]
            piece = piece[: hit.start()] + piece[hit.end() :]  # noqa: PLW2901  # the element without its comment
        if " expires " in piece or " timeout " in piece:
            piece = _EXPIRY.sub("", piece)  # noqa: PLW2901  # likewise
        key, _, value = piece.strip().partition(" : ")
        if key:
            yield Element(key.strip(), value.strip(), comment)


def _seconds(text: str) -> int:
    return sum(int(number[:9]) * _UNITS[unit] for number, unit in _TIME.findall(text))
