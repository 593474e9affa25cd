"""Configuration files: their text to values by field path, each with the line it stands on.

The parser is PyYAML's, for its line numbers and because it takes what kube-proxy's own parser takes: JSON, words of
YAML 1.1 for true and false, a key given twice.  What a scalar means is decided by the type of its field: a number where
text is wanted is that text, which kube-proxy refuses; quoted digits are no number, as there.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml  # type: ignore[import-untyped]

from proxy.config.errors import ConfigError
from proxy.config.schema import (
    FIELDS,
    GROUP_VERSION,
    KIND,
    OWN_FIELDS,
    OWN_GROUP_VERSION,
    OWN_KIND,
    Field,
)
from proxy.config.values import (
    Type,
    parse_bool,
    parse_duration,
    parse_float,
    parse_flush,
    parse_int,
    parse_quantity,
    quoted,
)

_LARGEST = 1 << 20
_OCTAL = re.compile(r"[+-]?0\d+", re.ASCII)
_MERGE = "tag:yaml.org,2002:merge"


class Document(NamedTuple):
    """What a file says."""

    values: Mapping[str, Any]
    """The fields that it sets, by path; `null` sets nothing."""
    lines: Mapping[str, int]
    """Where it sets them."""
    unknown: tuple[str, ...]
    """What it says that nobody understands, one sentence each."""


def read(path: Path) -> Document:
    """The configuration in a file of YAML or JSON: a KubeProxyConfiguration, a SluiceConfiguration, or both.

    Raises:
        ConfigError: the file cannot be read or parsed, holds something else, or a field's value is of another type.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: {_why_unreadable(error)}") from None
    if len(data) > _LARGEST:
        raise ConfigError(f"--config {path}: is larger than 1 MiB, which no configuration is")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    return parse(text, str(path))


def _why_unreadable(error: OSError | ValueError) -> str:
    match error:
        case FileNotFoundError():
            return "No such file or directory: give the path of a file that is there"
        case PermissionError():
            return f"Permission denied: let user {os.geteuid()} read it"
        case IsADirectoryError():
            return "Is a directory: give the path of the file in it"
        case OSError():
            return error.strerror or str(error)
        case _:
            return str(error)


def parse(text: str, name: str) -> Document:
    """The configuration in a text; `name` is how messages call it.

    Raises:
        ConfigError: see `read`.
    """
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    unknown: list[str] = []
    problems: list[str] = []
    seen: set[str] = set()
    for root in _compose(text, name):
        try:
            kind = _kind(root, name, seen)
        except _StrangeDocumentError as error:
            if not seen or _entry_text(root, "apiVersion") == OWN_GROUP_VERSION:
                raise
            # kube-proxy looks at the first document of a file, whatever follows it.
            unknown += [f"{problem}; this document is passed over" for problem in error.problems]
            continue
        seen.add(kind)
        walk = _Walk(name, FIELDS if kind == KIND else OWN_FIELDS)
        walk.mapping(root, "")
        values.update(walk.values)
        lines.update(walk.lines)
        unknown += walk.unknown
        problems += walk.problems
    if problems:
        raise ConfigError(*problems)
    if not seen:
        raise ConfigError(f"{name}: is empty; it needs apiVersion: {GROUP_VERSION} and kind: {KIND}")
    return Document(values, lines, tuple(unknown))


