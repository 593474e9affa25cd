"""YAML as JSON: what YAML means here, and the program of the children that convert large texts.

`yaml_children` runs this file by its path, so it imports nothing of ours.

ryaml reads YAML 1.2, with anchors and aliases; it refuses duplicate keys, recursion deeper than 128 and aliases that
expand without measure ("repetition limit exceeded").  Timestamps stay text.  Merge keys (`<<`) are expanded here; keys
that are no text become text, as kubectl does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import ryaml

ITEMS = "items"
"""The key under which a list has its objects."""
TASK = struct.Struct("=QQ?")
"""A piece of text for a child: where it begins and ends, and whether it goes on with the items of a list."""
DONE = struct.Struct("=QQQ")
"""Before what a child makes of a piece: where that began, and the sizes of its `Outline` and of its JSON."""

_PLACE = re.compile(r" at line (\d+) column (\d+)")
_POSITION = re.compile(r" at position (\d+)")
_DUPLICATE = re.compile(r'^duplicate entry with key "(.*)"$', re.DOTALL)


class YamlError(Exception):
    """A text is not YAML; the message begins with `line 12, column 3: ` wherever the parser knows."""


class Outline(NamedTuple):
    """What must be known of the documents of a piece of text to join them with those of its neighbours."""

    documents: int
    first: tuple[str, ...]
    """The keys of the first document."""
    last: tuple[str, ...]
    """The keys of the last document."""
    begins: bool
    """Whether the first document begins with items."""
    ends: bool
    """Whether the last document ends with items."""


def to_json(text: str) -> bytes:
    """The documents of a YAML text, as one JSON array.

    Raises:
        YamlError: it is no YAML.
    """
    return outlined(text)[1]


def outlined(text: str) -> tuple[Outline, bytes]:
    """The outline of a YAML text, and its documents as one JSON array.

    Raises:
        YamlError: it is no YAML.
    """
    try:
        documents = ryaml.loads_all(text) or []  # type: ignore[attr-defined]  # exported, its stub doesn't say so
    except ValueError as error:
        raise YamlError(_explain(str(error), text)) from None
    if "<<" in text:
        documents = _merged(documents)
    try:
        return _outline(documents), msgspec.json.encode(documents)
    except TypeError:  # a key that is null
        documents = _with_text_keys(documents)
        return _outline(documents), msgspec.json.encode(documents)


def _outline(documents: list[Any]) -> Outline:
    first, last = (
        [each if isinstance(each, dict) else {} for each in (documents[0], documents[-1])] if documents else ({}, {})
    )
    return Outline(
        len(documents),
        tuple(map(_text_key, first)),
        tuple(map(_text_key, last)),
        begins=_has_items(first, next(iter(first), None)),
        ends=_has_items(last, next(reversed(last), None)),
    )


def _has_items(document: dict[Any, Any], key: Any) -> bool:
    """Whether a key of a document is that of its items, and there are some."""
    return bool(key == ITEMS and isinstance(document[key], list) and document[key])


def _explain(message: str, text: str) -> str:
    """A message of ryaml's with the place in front."""
    line = column = None
    if (found := _PLACE.search(message)) is not None:
        line, column = int(found[1]), int(found[2])
    elif (found := _POSITION.search(message)) is not None:
        line = text.count("\n", 0, int(found[1])) + 1
    if found is not None:
        message = message[: found.start()] + message[found.end() :]
    if (again := _DUPLICATE.match(message)) is not None and column in {1, None}:
        # ryaml names the line on which the document begins, or none for the first.
        line, column = _second_line_with(again[1], text, line or 1), None
        message += " (is a `---` missing between two documents?)"
    elif "repetition limit" in message:
        message = "its aliases expand to far more than the text"
    place = f"line {line}, column {column}: " if column else f"line {line}: " if line else ""
    return place + message.replace("TypeError: ", "")


def _second_line_with(key: str, text: str, beginning: int) -> int | None:
    """The line on which a top-level key stands for the second time in the document that begins on a line."""
    start = re.compile(rf"""["']?{re.escape(key)}["']?\s*:""")
    seen = False
    for number, line in enumerate(text.splitlines()[beginning - 1 :], beginning):
        if line.startswith("---"):
            seen = False
        elif start.match(line):
            if seen:
                return number
            seen = True
    return None


def _merged(value: Any) -> Any:
    """The value with merge keys expanded: what stands beside `<<` wins, then the first of several."""
    if isinstance(value, list):
        return [_merged(item) for item in value]
    if not isinstance(value, dict):
        return value
    own = {key: _merged(item) for key, item in value.items() if key != "<<"}
    if "<<" not in value:
        return own
    sources = value["<<"] if isinstance(value["<<"], list) else [value["<<"]]
    result: dict[Any, Any] = {}
    for source in (*reversed(sources), own):
        if isinstance(source, dict):
            result.update(own if source is own else _merged(source))
    return result


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_text_keys(item) for item in value]
    if isinstance(value, dict):
        return {_text_key(key): _with_text_keys(item) for key, item in value.items()}
    return value


def _text_key(key: Any) -> str:
    return key if isinstance(key, str) else msgspec.json.encode(key).decode()


def _child(text: int, tasks: int) -> int:
    """Convert pieces of a text until no task is left; both are descriptors, and that of tasks is shared."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    gc.disable()  # nothing is garbage before the end, and looking for it takes a fifth of the time
    try:
        while task := os.read(tasks, TASK.size):
            start, end, continues = TASK.unpack(task)
            piece = os.pread(text, end - start, start).decode()
            outline, made = outlined(f"{ITEMS}:\n{piece}" if continues else piece)
            told = msgspec.json.encode(outline)
            sys.stdout.buffer.write(DONE.pack(start, len(told), len(made)) + told)
            sys.stdout.buffer.write(made)
        sys.stdout.flush()
    except YamlError as error:
        os.lseek(tasks, 0, os.SEEK_END)  # what else there is need not be tried
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    ended = _child(int(sys.argv[1]), int(sys.argv[2]))
    sys.stderr.flush()
    os._exit(ended)  # without a last look at each object of the last piece
