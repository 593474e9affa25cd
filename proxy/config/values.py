"""The types of configuration values: their textual forms in files and flags, and back.

Values are the same wherever they come from: text, `bool`, `int`, `float`, a duration as whole nanoseconds (Go's own
resolution, so that what was read is printed again unchanged), a tuple of texts, a mapping of gates.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

_UNITS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60_000_000_000,
    "h": 3_600_000_000_000,
}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_NUMBER = re.compile(r"[+-]?(0[xob])?[0-9a-f_]+", re.ASCII | re.IGNORECASE)
_REAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_QUANTITY = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(|[numkMGTPE]|[KMGTPE]i|[eE][+-]?\d+)", re.ASCII)
_LONGEST_DURATION = (1 << 63) - 1
_INT32 = 1 << 31
_LONGEST_NUMBER = 40

TRUE = frozenset(("1", "t", "T", "true", "TRUE", "True"))
FALSE = frozenset(("0", "f", "F", "false", "FALSE", "False"))
YAML_TRUE = frozenset(each for word in ("y", "yes", "on", "true") for each in (word, word.title(), word.upper()))
YAML_FALSE = frozenset(each for word in ("n", "no", "off", "false") for each in (word, word.title(), word.upper()))


class Type(enum.Enum):
    """What a field or a flag holds; the value is how messages call it."""

    STRING = "a string"
    BOOL = "true or false"
    INT = "a whole number"
    FLOAT = "a number"
    DURATION = "a duration such as 30s or 1h30m"
    FLUSH = "a duration such as 30s, or nanoseconds"
    QUANTITY = "a quantity such as 512 or 64Ki"
    STRINGS = "a list of strings"
    GATES = "a map of feature gates to true or false"
    VMODULE = "a list of file patterns with a verbosity"


def parse_duration(text: str) -> int:
    """Go's textual form of a duration (`1h2m3.5s`, `0`) as nanoseconds.

    Raises:
        ValueError: the text is no duration, or one longer than 292 years.
    """
    sign = -1 if text.startswith("-") else 1
    rest = text[1:] if text[:1] in {"+", "-"} else text
    if rest == "0":
        return 0
    total = position = 0
    while position < len(rest):
        part = _PART.match(rest, position)
        if part is None or len(part[1]) > _LONGEST_NUMBER:
            break
        total += int(Decimal(part[1]) * _UNITS[part[2]])
        position = part.end()
    if position == 0 or position < len(rest):
        raise ValueError(f"{quoted(text)} is not a duration such as 30s or 1h30m")
    if total > _LONGEST_DURATION:
        raise ValueError(f"{quoted(text)} is too long a duration")
    return sign * total


def format_duration(nanoseconds: int) -> str:
    """A duration as Go prints it: `15m0s`, `1.5s`, `100ms`, `0s`."""
    sign, rest = ("-", -nanoseconds) if nanoseconds < 0 else ("", nanoseconds)
    if rest == 0:
        return "0s"
    for unit in ("ns", "µs", "ms"):
        if rest < _UNITS[unit] * 1000:
            return f"{sign}{_decimal(rest, _UNITS[unit])}{unit}"
    minutes, rest = divmod(rest, _UNITS["m"])
    seconds = f"{_decimal(rest, _UNITS['s'])}s"
    if minutes >= 60:
        return f"{sign}{minutes // 60}h{minutes % 60}m{seconds}"
    return f"{sign}{minutes}m{seconds}" if minutes else f"{sign}{seconds}"


def _decimal(value: int, unit: int) -> str:
    """`value / unit` without trailing zeros; `unit` is a power of ten."""
    whole, rest = divmod(value, unit)
    digits = str(rest).rjust(len(str(unit)) - 1, "0").rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)


def parse_bool(text: str, *, yaml: bool = False) -> bool:
    """A truth value as flags spell it, or as plain words of YAML 1.1 do.

    Raises:
        ValueError: it is neither true nor false.
    """
    if text in (YAML_TRUE if yaml else TRUE):
        return True
    if text in (YAML_FALSE if yaml else FALSE):
        return False
    raise ValueError(f"{quoted(text)} is not true or false")


def parse_flush(text: str) -> int:
    """A duration, or a plain number of nanoseconds, as nanoseconds.

    Raises:
        ValueError: it is neither.
    """
    digits = text[1:] if text[:1] in {"+", "-"} else text
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= _LONGEST_NUMBER):
        return parse_duration(text)
    value = int(text)
    if abs(value) > _LONGEST_DURATION:
        raise ValueError(f"{quoted(text)} is too long a duration")
    return value


def parse_int(text: str) -> int:
    """A whole number of 32 bits as Go reads it: in decimal, or behind 0x, 0o, 0b, or 0 for octal.

    Raises:
        ValueError: it is none, or out of range.
    """
    try:
        if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
            raise ValueError  # noqa: TRY301  # the same answer as for any other text that is no number
        digits = text.lstrip("+-")
        octal = len(digits) > 1 and digits[0] == "0" and digits[1].isdecimal()
        value = int(text, 8 if octal else 0)
    except ValueError:
        raise ValueError(f"{quoted(text)} is not a whole number") from None
    if not -_INT32 <= value < _INT32:
        raise ValueError(f"{text} is out of range")
    return value


def parse_float(text: str) -> float:
    """A finite number.

    Raises:
        ValueError: it is none.
    """
    value = float(text) if len(text) <= _LONGEST_NUMBER and _REAL.fullmatch(text) else float("nan")
    if value - value != 0:  # infinities and not-a-number
        raise ValueError(f"{quoted(text)} is not a number")
    return value


def parse_quantity(text: str) -> str:
    """A quantity of Kubernetes (`64Ki`), which stays text; one of nothing is `0`.

    Raises:
        ValueError: it is none.
    """
    found = _QUANTITY.fullmatch(text) if len(text) <= _LONGEST_NUMBER else None
    if found is None:
        raise ValueError(f"{quoted(text)} is not a quantity such as 512 or 64Ki")
    return text if float(found[1]) else "0"


def parse_vmodule(text: str) -> tuple[tuple[str, int], ...]:
    """The flag's `pattern=N,pattern=N`.

    Raises:
        ValueError: an item has another form.
    """
    items = []
    for item in filter(None, text.split(",")):
        pattern, equals, verbosity = item.rpartition("=")
        if not (equals and pattern):
            raise ValueError(f"{quoted(item)} is not of the form pattern=N")
        items.append((pattern, parse_int(verbosity)))
    return tuple(items)


def parse_gates(text: str) -> dict[str, bool]:
    """The flag's `Name=true,Name=false`.

    Raises:
        ValueError: an item has another form.
    """
    gates = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"{quoted(item)} lacks its value, true or false")
        gates[name.strip()] = parse_bool(value.strip())
    return gates


def parse_strings(text: str) -> tuple[str, ...]:
    """The flag's `a,b`, where quotes may hold an item together as in CSV.

    Raises:
        ValueError: a quote is not closed.
    """
    if '"' not in text:
        return tuple(text.split(",")) if text else ()
    import csv  # noqa: PLC0415  # next to its one use, which is rare

    try:
        return tuple(next(csv.reader([text], strict=True)))
    except (csv.Error, StopIteration):
        raise ValueError(f"{quoted(text)} is not a list with commas") from None


_FLAG_PARSERS: Mapping[Type, Callable[[str], Any]] = {
    Type.BOOL: parse_bool,
    Type.INT: parse_int,
    Type.FLOAT: parse_float,
    Type.DURATION: parse_duration,
    Type.FLUSH: parse_flush,
    Type.QUANTITY: parse_quantity,
    Type.STRINGS: parse_strings,
    Type.GATES: parse_gates,
    Type.VMODULE: parse_vmodule,
}


def parse_flag(kind: Type, text: str) -> Any:
    """The value that a flag's text has.

    Raises:
        ValueError: the text is not of that type; the message says so.
    """
    parser = _FLAG_PARSERS.get(kind)
    return text if parser is None else parser(text)


def render(kind: Type, value: Any) -> Any:
    """A value as the v1alpha1 object holds it in JSON."""
    match kind:
        case Type.DURATION | Type.FLUSH:
            return format_duration(value)
        case Type.FLOAT:
            return int(value) if value == int(value) else value
        case Type.STRINGS:
            return list(value) or None
        case Type.VMODULE:
            return [{"filePattern": pattern, "verbosity": verbosity} for pattern, verbosity in value]
        case Type.GATES:
            gates: Mapping[str, bool] = value
            return dict(sorted(gates.items()))
        case _:
            return value


def quoted(text: str) -> str:
    """Text of a user in a message: on one line, printable, and not endless."""
    shown = text if len(text) <= 60 else f"{text[:57]}..."
    return '"' + shown.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
