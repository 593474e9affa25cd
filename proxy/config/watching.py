"""Following the configuration file: what changed in it, and whether a running agent can take that on.

kube-proxy ends when its file is written to, to be started again, and misses the swap of a ConfigMap's symbolic link
(CFG-54).  Here a change is read and compared.  A file that cannot be used is told and changes nothing: the agent goes
on as it was configured.  A change of fields that are `live` in `proxy.config.schema` is applied; one of any other field
ends the process, as there.  What says the same as before changes nothing, whatever was written.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import NamedTuple

from asyncinotify import Inotify

from proxy.config.errors import ConfigError
from proxy.config.load import Loaded
from proxy.config.merge import Merged
from proxy.config.schema import BY_PATH
from proxy.sources.watching import Watcher, set_within

LOOK_EVERY = 30.0
"""Seconds between looks without an event, for file systems that have none (NFS, 9p)."""
QUIET = 0.1
"""Seconds without an event that end a burst of them: who replaces a file may remove the old one first."""
BURST = 2.0
"""Seconds after which a burst is acted upon though it goes on."""

_SECTIONS_OF_MODES = ("ipvs", "nftables")


class Change(NamedTuple):
    """The fields, by path, that make one configuration into another."""

    live: tuple[str, ...] = ()
    """Those that a running agent takes on."""
    restart: tuple[str, ...] = ()
    """Those that need another process."""


def classify(old: Merged, new: Merged) -> Change:
    """What a change of the configuration asks for.  Fields of other modes' sections don't count."""
    changed = [path for path, value in new.values.items() if value != old.values[path] and _counts(path, old, new)]
    return Change(
        live=tuple(path for path in changed if BY_PATH[path].live),
        restart=tuple(path for path in changed if not BY_PATH[path].live),
    )


def _counts(path: str, old: Merged, new: Merged) -> bool:
    section = path.partition(".")[0]
    return section not in _SECTIONS_OF_MODES or section in {old.values["mode"], new.values["mode"]}


class News(NamedTuple):
    """What a look at the file has found."""

    loaded: Loaded
    """What holds now, if the change is taken on."""
    change: Change
    problems: tuple[str, ...] = ()
    """Why the file cannot be used, one line each; then nothing changes."""


class Following:
    """Follows the file of a configuration."""

    def __init__(self, load: Callable[[], Loaded], started_with: Loaded) -> None:
        """Of a configuration that a process was started with.

        Args:
            load: reads the file, with the flags of the process, once more; raises ConfigError.
            started_with: what it came to at the start.
        """
        self._load = load
        self._path = Path(os.path.normpath(Path.cwd() / started_with.settings.config))
        self._loaded = started_with
        self._told: tuple[str, ...] = ()
        self._asked = False
        self._changed = asyncio.Event()

    def look(self) -> None:
        """Look now, as on SIGHUP, and tell even that nothing changed."""
        self._asked = True
        self._changed.set()

    async def changes(self) -> AsyncGenerator[News, None]:
        """Changes as they come, until cancelled; close it with `contextlib.aclosing`.

        A change counts as taken on when the next one is asked for.
        """
        path = self._path
        try:
            inotify = Inotify()
        except OSError:  # the limit of instances: it is looked at now and then
            async for news in self._follow(None, path):
                yield news
            return
        with inotify:
            watcher = Watcher(path, inotify, asyncio.get_running_loop())
            if self._changed.is_set():
                watcher.changed.set()
            self._changed = watcher.changed
            watcher.start()
            try:
                async for news in self._follow(watcher, path):
                    yield news
            finally:
                watcher.stop()

    async def _follow(self, watcher: Watcher | None, path: Path) -> AsyncGenerator[News, None]:
        while True:
            self._changed.clear()
            written = _arm(watcher, path)
            asked, self._asked = self._asked, False
            if written is not None:
                news = await asyncio.to_thread(self._look)
                if watcher is not None and watcher.writes(path) != written:
                    self._asked |= asked
                    self._changed.set()  # somebody wrote meanwhile
                elif asked or news.problems != self._told or any(news.change) or self._warns_otherwise(news):
                    self._told = news.problems
                    yield news
                    self._loaded = news.loaded
            await self._wait(watcher)

    def _warns_otherwise(self, news: News) -> bool:
        """Whether all that changed is what nobody understands: a field that was misspelt is told when it is written."""
        return news.loaded.warnings != self._loaded.warnings

    def _look(self) -> News:
        try:
            loaded = self._load()
        except ConfigError as error:
            return News(self._loaded, Change(), error.problems)
        return News(loaded, classify(self._loaded.merged, loaded.merged))

    async def _wait(self, watcher: Watcher | None) -> None:
        """Until it is time for another look."""
        settles = watcher.settles_in() if watcher is not None else None
        if not await set_within(self._changed, LOOK_EVERY if settles is None else min(LOOK_EVERY, settles)):
            return
        end = asyncio.get_running_loop().time() + BURST
        while asyncio.get_running_loop().time() < end:
            self._changed.clear()
            if not await set_within(self._changed, QUIET):
                return


def _arm(watcher: Watcher | None, path: Path) -> int | None:
    """Watch what is on the way to the file now; None while the file is being written."""
    if watcher is None:
        return 0
    try:
        watcher.arm()
    except OSError:  # the limit of watches: it is looked at now and then
        return 0
    return watcher.writes(path)
