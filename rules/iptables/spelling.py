"""One spelling for a rule, however a version of iptables-save prints it.  Pure.

Versions differ in small things: names or numbers of protocols, masks in dots or as lengths, leading zeros and defaults
of marks, the older `state` for `conntrack`, where a protocol's own match stands, the order of options.  What is read is
brought into the spelling that our own rules have, which is that of iptables 1.8.9; so rules can be compared as texts.
A rule that nobody of ours would write stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rules.forwarding import parse_prefix

_PROTOCOLS = {"6": "tcp", "17": "udp", "132": "sctp"}
# What most rules look like, in which there is nothing to respell.
_COMMON = re.compile(
    r"(?:-s [0-9a-f.:]+/(?:32|128) )?-d [0-9a-f.:]+/\d{1,3} "
    r"(?:-p (tcp|udp|sctp) (?:-m \1 --dport [1-9]\d*(?::\d+)? )?)?"
    r"(?:-m statistic --mode random --probability [01]\.\d{11} )?"
    r"-[jg] (?:[A-Z][A-Z0-9-]*|DNAT --to-destination \S+)"
)
_WORDS = {
    "--source": "-s",
    "--src": "-s",
    "--destination": "-d",
    "--dst": "-d",
    "--in-interface": "-i",
    "--out-interface": "-o",
    "--protocol": "-p",
    "--proto": "-p",
    "--match": "-m",
    "--jump": "-j",
    "--goto": "-g",
    "--destination-port": "--dport",
    "--destination-ports": "--dport",
    "--source-port": "--sport",
    "--source-ports": "--sport",
}
_HEAD = ("-s", "-d", "-i", "-o", "-p")
_STATES = ("INVALID", "NEW", "RELATED", "ESTABLISHED", "UNTRACKED", "SNAT", "DNAT")
_ORDER = {
    "recent": ("--set", "--rcheck", "--update", "--remove", "--seconds", "--reap", "--name", "--mask", "--rsource"),
    "statistic": ("--mode", "--probability"),
}
CERTAIN = 1 << 31
"""`statistic` knows chances as multiples of the inverse."""
_ALL_BITS = 0xFFFFFFFF


class _Unusual(Exception):  # noqa: N818  # no error: the rule is nobody's of ours
    """A rule that stays as it is."""


class _Option(NamedTuple):
    """An option with its values."""

    name: str
    values: tuple[str, ...]
    negated: bool

    def __str__(self) -> str:
        return " ".join((*(("!",) if self.negated else ()), self.name, *self.values))


def chance_words(value: int) -> str:
    """How a chance of `value` in 2 to the 31 is printed."""
    return f"{value / CERTAIN:.11f}"


def respell(rule: str) -> str:
    """A rule in our spelling, as it stands behind `-A CHAIN `, without a comment."""
    if _COMMON.fullmatch(rule):
        return rule
    return respell_slowly(rule)


def respell_slowly(rule: str) -> str:
    """The same, whatever the rule looks like."""
    if '"' in rule:
        return rule
    try:
        return " ".join(_respelt(list(_options(rule.split()))))
    except (ValueError, _Unusual):
        return rule


def _options(words: Sequence[str]) -> Iterator[_Option]:
    negated = False
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "!":
            negated = True
            continue
        if not word.startswith("-"):
            raise _Unusual
        start = at
        while at < len(words) and not words[at].startswith("-") and words[at] != "!":
            at += 1
        yield _Option(_WORDS.get(word, word), tuple(words[start:at]), negated)
        negated = False


def _respelt(options: Sequence[_Option]) -> Iterator[str]:
    head = {each.name: each for each in options if each.name in _HEAD}
    protocol = _protocol(head)
    matches: list[tuple[str, list[_Option]]] = []
    target: list[_Option] = []
    for each in options:
        if each.name in _HEAD:
            continue
        if target or each.name in ("-j", "-g"):
            target.append(each)
        elif each.name == "-m":
            matches.append((_one(each), []))
        else:
            if not matches:
                matches.append((protocol, []))  # a protocol's own match need not be named
            matches[-1][1].append(each)
    yield from _head(head, protocol)
    # The match of the protocol itself stands with it; the order of the others may matter.
    for module, own in sorted(matches, key=lambda found: found[0] != protocol):
        yield from _match(module, own)
    yield from _target(target)


def _one(option: _Option) -> str:
    [value] = option.values
    return value


def _protocol(head: Mapping[str, _Option]) -> str:
    if "-p" not in head:
        return ""
    name = _one(head["-p"])
    return _PROTOCOLS.get(name, name)


def _head(head: Mapping[str, _Option], protocol: str) -> Iterator[str]:
    for name in _HEAD:
        if name not in head:
            continue
        option = head[name]
        if name in ("-s", "-d"):
            network = parse_prefix(_one(option))
            if not network.length and not option.negated:
                continue
            option = option._replace(values=(str(network),))
        elif name == "-p":
            if protocol in ("all", "0") and not option.negated:
                continue
            option = option._replace(values=(protocol,))
        yield str(option)


def _match(module: str, options: list[_Option]) -> Iterator[str]:
    if module == "state":
        module, options = "conntrack", [each._replace(name="--ctstate") for each in options]
    respelt = [_option(module, each) for each in options]
    if module == "recent":
        given = {each.name for each in respelt}
        respelt += [_Option("--rsource", (), False)] if not given & {"--rsource", "--rdest"} else []
    if order := _ORDER.get(module):
        respelt.sort(key=lambda each: order.index(each.name) if each.name in order else len(order))
    yield f"-m {module}"
    yield from map(str, respelt)


def _option(module: str, option: _Option) -> _Option:
    match module, option.name:
        case "conntrack", "--ctstate":
            states = _one(option).split(",")
            return option._replace(values=(",".join(sorted(states, key=_STATES.index)),))
        case "mark", "--mark":
            value, mask = _marked(option)
            return option._replace(values=(f"{value:#x}" + (f"/{mask:#x}" if mask != _ALL_BITS else ""),))
        case "statistic", "--probability":
            return option._replace(values=(chance_words(round(float(_one(option)) * CERTAIN)),))
        case "tcp" | "udp" | "sctp", "--dport" | "--sport":
            first, _, last = _one(option).partition(":")
            ends = [str(int(first)), *([str(int(last))] if last else [])]
            return option._replace(values=(":".join(dict.fromkeys(ends)),))
    return option


def _marked(option: _Option) -> tuple[int, int]:
    value, _, mask = _one(option).partition("/")
    return int(value, 0), int(mask, 0) if mask else _ALL_BITS


def _target(options: Sequence[_Option]) -> Iterator[str]:
    if not options:
        return
    leads, *own = options
    name = _one(leads)
    yield f"{leads.name} {name}"
    for each in own:
        yield str(_set_mark(each) if name == "MARK" else each)


def _set_mark(option: _Option) -> _Option:
    """All ways to change a mark as one: bits that are zeroed, and bits that are turned then."""
    value, mask = _marked(option)
    match option.name:
        case "--set-xmark":
            pass
        case "--set-mark":
            mask |= value
        case "--or-mark":
            mask = value
        case "--xor-mark":
            mask = 0
        case "--and-mark":
            value, mask = 0, ~value & _ALL_BITS
        case _:
            return option
    return _Option("--set-xmark", (f"{value:#x}/{mask:#x}",), option.negated)
