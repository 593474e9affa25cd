"""Manifests as a source of objects: a directory or a file, watched, in place of an API server.

    path ─ watching ─▶ manifest_files ─ bytes ─▶ manifest_objects ─ merge, mirror ─▶ Loaded ─ difference ─▶ Sink
           inotify     changed files             objects, problems                  all of it  changes only

Every look is the same, whatever the reason for it: read the files that changed, merge all, compare with what was
handed on, and hand on the difference.  So the order of events does not matter, and none can be missed for good.  A
look runs in a thread; only the handing on is done on the event loop.

What is never taken for "gone":

* the directory or file itself is missing, or cannot be read: what was handed on stays, until it can be read again;
* a file is wrong, unreadable or being written: what was last valid from it stays; so does the last valid version of a
  single object that became wrong;
* at least 100 Services and more than half of all vanished at once: nothing is removed until a look 5 s later says the
  same (DESIGN 4.4).

The memory of what was valid ends with the process.  So nothing at all is handed on before the first look that could
use something: a node whose only file is broken keeps the rules it has.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from asyncinotify import Inotify

from proxy.objects import Key, Object
from proxy.report import Followed
from proxy.sources.base import Resource, Sink, prepare
from proxy.sources.manifest_files import Files, Tools, Unreadable, printable, scan
from proxy.sources.manifest_loading import absolute, together
from proxy.sources.manifest_objects import ORIGIN, FileError, Loaded, Problem
from proxy.sources.watching import Watcher, set_within
from proxy.sources.yaml_children import Converter
from proxy.state import SECOND_LOOK, suspicious

__all__ = ["FileError", "Loaded", "ManifestSource", "Problem", "Unreadable"]

LOOK_EVERY = 30.0
"""Seconds between looks without an event, for file systems that have none (NFS, 9p)."""
LOOK_EVERY_WITHOUT_INOTIFY = 2.0
QUIET = 0.02
"""Seconds without an event that end a burst of them."""
BURST = 0.2
"""Seconds after which a burst is acted upon though it goes on."""
REPLACE_FROM = 1000
"""Changes of one resource from which the whole list is handed on instead."""

# Endpoints before the Services that need them, and the other way round when they go.
_ORDER = (Resource.NODES, Resource.SERVICE_CIDRS, Resource.SLICES, Resource.SERVICES)

Objects = Mapping[Resource, Mapping[Key, Object]]
NOTHING: Objects = {resource: {} for resource in Resource}
T = TypeVar("T")


class Change(NamedTuple):
    """What makes one resource's objects into others."""

    objects: Mapping[Key, Object]
    """All that there are afterwards."""
    changed: tuple[Object, ...]
    gone: frozenset[Key]


def difference(before: Mapping[Key, Object], after: Mapping[Key, Object]) -> Change:
    """The change from `before` to `after`."""
    changed = tuple(value for key, value in after.items() if before.get(key) != value)
    return Change(after, changed, frozenset(before.keys() - after.keys()))


class _Look(NamedTuple):
    """What one look found."""

    files: Files
    loaded: Loaded
    """What the files say together."""
    problems: tuple[Problem, ...]
    changes: Mapping[Resource, Change] | None
    """None: nothing to hand on."""
    unwatched: bool
    """Whether changes of some files go unnoticed."""


