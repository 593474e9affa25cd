"""Following one resource of an API server: three generators, each adding one promise to the one below it.

`watch`            one request: events until the stream ends, however it ends.
`keep_watching`    watch after watch from the version reached: gaps and failures of the connection are bridged.
`list_then_watch`  for ever: a complete list, then the changes; a new list whenever the watch cannot be resumed.

A resource version is the server's opaque bookmark: a list carries one, each event moves it on, and a watch may begin
after any version that the server still keeps.  Bookmark events move it on while nothing happens, so that it doesn't
fall out of what is kept.

A list is never reported in part.  Who consumes the outermost generator sees nothing while the server is away, and so
keeps what it has.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import NamedTuple

import msgspec

from proxy.objects import Key
from proxy.sources.progress import Progress
from proxy.sources.transport import ApiError, Client, RefusedError, SilentError, UnreachableError
from proxy.sources.wire import Head, Lines, ListPage, WireError, decode_event, decode_page, decode_status, head

NO_STREAMING_LISTS = frozenset({400, 422})
"""Statuses by which servers say that they don't know `sendInitialEvents`."""

BROKEN_STREAMS = 3
"""So many streams in a row that break without an event, and the version is taken to be what breaks them."""

ANY_VERSION = "0"
"""Asks a list for whatever the server has in its cache."""

EVENTS = frozenset({"ADDED", "MODIFIED", "DELETED", "BOOKMARK"})

LASTING = 30.0
"""Seconds: a watch that has lasted so long may break, as load balancers end what is idle; that there is no other one
would be news."""

SHORT_WATCH = 1.0
"""Seconds: a watch that ends sooner, and without an event, counts as a failure, else a sick server is asked nonstop."""


class Target(NamedTuple):
    """What is listed and watched."""

    path: str
    selectors: Mapping[str, str]
    optional: bool = False
    """The server may lack it, or the agent the right to see it: then it is taken to be empty."""


class Event(NamedTuple):
    """A change: ADDED, MODIFIED or DELETED; or a BOOKMARK."""

    type: str
    object: msgspec.Raw
    head: Head

    @property
    def ends_list(self) -> bool:
        """Whether it is the bookmark behind the objects of a streaming list."""
        # An object that somebody has given the same annotation ends nothing.
        return self.type == "BOOKMARK" and self.head.ends_initial_events


class Listed(NamedTuple):
    """Everything there is."""

    items: list[msgspec.Raw]
    version: str


class NotServed(NamedTuple):
    """The server doesn't have the resource, or doesn't show it."""

    why: str


class StartOverError(ApiError):
    """The watch cannot be resumed from the version reached; only a list helps."""

    def __init__(self, reason: str, *, usual: bool = False) -> None:
        super().__init__(reason)
        self.usual = usual


class BrokenError(UnreachableError):
    """A stream held what is no event, or ended in the middle of one."""


class NotStreamingError(UnreachableError):
    """A server that was asked for a streaming list has not understood that."""


