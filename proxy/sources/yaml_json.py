"""YAML as JSON, converted in a child process where it is large.

ryaml is fast (some 12 MB/s), but it holds the interpreter's lock from beginning to end, in whatever thread it runs:
5,000 Services would stop the event loop for 0.3 s.  What it returns takes some 25 times the memory of the text, which
an agent would never get back.  A child process costs 60 ms and has neither trouble, and when memory runs out it is the
child that the kernel kills.  JSON comes back, so that YAML and JSON take one way from there: `proxy.objects` decodes
both.

This file is the child's program too (it is run by its path), so it imports nothing of ours.

What YAML means here: ryaml reads YAML 1.2, with anchors and aliases; it refuses duplicate keys, recursion deeper than
128 and aliases that expand without measure ("repetition limit exceeded").  Timestamps stay text.  Merge keys (`<<`)
are expanded here; keys that are no text become text, as kubectl does.
"""

from __future__ import annotations

import contextlib
import gc
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import ryaml

LARGE = 256 * 1024
"""Bytes of YAML from which a child converts: less than 30 ms of parsing."""

_PLACE = re.compile(r" at line (\d+) column (\d+)")
_POSITION = re.compile(r" at position (\d+)")
_DUPLICATE = re.compile(r'^duplicate entry with key "(.*)"$', re.DOTALL)


class YamlError(Exception):
    """A text is not YAML; the message begins with `line 12, column 3: ` wherever the parser knows."""


def to_json(text: str) -> bytes:
    """The documents of a YAML text, as one JSON array.

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
        return msgspec.json.encode(documents)
    except TypeError:  # a key that is null
        return msgspec.json.encode(_with_text_keys(documents))


class Converter:
    """Converts one text at a time, from any thread; `stop` ends a conversion at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def convert(self, data: bytes) -> bytes:
        """The documents of a YAML text in UTF-8, as one JSON array.

        Raises:
            YamlError: it is no YAML, the child died, or `stop` was called.
        """
        if len(data) < LARGE:
            return to_json(data.decode())
        with self._lock:
            if self._stopped:
                raise YamlError("stopped")
            try:
                child = self._child = subprocess.Popen(  # noqa: S603  # our own file, no shell
                    [sys.executable, "-I", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            except OSError as error:
                raise YamlError(f"no process to parse it: {error.strerror}") from None
        try:
            out, complaint = child.communicate(data)
        finally:
            self._child = None
        if child.returncode == 0:
            return out
        if child.returncode == 1 and (message := complaint.decode(errors="replace").strip()):
            raise YamlError(message.splitlines()[-1])
        raise YamlError(f"the process that parses it ended with status {child.returncode}: is memory short?")

    def stop(self) -> None:
        """End the conversion that runs, and refuse every later one."""
        with self._lock:
            self._stopped = True
            if (child := self._child) is not None:
                child.kill()


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
        return {
            key if isinstance(key, str) else msgspec.json.encode(key).decode(): _with_text_keys(item)
            for key, item in value.items()
        }
    return value


def _child() -> int:
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    gc.disable()  # nothing is garbage before the end, and looking for it takes a fifth of the time
    try:
        sys.stdout.buffer.write(to_json(sys.stdin.buffer.read().decode()))
    except YamlError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_child())
