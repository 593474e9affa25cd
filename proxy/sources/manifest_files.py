"""Reading a directory or a file of manifests, again and again: I/O, and only what changed is parsed again.

What counts as a manifest in a directory: `*.yaml`, `*.yml` and `*.json`, links followed, subdirectories and dot files
not.  A path that is a file counts under any name.

A file that cannot be read or parsed keeps what was last valid from it, and so does one that is being written: an
empty or half-written text may well be valid YAML, with most Services missing.  Nothing here blocks on a FIFO or opens
a device.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from proxy.sources.manifest_objects import Content, FileError, keep_last_valid, parse

SUFFIXES = (".yaml", ".yml", ".json")
MAX_BYTES = 256 << 20
"""A file that is larger is not read: 10,000 Services with slices of 100 endpoints fit, as JSON."""
MAX_YAML_BYTES = 64 << 20
"""As YAML that cannot be cut (`yaml_pieces`) it costs 25 times its size in memory while it is parsed."""

_RACY_NS = 100_000_000
"""A file that changed so shortly before it was read may change again and show the same time and size."""

Signature = tuple[int, int, int, int, int]


class FileState(NamedTuple):
    """What is known of one file."""

    content: Content = Content()
    trouble: str | None = None
    """Why the file as a whole could not be used; its content is what was last valid then."""
    signature: Signature | None = None
    """What identifies the version that was read; None: read it again in any case."""


Files = Mapping[str, FileState]


class Unreadable(Exception):  # noqa: N818  # it says how the path is, which is no error to wait for
    """The directory or file as a whole is not there or cannot be read; one line with its path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{printable(str(path))}: {reason}")
        self.reason = reason


class Tools(NamedTuple):
    """What a scan needs from elsewhere."""

    to_json: Callable[[bytes], bytes]
    """`yaml_children.Converter.convert`."""
    writes: Callable[[Path], int | None] = lambda _: 0
    """`watching.Watcher.writes`: a number that another write to the file changes; None while it is being written."""


def is_manifest(name: str) -> bool:
    """Whether an entry of a directory counts as a manifest, by its name."""
    return name.endswith(SUFFIXES) and not name.startswith(".")


def printable(name: str) -> str:
    """A file's name as it may stand in a log."""
    return name if name.isprintable() else ascii(name)


def scan(path: Path, before: Files, tools: Tools) -> dict[str, FileState]:
    """The files of a directory, or the one file, by name; those that did not change are taken from `before`.

    A path that is not there, or is no longer, is `Unreadable` rather than empty.

    Raises:
        Unreadable: there is no such directory or file, or the directory may not be listed.
    """
    try:
        directory = path.is_dir()
        found = sorted(each for each in path.iterdir() if is_manifest(each.name)) if directory else [path]
        path.stat()
    except OSError as error:
        raise Unreadable(path, _reason(error)) from None
    files: dict[str, FileState] = {}
    for each in found:
        name = printable(each.name)
        state = _examine(each, name, before.get(name), tools)
        if state is not None:
            files[name] = state
    if not directory and not files:
        raise Unreadable(path, "still being written")
    return files


def _examine(path: Path, name: str, before: FileState | None, tools: Tools) -> FileState | None:
    """The state of one file; None when it is not there (any more), or is new and still being written."""
    last = FileState() if before is None else before
    signature: Signature | None = None
    try:
        signature = _signature(path.stat())
        if signature == last.signature:
            return last
        writes = tools.writes(path)
        signature, data = (signature, b"") if writes is None else _read(path, name)
        if writes is None or tools.writes(path) != writes:
            return before
        content = keep_last_valid(parse(name, data, tools.to_json), last.content)
    except FileNotFoundError as error:
        return FileState(last.content, _reason(error)) if path.is_symlink() else None
    except OSError as error:
        return FileState(last.content, _reason(error))
    except FileError as error:
        return FileState(last.content, str(error), signature)
    return FileState(content, None, signature)


def _read(path: Path, name: str) -> tuple[Signature | None, bytes]:
    """The version and the bytes of a regular file.

    Raises:
        FileError: it is none, or too large.
        OSError: it cannot be read.
    """
    _check(path.stat(), name)
    # It may be another one by now: O_NONBLOCK keeps a FIFO from waiting for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check(status, name)
        data = file.read()
    racy = abs(time.time_ns() - status.st_mtime_ns) < _RACY_NS
    return None if racy else _signature(status), data


def _check(status: os.stat_result, name: str) -> None:
    """Whether a file may be read.

    Raises:
        FileError: it may not.
    """
    if not stat.S_ISREG(status.st_mode):
        raise FileError("not a regular file: passed over")
    limit, advice = (MAX_BYTES, "") if name.endswith(".json") else (MAX_YAML_BYTES, ", or write it as JSON")
    if status.st_size > limit:
        raise FileError(f"larger than {limit >> 20} MiB: split it{advice}")


def _signature(status: os.stat_result) -> Signature:
    # The change time too: it shows a chmod, and a copy that kept the old modification time.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO)