class _Streak:
    """What watches that follow each other have in common: whether going on like that makes sense."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = 0.0
        self._quiet = True
        self._bookmarked = False
        self._broken = self._silent = 0

    def begin(self) -> None:
        self._began, self._quiet = self._clock(), True

    def heard(self, event: Event) -> None:
        self._quiet = False
        self._broken = self._silent = 0
        self._bookmarked |= event.type == "BOOKMARK"

    def ended(self, failure: ApiError | None) -> ApiError | None:
        """The failure to wait for after a watch; None: the next one may begin at once.

        Raises:
            StartOverError: it makes no sense.
        """
        match failure:
            case StartOverError():
                raise failure
            case SilentError():
                self._silent += 1
                if self._silent > 1 and self._bookmarked:
                    raise StartOverError(str(failure))
                return None
            case BrokenError():
                self._broken += 1
                if self._broken >= BROKEN_STREAMS:
                    raise StartOverError(str(failure))
            case UnreachableError() if self._clock() - self._began >= LASTING:
                failure.usual = True
            case None if self._quiet and self._clock() - self._began < SHORT_WATCH:
                return UnreachableError("the server ended the watch at once")
        return failure


class Reflector:
    """Lists and watches of one resource."""

    def __init__(self, client: Client, target: Target, progress: Progress) -> None:
        self._client = client
        self._target = target
        self._progress = progress
        self._settings = progress.settings
        self._streaming = progress.settings.streaming

    async def watch(self, version: str, *, initial: bool = False) -> AsyncGenerator[Event, None]:
        """The events after `version`, bookmarks included, until the server ends the stream, which it does by time.

        With `initial`, a streaming list: every object that there is as ADDED, a bookmark that says so, then events;
        `version` is then the least that will do, and may be empty for the newest.

        Raises:
            StartOverError: the server no longer keeps the version, or has never reached it.
            RefusedError: the server refused, at once or in the middle.
            UnreachableError: no answer, or the stream broke off (BrokenError where it held what is no event).  All
                events before were yielded; asking again from the last one's version loses none.
            SilentError: the connection stands, but nothing came for long.
        """
        settings = self._settings
        query = {**self._target.selectors, **self._watch_query(version, initial=initial)}
        chunks = self._client.stream(
            self._target.path,
            query,
            answer=settings.answer,
            silence=lambda: settings.initial_silence if initial else settings.silence,
        )
        lines = Lines()
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    if not chunk:
                        self._progress.watching()
                    for line in lines.feed(chunk):
                        event = _event(line)
                        self._progress.heard(event.head.version, event=event.type != "BOOKMARK")
                        initial = initial and not event.ends_list
                        if event.type in EVENTS:
                            yield event
        except WireError as error:
            raise BrokenError(f"the watch broke: {error}") from None
        except RefusedError as error:
            if error.status.expired or error.status.too_large_version:
                raise StartOverError(str(error), usual=True) from None
            raise
        if lines.pending:
            raise BrokenError("the watch broke off in the middle of an event")

    def _watch_query(self, version: str, *, initial: bool) -> dict[str, str]:
        shortest, longest = self._settings.watch_shortest, self._settings.watch_longest
        seconds = shortest + (longest - shortest) * self._progress.timing.random()
        query = {"watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": str(max(1, int(seconds)))}
        if initial:
            query |= {"sendInitialEvents": "true", "resourceVersionMatch": "NotOlderThan"}
        return query | ({"resourceVersion": version} if version else {})

    async def keep_watching(
        self,
        version: str,
        opened: AsyncGenerator[Event, None] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """The events after `version`, without gaps, over as many watches as it takes; `opened` is the first of them.

        The server's end of a stream is followed by the next watch at once; a failure by a delay that grows.  What is
        older than what was seen (a repetition, or events that changed places) is passed over; deletions are not, as
        servers of old gave them the version of the object.

        Raises:
            StartOverError: there is no going on from here: the version has expired, every stream from it breaks, or
                a server that sent bookmarks has fallen silent twice, as one does whose store was restored to the past.
        """
        streak = _Streak(self._progress.timing.clock)
        while True:
            streak.begin()
            failure: ApiError | None = None
            try:
                async with contextlib.aclosing(opened or self.watch(version)) as events:
                    async for event in events:
                        streak.heard(event)
                        old = _older(event.head.version, version)
                        if not old:
                            version = event.head.version or version
                        if not old or event.type == "DELETED":
                            yield event
            except ApiError as error:
                failure = error
            opened = None
            if wait_for := streak.ended(failure):
                if wait_for.usual:
                    self._progress.lasted()
                await self._progress.pause(wait_for)

    async def list_then_watch(self, *, newest: bool = False) -> AsyncGenerator[Listed | Event | NotServed, None]:
        """A complete list, then the changes, for ever; another list whenever the changes cannot be followed.

        The first list may be as old as the server has at hand, unless `newest`; later ones are never older than what
        was seen, unless the server says that it hasn't come so far (it was restored): then its newest counts.
        Failures are waited out here, with at most one list per delay.  Raises nothing of its own.
        """
        version = "" if newest else None
        while True:
            listed = False
            try:
                async with contextlib.aclosing(self._list_and_watch(version)) as changes:
                    async for change in changes:
                        listed = True
                        version = _version_after(change, version)
                        yield change
            except StartOverError as error:
                version = version if listed else ""
                await self._progress.pause(error)
            except ApiError as error:
                if self._cannot_stream(error):
                    self._streaming = False
                elif self._target.optional and isinstance(error, RefusedError) and error.status.code in {403, 404}:
                    self._progress.not_served(str(error))
                    yield NotServed(str(error))
                    await self._progress.timing.sleep(self._settings.rare * (0.75 + self._progress.timing.random() / 2))
                else:
                    await self._progress.pause(error)

    async def _list_and_watch(self, version: str | None) -> AsyncGenerator[Listed | Event, None]:
        """One complete list, as the server gives it best, and the events after it.

        Raises:
            StartOverError: as `keep_watching`; before the list: the server no longer keeps `version`, or has never
                reached it.
            RefusedError, UnreachableError: there was no list.
        """
        self._progress.listing()
        events = self.watch(version or "", initial=True) if self._streaming else None
        async with contextlib.AsyncExitStack() as open_stream:
            if events is None:
                listed = await self._list(ANY_VERSION if version is None else version)
            else:
                await open_stream.enter_async_context(contextlib.aclosing(events))
                listed = await _streamed_list(events)
            self._progress.listed(len(listed.items), listed.version)
            yield listed
            version = listed.version
            del listed  # the consumer has it; the watch lasts
            async with contextlib.aclosing(self.keep_watching(version, events)) as changes:
                async for event in changes:
                    yield event

    def _cannot_stream(self, error: ApiError) -> bool:
        """A streaming list failed as with servers that have none: they refuse it, say nothing more, or watch."""
        refused = isinstance(error, RefusedError) and error.status.code in NO_STREAMING_LISTS
        return self._streaming and (refused or isinstance(error, (SilentError, NotStreamingError)))

    async def _list(self, version: str) -> Listed:
        """All objects, page by page, and the version of the list.

        A page that has expired means that the pages so far are worth nothing: once more, whole.

        Raises:
            StartOverError: the server no longer keeps `version`, or has never reached it.
            RefusedError, UnreachableError: as a watch does.
        """
        query = {**self._target.selectors}
        if version:
            query["resourceVersion"] = version
        if version in {"", ANY_VERSION}:
            # With a version, a limit would send the request past the server's cache.
            query["limit"] = str(self._settings.page)
        items: list[msgspec.Raw] = []
        try:
            while True:
                page = await self._page(query)
                items += page.items or []
                if not page.metadata.continue_:
                    return Listed(items, page.metadata.resource_version or "")
                query = {**self._target.selectors, "limit": query["limit"], "continue": page.metadata.continue_}
        except RefusedError as error:
            if error.status.expired and "continue" in query:
                page = await self._page(self._target.selectors)
                return Listed(page.items or [], page.metadata.resource_version or "")
            if error.status.expired or error.status.too_large_version:
                raise StartOverError(str(error), usual=True) from None
            raise

    async def _page(self, query: Mapping[str, str]) -> ListPage:
        body = await self._client.get(self._target.path, query, patience=self._settings.answer)
        try:
            return decode_page(body)
        except WireError as error:
            raise UnreachableError(f"the list broke: {error}") from None


async def _streamed_list(events: AsyncGenerator[Event, None]) -> Listed:
    """The list at the beginning of a streaming one.

    Besides ADDED for each object there may be changes in it: the server begins with what its cache holds, and goes on
    until that is as new as was asked for.  Its first bookmark is the one at the end.

    Raises:
        NotStreamingError: it is none: the server watches, as if nothing but that had been asked for.
        RefusedError, UnreachableError: as a watch does.
    """
    found: dict[Key | int, msgspec.Raw] = {}
    async for event in events:
        if event.type == "BOOKMARK":
            if event.ends_list:
                return Listed(list(found.values()), event.head.version)
            raise NotStreamingError("the server sends no streaming list")
        key = event.head.key
        if event.type == "DELETED":
            found.pop(key, None)
        else:
            # An object without a name is nobody's double; it is complained about later.
            found[key if key.name else len(found)] = event.object
    raise UnreachableError("the server ended the list before it was complete")


def _event(line: bytes) -> Event:
    event = decode_event(line)
    if event.type == "ERROR":
        raise RefusedError(decode_status(event.object))
    return Event(event.type, event.object, head(event.object))


def _version_after(change: Listed | Event, version: str | None) -> str | None:
    if isinstance(change, Listed):
        return change.version
    return version if _older(change.head.version, version or "") else change.head.version or version


def _older(version: str, than: str) -> bool:
    """Versions are opaque in principle; where both are numbers, as with every real server, they have an order."""
    try:
        return int(version) < int(than)
    except ValueError:
        return False