class ManifestSource:
    """A `Source` that reads a directory or a file of manifests and follows its changes."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        node_name: str,
        *,
        confirm_after: float = SECOND_LOOK,
        look_every: float = LOOK_EVERY,
    ) -> None:
        """`node_name` is that of the only Node that is handed on (NOD-2)."""
        self._path = absolute(path)
        self._node_name = node_name
        self._confirm_after = confirm_after
        self._look_every = look_every
        self._converter = Converter()
        self._subject = printable(str(self._path))
        self._files: Files = {}
        self._loaded = Loaded()
        self._handed: Objects | None = None
        self._confirm_at: float | None = None
        self._complaints: dict[str, str] = {}
        self._looked: float | None = None
        self._changed: float | None = None

    @property
    def description(self) -> str:
        return f"manifests {self._subject}"

    def followed(self) -> Sequence[Followed]:
        """When the files were last looked at."""
        now = time.monotonic()
        return [
            Followed(
                what="files",
                state="waiting" if self._handed is None else "watching",
                lag=None if self._looked is None else now - self._looked,
                changed=None if self._changed is None else now - self._changed,
                error=self._complaints.get(self._subject, ""),
            )
        ]

    async def run(self, sink: Sink) -> None:
        """Report to `sink` until cancelled; once per object, as no run follows another.

        First all four resources as lists, then the differences.  No thread or process of it outlives this call.
        """
        try:
            inotify = Inotify()
        except OSError as error:
            await self._follow(sink, None, (self._unwatched(error),))
            return
        with inotify:
            watcher = Watcher(self._path, inotify, asyncio.get_running_loop())
            watcher.start()
            try:
                await self._follow(sink, watcher, ())
            finally:
                watcher.stop()

    async def _follow(self, sink: Sink, watcher: Watcher | None, standing: tuple[Problem, ...]) -> None:
        now = asyncio.get_running_loop().time
        while True:
            if watcher is not None:
                watcher.changed.clear()
            again = self._confirm_at is not None and now() >= self._confirm_at
            look = await self._in_thread(partial(self._look, watcher, again=again))
            self._files, self._loaded = look.files, look.loaded
            self._looked = time.monotonic()
            problems = [*standing, *look.problems]
            if look.changes is not None:
                changes = look.changes
                if (doubt := self._doubt(sink, changes[Resource.SERVICES], now())) is not None:
                    problems.append(doubt)
                    changes = {resource: self._without_removals(resource, each) for resource, each in changes.items()}
                if self._handed is None:
                    for resource in _ORDER:
                        await prepare(sink, resource, changes[resource].objects.values())
                self._hand_on(sink, changes)
            elif again:
                self._confirm_at = None  # there is nothing to compare with until it can be read
            self._complain(sink, problems)
            await self._wait(watcher, unwatched=look.unwatched)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """What `function` returns from a thread, which has ended when this has, cancelled or not."""
        work = asyncio.ensure_future(asyncio.to_thread(function))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            self._converter.stop()
            await asyncio.gather(work, return_exceptions=True)
            raise

    async def _wait(self, watcher: Watcher | None, *, unwatched: bool) -> None:
        """Until it is time for another look."""
        now = asyncio.get_running_loop().time
        every = LOOK_EVERY_WITHOUT_INOTIFY if unwatched else self._look_every
        dues = [every, watcher.settles_in() if watcher else None, self._confirm_at and self._confirm_at - now()]
        pause = max(0.0, min(due for due in dues if due is not None))
        if watcher is None:
            await asyncio.sleep(pause)
            return
        if not await set_within(watcher.changed, pause):
            return
        end = now() + BURST
        while now() < end:
            watcher.changed.clear()
            if not await set_within(watcher.changed, QUIET):
                return

    def _look(self, watcher: Watcher | None, *, again: bool) -> _Look:
        """Read what changed (with `again`: everything) and compare.  Runs in a thread and changes nothing of `self`."""
        before = self._files
        if again:
            before = {name: state._replace(signature=None) for name, state in before.items()}
        tools = Tools(self._converter.convert)
        standing: tuple[Problem, ...] = ()
        if watcher is not None:
            tools = Tools(self._converter.convert, watcher.writes)
            try:
                watcher.arm()
            except OSError as error:
                standing = (self._unwatched(error),)
        unwatched = watcher is None or bool(standing)
        try:
            files = scan(self._path, before, tools)
        except Unreadable as error:
            outcome = "what was read from it stays" if self._handed is not None else "waiting for it"
            problems = (*standing, *self._loaded.problems, Problem(self._subject, f"{error.reason}: {outcome}"))
            return _Look(self._files, self._loaded, problems, None, unwatched)
        if self._handed is not None and self._confirm_at is None and _same(files, self._files):
            return _Look(files, self._loaded, (*standing, *self._loaded.problems), None, unwatched)
        loaded = together(files, self._node_name)
        problems = (*standing, *loaded.problems)
        if self._handed is None and files and all(state.trouble is not None for state in files.values()):
            problems = (*problems, Problem(self._subject, "nothing in it can be used: waiting"))
            return _Look(files, loaded, problems, None, unwatched)
        handed = self._handed or NOTHING
        changes = {resource: difference(handed[resource], each) for resource, each in _by_resource(loaded).items()}
        return _Look(files, loaded, problems, changes, unwatched)

    def _unwatched(self, error: OSError) -> Problem:
        reason = f"cannot be watched ({error.strerror}): read every {LOOK_EVERY_WITHOUT_INOTIFY:g} s instead"
        return Problem(self._subject, reason)

    def _doubt(self, sink: Sink, services: Change, now: float) -> Problem | None:
        """Why nothing is to be removed before another look, if so many Services have vanished (DESIGN 4.4)."""
        total = len((self._handed or NOTHING)[Resource.SERVICES])
        if self._confirm_at is None and not suspicious(total, len(services.gone)):
            return None
        # While in doubt it is asked in any case, so that the sink hears of the end of it.
        if sink.plausible(Resource.SERVICES, services.objects.keys(), now):
            self._confirm_at = None
            return None
        if self._confirm_at is None or now >= self._confirm_at:
            self._confirm_at = now + self._confirm_after
        reason = f"{len(services.gone)} of {total} Services have vanished: kept until another look says the same"
        return Problem(self._subject, reason)

    def _without_removals(self, resource: Resource, change: Change) -> Change:
        before = (self._handed or NOTHING)[resource]
        return Change({**before, **change.objects}, change.changed, frozenset())

    def _hand_on(self, sink: Sink, changes: Mapping[Resource, Change]) -> None:
        """All of it without a pause, so that no sync sees half of a change."""
        first = self._handed is None
        listed = {each for each in _ORDER if first or len(changes[each].changed) >= REPLACE_FROM}
        for resource in _ORDER:
            if resource in listed:
                sink.replace(resource, changes[resource].objects.values())
                continue
            for value in changes[resource].changed:
                sink.set(resource, value)
        for resource in reversed(_ORDER):
            if resource not in listed:
                for key in sorted(changes[resource].gone):
                    sink.delete(resource, key)
        self._handed = {resource: change.objects for resource, change in changes.items()}
        self._changed = time.monotonic()

    def _complain(self, sink: Sink, problems: Iterable[Problem]) -> None:
        """Tell of problems that are new, others than before, or gone."""
        now: dict[str, str] = {}
        for subject, reason in problems:
            now[subject] = f"{now[subject]}; {reason}" if subject in now else reason
        for subject in self._complaints.keys() - now.keys():
            sink.trouble(ORIGIN, subject, None)
        for subject, reason in now.items():
            if self._complaints.get(subject) != reason:
                sink.trouble(ORIGIN, subject, reason)
        self._complaints = now


def _by_resource(loaded: Loaded) -> Objects:
    return {
        Resource.NODES: {value.key: value for value in loaded.nodes},
        Resource.SERVICE_CIDRS: {value.key: value for value in loaded.service_cidrs},
        Resource.SLICES: {value.key: value for value in loaded.slices},
        Resource.SERVICES: {value.key: value for value in loaded.services},
    }


def _same(files: Files, before: Files) -> bool:
    """Whether no file was read anew, has come or is gone."""
    return files.keys() == before.keys() and all(state is before[name] for name, state in files.items())
