"""Noticing that a directory or a file of manifests may have changed, through inotify.

An inotify watch belongs to a directory's inode, not to its path, so `Watcher` watches every directory entry on the way
to the manifests: the path's own components, so that a directory may be missing, appear, or be put in another's place,
and those of symbolic links, so that ConfigMap volumes (which swap the link `..data`) and links to files elsewhere are
seen.  Which entries these are is computed anew at each `arm`.

Nothing is concluded from an event but that it is time to look, so an event that is lost costs time and nothing else.
Only one thing is remembered: who is being written.  A half-written manifest may be valid YAML with most Services
missing, so a reader asks `writes` before and after it reads: None is "somebody writes it", and two different answers
are "somebody wrote it meanwhile".  A file counts as written when its writer closes it or pauses for a second.

Events do not come from file systems that others write to (NFS, 9p): whoever uses this looks now and then anyway.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from pathlib import Path
from typing import NamedTuple

from asyncinotify import Event, Inotify, Mask

from proxy.sources.manifest_files import is_manifest

PAUSE = 1.0
"""Seconds without a write after which a file counts as written, though nobody closed it."""

_ENTRIES = Mask.CREATE | Mask.DELETE | Mask.MOVE | Mask.DELETE_SELF | Mask.MOVE_SELF
_CONTENTS = _ENTRIES | Mask.MODIFY | Mask.CLOSE_WRITE | Mask.ATTRIB
_SETTLED = Mask.CLOSE_WRITE | Mask.MOVE | Mask.DELETE
_MAX_LINKS = 40
_ROOT = Path("/")


class Entries(NamedTuple):
    """Which entries of one directory matter."""

    names: frozenset[str]
    manifests: bool
    """Whether every manifest in it does."""
    contents: bool
    """Whether what is written to them matters, and not just which ones there are."""


def entries_on_the_way(path: Path) -> list[tuple[Path, str]]:
    """The directory entries that decide what an absolute path leads to: real directory and name, in order.

    The last one is that of the file or directory itself, or the first that is missing.
    """
    found: list[tuple[Path, str]] = []
    at, rest, links = _ROOT, list(reversed(path.parts[1:])), 0
    while rest:
        name = rest.pop()
        if name == "..":
            at = at.parent
            continue
        found.append((at, name))
        here = at / name
        try:
            target = here.readlink()
        except FileNotFoundError:
            break
        except OSError:  # no link
            at = here
            continue
        links += 1
        if links > _MAX_LINKS:
            break
        if target.is_absolute():
            at = _ROOT
        rest.extend(reversed(target.parts[1:] if target.is_absolute() else target.parts))
    return found


def wanted_entries(path: Path) -> dict[Path, Entries]:
    """By real directory, the entries to watch for the manifests at an absolute path."""
    names: dict[Path, set[str]] = {}
    written: set[Path] = set()
    listed: Path | None = None

    def follow(way: Path) -> Path:
        entries = entries_on_the_way(way)
        for directory, name in entries:
            names.setdefault(directory, set()).add(name)
        directory, name = entries[-1] if entries else (_ROOT, "")
        return directory / name

    end = follow(path)
    try:
        found = [each for each in end.iterdir() if is_manifest(each.name)]
    except OSError:
        written.add(end.parent)
    else:
        listed = end
        names.setdefault(end, set())
        written.add(end)
        written.update(follow(each).parent for each in found if each.is_symlink())
    return {
        directory: Entries(frozenset(of), directory == listed, directory in written) for directory, of in names.items()
    }


class Watcher:
    """Watches one path; `changed` is set when it is time to look."""

    def __init__(self, path: Path, inotify: Inotify, loop: asyncio.AbstractEventLoop) -> None:
        self.changed = asyncio.Event()
        self._path = path
        self._inotify = inotify
        self._inotify.sync_timeout = 0
        self._loop = loop
        self._lock = threading.Lock()
        self._watched: dict[int, tuple[Path, Entries]] = {}
        self._writing: dict[Path, float] = {}
        self._written: dict[Path, int] = {}
        self._numbers = itertools.count(1)

    def start(self) -> None:
        """Take in events as they come, until `stop`."""
        self._loop.add_reader(self._inotify.fd, self._take_in)

    def stop(self) -> None:
        self._loop.remove_reader(self._inotify.fd)

    def arm(self) -> None:
        """Watch what is on the way now; called before each look, by the thread that looks.

        What appears between the look at the way and the watch of it would go unseen, so this goes on until nothing
        changes any more.

        Raises:
            OSError: the limit of watches is reached.
        """
        last: dict[Path, Entries] = {}
        for _ in range(10):
            wanted = wanted_entries(self._path)
            if wanted == last:
                break
            last = wanted
            watched: dict[int, tuple[Path, Entries]] = {}
            for directory, entries in wanted.items():
                mask = (_CONTENTS if entries.contents else _ENTRIES) | Mask.ONLYDIR
                try:
                    watch = self._inotify.add_watch(directory, mask)
                except (FileNotFoundError, NotADirectoryError, PermissionError):
                    continue
                watched[watch.wd] = (directory, entries)
            self._watched = watched
        for stale in self._inotify.watches:
            if stale.wd not in self._watched:
                try:
                    self._inotify.rm_watch(stale)
                except OSError:  # the kernel removed it with its directory
                    continue
        with self._lock:
            now = self._loop.time()
            self._writing = {path: until for path, until in self._writing.items() if until > now}

    def writes(self, path: Path) -> int | None:
        """A number that another write to the file changes; None while it is being written.  From any thread."""
        self._take_in()
        real = Path(os.path.realpath(path))  # Path.resolve raises where links lead in a circle
        with self._lock:
            return None if self._writing.get(real, 0) > self._loop.time() else self._written.get(real, 0)

    def settles_in(self) -> float | None:
        """Seconds until the next file counts as written, if any is being written."""
        with self._lock:
            return max(min(self._writing.values()) - self._loop.time(), 0) if self._writing else None

    def _take_in(self) -> None:
        changed = False
        with self._lock:
            while (event := self._inotify.sync_get()) is not None:
                changed |= self._matters(event)
        if changed:
            self._loop.call_soon_threadsafe(self.changed.set)

    def _matters(self, event: Event) -> bool:
        """Whether it is time to look; notes who writes what."""
        mask = event.mask
        if mask & Mask.IGNORED:
            return False  # a watch was removed, by `arm` or after an event that said why
        watched = self._watched.get(event.watch.wd) if event.watch is not None else None
        if watched is None or event.name is None:
            return True
        directory, entries = watched
        name = str(event.name)
        if name not in entries.names and not (entries.manifests and is_manifest(name)):
            return False
        path = directory / name
        if mask & (Mask.MODIFY | Mask.CREATE) and not mask & Mask.ISDIR and entries.contents:
            known = path in self._writing
            self._writing[path] = self._loop.time() + PAUSE
            self._written[path] = next(self._numbers)
            return not known
        if mask & _SETTLED:
            self._writing.pop(path, None)
            if mask & (Mask.DELETE | Mask.MOVED_FROM):
                self._written.pop(path, None)
            else:
                self._written[path] = next(self._numbers)
        return True


async def set_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event is set within so many seconds."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return event.is_set()
