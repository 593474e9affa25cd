"""A running agent and its configuration file: what changes is taken on, or ends the agent (CFG-54)."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable

from proxy.config.settings import Settings
from proxy.config.watching import Following
from proxy.logs import get_logger
from proxy.opening import FatalError
from proxy.sd_notify import Supervisor

_log = get_logger("sluice.agent")


async def follow(following: Following, configure: Callable[[Settings], None], supervisor: Supervisor) -> None:
    """Take on what changes in the file, until cancelled; on SIGHUP look at once.

    Args:
        following: tells of changes.
        configure: goes by other settings, of which only live fields differ.
        supervisor: is told of a reload that SIGHUP has asked for.

    Raises:
        FatalError: something changed that needs another process.
    """
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, following, supervisor)
    async with contextlib.aclosing(following.changes()) as changes:
        async for news in changes:
            for problem in news.problems:
                _log.error("the configuration stays as it was", reason=problem)
            if news.change.restart:
                fields = ", ".join(news.change.restart)
                raise FatalError(f"the configuration file was updated: ending, to start anew with its {fields}")
            if not news.problems:
                for warning in news.loaded.warnings:
                    _log.warning(warning)
                _log.info("configuration", changed=", ".join(news.change.live) or "nothing")
                configure(news.loaded.settings)
            supervisor.reloaded()


def _reload(following: Following, supervisor: Supervisor) -> None:
    supervisor.reloading()
    following.look()
