"""A large YAML text in pieces that are parsed apart, in several processes and in little memory, and joined again.

What a parser returns takes some 25 times the memory of the text, and making the kernel find that memory costs more than
the parsing: pieces of 256 KB are parsed in two thirds of the time that the whole takes.

A text is cut before a line that begins a document (`---`), or an item of a list that is the whole document, as kubectl
prints it:

    apiVersion: v1
    items:
    - apiVersion: v1                 a piece may end before such a line; the next piece is then read with
      kind: Service                  `items:` in front of it
    - apiVersion: v1

Such a line may be something else: text in quotes that goes on from the line before, or an item of another list.
Nothing is taken for granted: every piece must be valid by itself, one that is followed by items must have ended with
items, and no key may stand twice in a document that was joined.  Then the parser had come to the same state before the
line, and what comes of the pieces is what comes of the whole.  Otherwise nothing is joined, and the whole is parsed.
An alias whose anchor stands in another piece, and all that is wrong in a text, ends that way too: so messages are
always those that the whole text gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from proxy.sources.yaml_json import ITEMS, Outline

SIZE = 256 * 1024
"""Bytes of a piece; no piece is much smaller."""
MOST = 1024
"""No text is cut into more pieces."""

_DASHES = b"\n---"
_DOCUMENT = re.compile(rb"\n---(?=[ \t\r\n])")
_FIRST_ITEM = re.compile(rb"^items:[ \t]*\r?\n( *)- ", re.MULTILINE)
_HEAD = 64 * 1024
"""Bytes in which the items of a list begin."""
_NEVER_CUT = (b"\n%", b"\n...", b"\n<<")
"""Directives, ends of documents and merge keys of whole documents reach from one piece into another."""
_OPENED = len(f'[{{"{ITEMS}":[')
_CLOSED = len("]}]")


class Piece(NamedTuple):
    """A part of a text."""

    start: int
    end: int
    continues: bool = False
    """Whether it begins within the items of a list."""


class Made(NamedTuple):
    """What was made of a piece, with `items:` in front of it if it continues a list."""

    piece: Piece
    outline: Outline
    json: memoryview | bytes
    """Its documents, in one array."""


def cut(text: bytes, size: int = SIZE) -> list[Piece]:
    """A text in pieces of about this size; one alone if nobody knows how to cut it."""
    size = max(size, len(text) // MOST)
    pieces = []
    start, continues = 0, False
    if not text.startswith(b"%") and not any(each[-1:] in text and each in text for each in _NEVER_CUT):
        found = _FIRST_ITEM.search(text, 0, _HEAD)
        item, begun = (b"\n" + found[1] + b"- ", found.end()) if found else (None, 0)
        while len(text) - start >= 2 * size:
            at, at_item = _boundary(text, max(start + size, begun), size, item)
            if at < 0:
                break
            pieces.append(Piece(start, at, continues))
            start, continues = at, at_item
    return [*pieces, Piece(start, len(text), continues)]


def _boundary(text: bytes, after: int, near: int, item: bytes | None) -> tuple[int, bool]:
    """The beginning of a document or an item, whichever; -1: there is none."""
    found = None
    if text.find(_DASHES, after, after + near) >= 0:  # in a third of the time that the pattern takes
        found = _DOCUMENT.search(text, after, after + near)
    if found is None and item is not None and (at := text.find(item, after)) >= 0:
        return at + 1, True
    found = found or _DOCUMENT.search(text, after)
    return (found.start() + 1 if found else -1), False


def joined(made: Sequence[Made]) -> bytes | None:
    """The documents of all pieces, in their order, as one array; None: this is not what the whole text means."""
    parts: list[memoryview | bytes] = []
    keys: frozenset[str] = frozenset()
    before: Outline | None = None
    for (_, _, continues), outline, json in made:
        if not outline.documents:
            return None
        if before is None:
            parts.append(json)
        elif continues:
            if not (before.ends and outline.begins) or not keys.isdisjoint(set(outline.first) - {ITEMS}):
                return None
            parts[-1] = parts[-1][:-_CLOSED]
            parts += [b",", json[_OPENED:]]
        elif before.documents == 1 and not before.last and len(parts) == 1:
            return None  # comments alone, which are a document where nothing follows
        else:
            parts[-1] = parts[-1][:-1]
            parts += [b",", json[1:]]
        keys = frozenset(outline.last) | (keys if continues and outline.documents == 1 else frozenset())
        before = outline
    return b"".join(parts)