def _compose(text: str, name: str) -> Iterator[yaml.Node]:
    """The documents of a YAML text that are not empty, as nodes."""
    if text.lstrip().startswith("{"):
        # JSON allows tabs between its tokens, YAML does not; within JSON's strings there are none.
        text = text.replace("\t", " ")
    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            if not (isinstance(node, yaml.ScalarNode) and _is_null(node)):
                yield node
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{where}: is not valid YAML: {error.problem or error.context or 'no reason'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: is not valid YAML: {str(error).splitlines()[0]}") from None
    except (RecursionError, ValueError):
        raise ConfigError(f"{name}: is not valid YAML, or nested too deeply") from None


class _StrangeDocumentError(ConfigError):
    """A document is none of ours."""


def _kind(root: yaml.Node, name: str, seen: set[str]) -> str:
    """Which of the two documents it is; `seen` are those before it."""
    where = f"{name}:{_line(root)}"
    if not isinstance(root, yaml.MappingNode):
        raise _StrangeDocumentError(f"{where}: is not a mapping of fields to values")
    api_version, kind = (_entry_text(root, key) for key in ("apiVersion", "kind"))
    if not api_version or not kind:
        raise _StrangeDocumentError(
            f"{where}: lacks {'kind' if api_version else 'apiVersion'}: "
            f"it needs apiVersion: {GROUP_VERSION} and kind: {KIND}"
        )
    if (api_version, kind) not in {(GROUP_VERSION, KIND), (OWN_GROUP_VERSION, OWN_KIND)}:
        raise _StrangeDocumentError(
            f"{where}: no kind {quoted(kind)} is known in version {quoted(api_version)}; "
            f"this reads {KIND} of {GROUP_VERSION} and {OWN_KIND} of {OWN_GROUP_VERSION}"
        )
    if kind in seen:
        raise _StrangeDocumentError(f"{where}: a second {kind}; a file may hold one")
    return kind


def _entry_text(root: yaml.Node, key: str) -> str:
    return (_text(_entry(root, key)) or "") if isinstance(root, yaml.MappingNode) else ""


def _entries(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """What a mapping says: itself, and before that what it takes over by `<<` from others and does not say itself."""
    said = {_text(key) for key, _ in node.value}
    for other in _taken_over(node):
        for key, value in other.value:
            if key.tag != _MERGE and _text(key) not in said:
                said.add(_text(key))
                yield key, value
    yield from ((key, value) for key, value in node.value if key.tag != _MERGE)


def _taken_over(node: yaml.MappingNode) -> Iterator[yaml.MappingNode]:
    """The mappings that one takes over by `<<`, those that count more first; each once, as it says the same twice."""
    seen = {id(node)}
    waiting = [*_merged(node)][::-1]
    while waiting:
        each = waiting.pop()
        if isinstance(each, yaml.MappingNode) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [*_merged(each)][::-1]


def _merged(node: yaml.MappingNode) -> Iterator[yaml.Node]:
    for key, value in node.value:
        if key.tag == _MERGE:
            yield from value.value if isinstance(value, yaml.SequenceNode) else [value]


def _merged_from_nothing(node: yaml.MappingNode) -> list[yaml.Node]:
    """What is to be taken over by `<<`, and is no mapping."""
    return [each for each in _merged(node) if not isinstance(each, yaml.MappingNode)]


def _entry(root: yaml.MappingNode, key: str) -> yaml.Node | None:
    found: yaml.Node | None = None
    for name, value in root.value:
        if _text(name) == key:
            found = value  # of a key given twice the last one holds, as in the walk
    return found


class _Walk:
    """One document's fields, taken out of its nodes."""

    def __init__(self, name: str, fields: Iterable[Field]) -> None:
        self.name = name
        self.fields = {field.path: field for field in fields}
        self.sections = {path.rpartition(".")[0] for path in self.fields}
        self.sections |= {section.rpartition(".")[0] for section in self.sections}
        self.values: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self.unknown: list[str] = []
        self.problems: list[str] = []

    def mapping(self, node: yaml.MappingNode, section: str) -> None:
        """Take what a section holds; the whole document is the section without a name."""
        given: set[str] = set()
        for key in _merged_from_nothing(node):
            self.unknown.append(f"{self.name}:{_line(key)}: << is no mapping; it is passed over")
        for key, value in _entries(node):
            name = _text(key) or ""
            path = f"{section}.{name}" if section else name
            if path in {"apiVersion", "kind"}:
                continue
            if name in given:
                self.unknown.append(f"{self.name}:{_line(key)}: {path} is given twice; the last one holds")
            given.add(name)
            if path in self.fields:
                self.field(self.fields[path], value, _line(key))
            elif path in self.sections and path:
                if isinstance(value, yaml.MappingNode):
                    self.mapping(value, path)
                elif not _is_null(value):
                    self.problems.append(f"{self.name}:{_line(value)}: {path}: must be a section of fields")
            else:
                self.unknown.append(self._unknown(path, name, section, _line(key)))

    def field(self, field: Field, node: yaml.Node, line: int) -> None:
        self.values.pop(field.path, None)
        if _is_null(node):
            return
        try:
            value = _value(field.type, node)
        except ValueError as error:
            self.problems.append(f"{self.name}:{_line(node)}: {field.path}: {error}")
            return
        if field.zero_is_default and not value:
            return
        self.values[field.path] = value
        self.lines[field.path] = line

    def _unknown(self, path: str, name: str, section: str, line: int) -> str:
        prefix = f"{section}." if section else ""
        siblings = {
            each[len(prefix) :].partition(".")[0].lower(): each[: len(prefix)] + each[len(prefix) :].partition(".")[0]
            for each in self.fields
            if each.startswith(prefix)
        }
        elsewhere = {each.rpartition(".")[2].lower(): each for each in reversed(self.fields)}
        hint = ""
        # The same name in another section is likelier meant than a similar one in this.
        for names, likeness in ((siblings, 1.0), (elsewhere, 1.0), (siblings, 0.75), (elsewhere, 0.75)):
            close = difflib.get_close_matches(name[:100].lower(), names, n=1, cutoff=likeness)
            if close:
                hint = f"; did you mean {names[close[0]]}?"
                break
        shown = path if path.isprintable() and path and len(path) <= 100 else quoted(path)
        return f"{self.name}:{line}: unknown field {shown}{hint}"


def _value(kind: Type, node: yaml.Node) -> Any:
    """What a node means for a field of a type.

    Raises:
        ValueError: it means nothing there; the message says so.
    """
    if kind is Type.STRINGS:
        return tuple("" if _is_null(item) else _string(item) for item in _items(node, "a list of strings"))
    if kind is Type.GATES:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError("must be a map of names to true or false")
        return {_string(name): _bool(value) for name, value in _entries(node) if not _is_null(value)}
    if kind is Type.VMODULE:
        return tuple(_pattern(item) for item in _items(node, "a list of items with filePattern and verbosity"))
    return _scalar(kind, node)


def _scalar(kind: Type, node: yaml.Node) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        shape = "list" if isinstance(node, yaml.SequenceNode) else "map"
        raise ValueError(f"must be {kind.value}, not a {shape}")  # noqa: TRY004  # the one error of this module
    if kind is Type.BOOL:
        return _bool(node)
    if kind is Type.DURATION:
        return parse_duration(node.value)
    if kind is Type.QUANTITY:
        return parse_quantity(node.value)
    if kind is Type.FLUSH:
        return parse_flush(node.value) if node.style is None else parse_duration(node.value)
    if kind is Type.STRING:
        return node.value
    if node.style is not None:
        raise ValueError(f"must be {kind.value}, not text; leave out the quotes")
    return _whole_number(node.value) if kind is Type.INT else parse_float(node.value)


def _whole_number(text: str) -> int:
    """A number without a fraction, however it is written: templates of Helm write 1.048576e+06."""
    try:
        number = parse_float(text)
    except ValueError:
        return parse_int(text)
    return parse_int(str(int(number)) if number.is_integer() and not _OCTAL.fullmatch(text) else text)


def _items(node: yaml.Node, what: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError(f"must be {what}")  # noqa: TRY004  # the one error of this module
    return list(node.value)


def _pattern(node: yaml.Node) -> tuple[str, int]:
    if not isinstance(node, yaml.MappingNode):
        raise ValueError("must hold items with filePattern and verbosity")  # noqa: TRY004  # likewise
    return _text(_entry(node, "filePattern")) or "", _whole_number(_entry_text(node, "verbosity") or "0")


def _bool(node: yaml.Node) -> bool:
    if not isinstance(node, yaml.ScalarNode) or node.style is not None:
        raise ValueError("must be true or false" + (", without quotes" if isinstance(node, yaml.ScalarNode) else ""))
    return parse_bool(node.value, yaml=True)


def _string(node: yaml.Node) -> str:
    text = _text(node)
    if text is None:
        raise ValueError("must hold strings only")
    return text


def _text(node: yaml.Node | None) -> str | None:
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _is_null(node: yaml.Node) -> bool:
    return (
        isinstance(node, yaml.ScalarNode)
        and node.style is None
        and node.value in {"", "~", "null", "Null", "NULL"}
        and node.tag != "tag:yaml.org,2002:str"
    )


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
