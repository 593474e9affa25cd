"""Converting YAML in child processes where it is large.

ryaml is fast (some 20 MB/s), but it holds the interpreter's lock from beginning to end, in whatever thread it runs:
5,000 Services would stop the event loop for 0.3 s.  A child process costs 60 ms and has no such trouble, and when
memory runs out it is the child that the kernel kills.  JSON comes back, so that YAML and JSON take one way from there:
`proxy.objects` decodes both.

A text that can be cut (`yaml_pieces`) is converted by two children where there are two processors: each takes the next
piece from a list that they share.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from io import FileIO

import msgspec

from proxy.sources import yaml_json
from proxy.sources.yaml_json import DONE, TASK, Outline, YamlError, to_json
from proxy.sources.yaml_pieces import Made, Piece, cut, joined

LARGE = 256 * 1024
"""Bytes of YAML from which a child converts: less than 30 ms of parsing."""
_CHILDREN = 2

_OUTLINE = msgspec.json.Decoder(Outline)


class _RefusedError(YamlError):
    """What was given to a child is no YAML."""


class Converter:
    """Converts one text at a time, from any thread; `stop` ends a conversion at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def convert(self, data: bytes) -> bytes:
        """The documents of a YAML text in UTF-8, as one JSON array.

        Raises:
            YamlError: it is no YAML, a child died, or `stop` was called.
        """
        if len(data) < LARGE:
            return to_json(data.decode())
        pieces = cut(data)
        with _file("yaml", data) as text:
            if len(pieces) > 1:
                with suppress(_RefusedError):
                    if (found := joined(self._made(text, pieces))) is not None:
                        return found
            (whole,) = self._made(text, [Piece(0, len(data))])
        return bytes(whole.json)

    def stop(self) -> None:
        """End the conversion that runs, and refuse every later one."""
        with self._lock:
            self._stopped = True
            for child in self._children:
                child.kill()

    def _made(self, text: FileIO, pieces: Sequence[Piece]) -> list[Made]:
        """What children make of the pieces of a text, in the order of the text.

        Raises:
            _RefusedError: a piece is no YAML.
            YamlError: a child died, or `stop` was called.
        """
        with ExitStack() as files:
            tasks = files.enter_context(_file("tasks", b"".join(TASK.pack(*each) for each in pieces)))
            number = min(_CHILDREN, len(os.sched_getaffinity(0)), len(pieces))
            outputs = [files.enter_context(_file("json")) for _ in range(number)]
            complaints: list[bytes] = []
            try:
                started = self._start(text, tasks, outputs)
                complaints = [child.communicate()[1] for child in started]
            finally:
                self._children = []
            for child, complaint in zip(started, complaints, strict=True):
                if child.returncode == 1 and (message := complaint.decode(errors="replace").strip()):
                    raise _RefusedError(message.splitlines()[-1])
                if child.returncode != 0:
                    raise YamlError(
                        f"the process that parses it ended with status {child.returncode}: is memory short?"
                    )
            by_start = {each.start: each for each in pieces}
            made = [each for output in outputs for each in _read(output, by_start)]
        return sorted(made, key=lambda each: each.piece.start)

    def _start(self, text: FileIO, tasks: FileIO, outputs: Sequence[FileIO]) -> list[subprocess.Popen[bytes]]:
        with self._lock:
            if self._stopped:
                raise YamlError("stopped")
            for output in outputs:
                try:
                    child = subprocess.Popen(  # noqa: S603  # our own file, no shell
                        [sys.executable, "-I", yaml_json.__file__, str(text.fileno()), str(tasks.fileno())],
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.PIPE,
                        pass_fds=(text.fileno(), tasks.fileno()),
                    )
                except OSError as error:
                    if self._children:
                        break  # one does it alone
                    raise YamlError(f"no process to parse it: {error.strerror}") from None
                self._children.append(child)
            return list(self._children)


def _file(name: str, content: bytes = b"") -> FileIO:
    """A file in memory, from its beginning on."""
    file = open(os.memfd_create(name), "w+b", buffering=0)  # noqa: PTH123, SIM115  # it has no path, and goes to callers
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    file.seek(0)
    return file


def _read(output: FileIO, pieces: dict[int, Piece]) -> Iterator[Made]:
    """What a child has written."""
    output.seek(0)
    data = memoryview(output.readall())
    at = 0
    while at < len(data):
        start, told, size = DONE.unpack_from(data, at)
        at += DONE.size
        yield Made(pieces[start], _OUTLINE.decode(data[at : at + told]), data[at + told : at + told + size])
        at += told + size
